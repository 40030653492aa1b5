"""Files of results: everything that can be written can be loaded, and no code in them is run."""

import io
import json
import pickle
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import clafusion
from clafusion import Deeper, InputError, Like
from clafusion.interop.records import read_record
from clafusion.reports.records import taken_facts
from tests.support.networks import mlp, randomise, vgg

INPUTS = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A network whose code knows no width."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def made(folder: Path, *widths: int, seed: int) -> clafusion.ModelFile:
    model = randomise(Net(*widths), seed)
    clafusion.save_model(model, folder / f"{seed}.pt")
    return clafusion.ModelFile(f"{__name__}:Net{widths}", folder / f"{seed}.pt")


def same(model: nn.Module, result: clafusion.FusionResult) -> bool:
    return torch.allclose(model(INPUTS), result.model.eval()(INPUTS), atol=1e-6)


@pytest.fixture
def files(tmp_path):
    return [made(tmp_path, 6, 9, 8, 3, seed=1), made(tmp_path, 6, 12, 3, seed=2)]


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".safetensors.index.json"])
@pytest.mark.parametrize("target", ["deeper", Deeper(width="wide"), "shallower"])
def test_what_factories_made_comes_back_by_them(files, tmp_path, ending, target):
    models = [one.load() for one in files]
    result = clafusion.fuse(models, INPUTS, target=target, calibration="none")
    path = tmp_path / f"fused{ending}"
    result.save(path)
    assert not list(tmp_path.glob("*.pt2"))
    with pytest.raises(InputError, match=r"a file may name any code.*trust_code=True"):
        clafusion.load(path)
    loaded = clafusion.load(path, trust_code=True)
    assert isinstance(loaded, Net)
    assert same(loaded, result)


def test_what_nobody_knows_how_to_build_comes_back_as_a_program(tmp_path):
    result = clafusion.fuse([mlp(6, 9, 8, 3), mlp(6, 12, 3)], INPUTS, target=Deeper(width="wide"))
    result.save(tmp_path / "fused.safetensors")
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "fused.pt2",
        "fused.safetensors",
        "fused.safetensors.json",
    ]
    loaded = clafusion.load(tmp_path / "fused.safetensors")
    assert same(loaded, result)
    assert loaded(INPUTS[:1]).shape == (1, 3)


def test_a_union_comes_back_as_a_program(tmp_path):
    models = [vgg(2, 1), vgg(1, 2, seed=1)]
    images = torch.randn(60, 3, 8, 8)
    result = clafusion.fuse(models, images, calibration="none", verify=False)
    depths = [len(one.traced.layers) for one in result.aligned.profiles]
    assert len(result.problem.target.layers) > max(depths)
    result.save(tmp_path / "union.pt")
    loaded = clafusion.load(tmp_path / "union.pt")
    assert torch.allclose(loaded(images), result.model(images), atol=1e-5)


def test_a_template_comes_back_by_its_factory_or_as_a_program(tmp_path, files):
    models = [one.load() for one in files]
    template = clafusion.load(f"{__name__}:Net(6, 10, 11, 3)")
    result = clafusion.fuse(models, INPUTS, target=Like(template), calibration="none")
    result.save(tmp_path / "like.pt2")
    assert same(clafusion.load(tmp_path / "like.pt2"), result)
    result.save(tmp_path / "like.safetensors")
    assert same(clafusion.load(tmp_path / "like.safetensors", trust_code=True), result)


def test_the_record_says_where_a_result_comes_from(files, tmp_path):
    named = {"deep": files[0].load(), "<wide>": files[1].load()}
    result = clafusion.fuse(named, INPUTS, [3, 1], calibration="repair")
    path = tmp_path / "fused.safetensors"
    result.save(path, command="clafusion fuse ...")
    record = json.loads((tmp_path / "fused.safetensors.json").read_text())
    assert record["architecture"] == {
        "kind": "factory",
        "factory": files[0].factory,
        "resized": False,
    }
    assert [(one["name"], one["weight"]) for one in record["parents"]] == [
        ("deep", 0.75),
        ("<wide>", 0.25),
    ]
    assert record["parents"][1]["factory"] == files[1].factory
    assert record["parents"][1]["file"] == str(files[1].path)
    assert len(record["parents"][0]["sha256"]) == 64
    assert record["data"] == result.data_hash
    assert record["settings"] == result.config.to_dict()
    assert record["taken"] == result.taken
    assert record["assessment"] == result.assessment.to_dict()
    assert record["command"] == "clafusion fuse ..."
    assert record["seconds"].keys() == result.timings.keys()
    with safe_open(path, "pt") as file:
        own = json.loads(file.metadata()["clafusion"])
    assert own == {name: record[name] for name in own}
    assert "seconds" not in own


def test_the_record_says_what_was_taken_where_options_leave_a_choice(tmp_path):
    models = [mlp(6, 9, 8, 3), mlp(6, 7, 3, seed=1), mlp(6, 5, 3, seed=2)]
    inputs = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    strategy = {"strategy": "iterative"}
    result = clafusion.fuse(models, inputs, merging=strategy)
    result.save(tmp_path / "fused.pt2")
    taken = read_record(tmp_path / "fused.pt2")["taken"]
    assert taken["calibration"] == "least_squares"
    assert taken["strategy"] == "iterative"
    assert taken["combination"] == result.combination.to_dict()
    assert taken["leans"] == [{"anchor": one.anchor, "toward": one.toward} for one in result.steps]
    shown = taken_facts(taken)
    assert shown["calibration"].startswith("least_squares; step 1, anchor ")
    assert shown["together"] == f"the parents put out {result.combination}"
    of_two = clafusion.fuse(models[:2], inputs, merging=strategy, matching={"solver": "zip"})
    assert (of_two.taken["calibration"], of_two.taken["strategy"]) == ("repair", "many_to_one")
    assert of_two.to_dict().items() >= of_two.taken.items()
    merged = clafusion.merge(models[0], models[:1], inputs, calibration="auto")
    merged.save(tmp_path / "merged.pt2")
    taken = read_record(tmp_path / "merged.pt2")["taken"]
    assert taken == {"calibration": "least_squares", "by_task": False}
    both = clafusion.fuse(models[:2], inputs, outputs="both", calibration="none")
    both.save(tmp_path / "both.pt2")
    assert read_record(tmp_path / "both.pt2")["taken"] == both.taken
    assert taken_facts(both.taken)["shared"].startswith("up to models[0] ")


def test_a_file_alone_has_its_record_and_the_same_bytes_each_time(files, tmp_path):
    models = [one.load() for one in files]
    written = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        clafusion.fuse(models, INPUTS, calibration="none").save(path, command=name)
        (tmp_path / f"{name}.safetensors.json").unlink()
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert isinstance(clafusion.load(path, trust_code=True), Net)


def test_a_library_factory_needs_no_trust_and_other_code_does(tmp_path, files):
    result = clafusion.fuse([one.load() for one in files], INPUTS, calibration="none")
    path = tmp_path / "fused.safetensors"
    result.save(path)
    record = tmp_path / "fused.safetensors.json"
    facts = json.loads(record.read_text())
    for factory in ("os:system('touch ran')", "timm:create_model('x', evil=1)"):
        facts["architecture"]["factory"] = factory
        record.write_text(json.dumps(facts))
        with pytest.raises(InputError, match="a file may name any code"):
            clafusion.load(path)
    facts["architecture"] = {"kind": "transformers", "transformers": "AutoModel", "config": {}}
    record.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="transformers has no network 'AutoModel'"):
        clafusion.load(path)


def test_weights_that_do_not_fit_their_record_are_refused(tmp_path, files):
    result = clafusion.fuse([one.load() for one in files], INPUTS, calibration="none")
    path = tmp_path / "fused.safetensors"
    result.save(path)
    text = (tmp_path / "fused.safetensors.json").read_text()
    (tmp_path / "fused.safetensors.json").write_text(text.replace("(6, 9, 8, 3)", "(6, 9, 3)"))
    with pytest.raises(InputError, match="does not fit"):
        clafusion.load(path, trust_code=True)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("place", ["sample inputs", "weights", "extra", "twice"])
def test_a_program_with_objects_in_it_is_refused_and_nothing_runs(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    result = clafusion.fuse([mlp(6, 9, 3), mlp(6, 12, 3)], INPUTS, calibration="none")
    result.save("fused.pt2")
    with zipfile.ZipFile("fused.pt2") as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    evil = io.BytesIO()
    torch.save(Evil(), evil)
    (sample,) = [one for one in entries if "sample_inputs" in one]
    (config,) = [one for one in entries if one.endswith("_weights_config.json")]
    if place == "sample inputs":
        entries[sample] = evil.getvalue()
    elif place == "weights":
        facts = json.loads(entries[config])
        payload = next(iter(facts["config"].values()))
        payload["use_pickle"] = True
        entries[config] = json.dumps(facts).encode()
        entries[f"{config.rpartition('/')[0]}/{payload['path_name']}"] = evil.getvalue()
    elif place == "extra":
        entries[f"{sample.partition('/')[0]}/data/constants/opaque_obj_0"] = pickle.dumps(Evil())
    with zipfile.ZipFile("bad.pt2", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        if place == "twice":
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(sample, evil.getvalue())
    with pytest.raises(InputError, match="holds more than a graph and tensors"):
        clafusion.load("bad.pt2")
    assert not Path("ran").exists()


def test_options_that_a_program_has_no_use_for_are_refused(tmp_path):
    result = clafusion.fuse([mlp(6, 9, 3), mlp(6, 12, 3)], INPUTS, calibration="none")
    with pytest.raises(InputError, match="dtype='float16' is for files of weights"):
        result.save(tmp_path / "a.pt2", dtype="float16")
    with pytest.raises(InputError, match="does not exist; create it"):
        result.save(tmp_path / "none" / "a.safetensors")
