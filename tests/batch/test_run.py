"""Many pairs: the bytes that `fuse` gives, what fails, what is kept, and the memory it takes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clafusion import (
    Deeper,
    InputError,
    LeastSquares,
    Like,
    Matching,
    Merging,
    ModelFile,
    Shallower,
    fuse,
)
from clafusion.batch import store as store_module
from clafusion.batch import worker as worker_module
from clafusion.batch.prepared import prepare
from clafusion.batch.run import fuse_pairs
from clafusion.batch.scheduler import Scheduler, split_into_tasks
from clafusion.batch.worker import Worker
from clafusion.weights.state_files import save_model, stored_content
from tests.support import networks
from tests.support.many_pairs import (
    DATA,
    FACTORY,
    SETTINGS,
    WIDTHS,
    assert_as_fused,
    lines,
    modules,
)
from tests.support.preparations import count_preparations


def test_all_pairs_are_as_fused_one_by_one_and_each_model_is_prepared_once(expected, monkeypatch):
    made = count_preparations(monkeypatch)
    assert_as_fused(fuse_pairs(modules(), DATA, **SETTINGS), expected)
    assert sorted(made) == [("a", False), ("b", False), ("c", False), ("d", False)]


@pytest.mark.parametrize("calibration", ["none", "batchnorm", "least_squares", "repair"])
def test_residual_networks_are_as_fused_one_by_one(calibration):
    models = {
        "deep": networks.resnet(2, 3),
        "shallow": networks.resnet(1, 2, widths=(6, 12), seed=1).train(),
    }
    data = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {**SETTINGS, "calibration": calibration, "weights": [0.7, 0.3]}
    wanted = fuse([models["shallow"], models["deep"]], data, **settings)
    pairs = [("shallow", "deep")]
    (found,) = fuse_pairs(models, data, pairs, **settings)
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(found.state[name], tensor), name
    assert found.model.training == wanted.model.training


@pytest.mark.parametrize(
    "settings",
    [
        {"target": Shallower(), "calibration": "least_squares"},
        {"target": Deeper(width="wide")},
        {"target": Shallower(width="narrow")},
        {"calibration": LeastSquares(anchor=0.2)},
        {"matching": Matching(importance="norm")},
        {"merging": Merging(layer_weights="sensitivity"), "calibration": "least_squares"},
        {"merging": Merging(layer_weights="sensitivity"), "target": Deeper(width="wide")},
        {"merging": "barycentre"},
        {"merging": "iterative", "target": Deeper(width=1)},
    ],
)
def test_other_depths_and_widths_are_as_fused_one_by_one(settings):
    models = {"a": networks.mlp(12, 9, 8, 7, 5), "b": networks.mlp(12, 30, 20, 5, seed=1)}
    wanted = fuse([models["a"], models["b"]], DATA, **SETTINGS, **settings)
    (found,) = fuse_pairs(models, DATA, **SETTINGS, **settings)
    assert found.error is None
    assert torch.equal(found.model(DATA), wanted.model(DATA))
    assert found.structure == ("b" if isinstance(settings.get("target"), Shallower) else "a")
    assert [one.weight.shape for one in found.model if hasattr(one, "weight")] == [
        one.weight.shape for one in wanted.model if hasattr(one, "weight")
    ]


def test_lazily_loaded_models_and_batches_of_data(files, expected, tmp_path):
    batches = [(x, 0) for x in DATA.split(256)]
    results = fuse_pairs(files, batches, out_dir=tmp_path / "out", **SETTINGS)
    assert_as_fused(results, expected)
    for (first, second), wanted in expected.items():
        name = f"{first}+{second}.safetensors"
        written, alone = stored_content(tmp_path / "out" / name), wanted.model.state_dict()
        assert written.keys() == alone.keys()
        assert all(torch.equal(written[one], value) for one, value in alone.items())
    assert [(one["first"], one["second"]) for one in lines(tmp_path / "out")] == list(expected)


# --- failures -----------------------------------------------------------------------------------


def test_a_failure_is_told_and_the_rest_goes_on(expected, tmp_path, monkeypatch):
    models = {**modules(), "t": networks.mlp(12, 6, 5, activation=torch.nn.Tanh)}
    models["n"] = networks.mlp(12, 6, 5)
    with torch.no_grad():
        models["n"][0].weight[0, 0] = float("nan")
    models["gone"] = ModelFile("nowhere:make", tmp_path / "gone.pt")
    made = count_preparations(monkeypatch)
    results = {
        (one.first, one.second): one
        for one in fuse_pairs(models, DATA, out_dir=tmp_path / "out", **SETTINGS)
    }
    assert len(results) == 21
    failed = {pair: one for pair, one in results.items() if one.error is not None}
    assert set(failed) == {pair for pair in results if {"t", "n", "gone"} & set(pair)}
    assert "StructureError" in failed["b", "t"].error
    assert "InputError: models['n']: " in failed["a", "n"].error
    assert "NaN" in failed["n", "gone"].error
    assert "gone.pt' does not exist" in failed["a", "gone"].error
    assert failed["a", "n"].alignment is None
    with pytest.raises(
        InputError,
        match=r"models\['a'\] and models\['n'\] were not fused: InputError: models\['n'\]",
    ):
        _ = failed["a", "n"].model
    assert len(made) == 5
    assert_as_fused((one for pair, one in results.items() if pair in expected), expected)
    # Failed pairs are tried again, the others are not.
    monkeypatch.undo()
    models["n"] = networks.mlp(12, 6, 5)
    again = list(fuse_pairs(models, DATA, out_dir=tmp_path / "out", **SETTINGS))
    assert {(one.first, one.second) for one in again if one.error is None} == set(expected) | {
        (name, "n") for name in WIDTHS
    }
    assert [one.resumed for one in again] == [(one.first, one.second) in expected for one in again]
    assert len(lines(tmp_path / "out")) == 21


BAD = {
    "models": ({"models": [1]}, "models must be a mapping"),
    "name": ({"models": {"a/b": networks.mlp(3, 2)}}, "the name 'a/b' is not possible"),
    "model": ({"models": {"a": 1}}, "models\\['a'\\] must be a torch.nn.Module or"),
    "unknown": ({"pairs": [("a", "z")]}, "pairs\\[0\\] names 'z'"),
    "twice": ({"pairs": [("a", "b"), ("a", "b")]}, "is there twice"),
    "no pair": ({"pairs": ["ab"]}, "pairs\\[0\\] must be two names; got 'ab'"),
    "some": ({"pairs": "some"}, "pairs must be 'all'"),
    "executor": ({"executor": "dask"}, "executor must be None"),
    "no process": ({"executor": 0}, "executor must be at least 1"),
    "memory": ({"memory_limit": -1}, "memory_limit must be a positive number"),
    "weight": ({"weights": [2, -1]}, "weights\\[1\\] must be a number of at least 0; got -1"),
    "number of weights": ({"weights": [1, 1, 1]}, "one entry for each model, 2; got 3"),
    "weights by name": ({"weights": {"a": 1}}, "weights must be two numbers"),
    "option": ({"calibration": "magic"}, "calibration must be one of"),
    "flat option": ({"pin_ends": True}, "'pin_ends' is no option of its own; it is alignment"),
    "template": ({"target": Like(networks.mlp(12, 5))}, "does not take the target 'like'"),
    "data": ({"data": []}, "data is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_at_once(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message):
        fuse_pairs(**{"models": modules(), "data": DATA, **arguments})


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out_dir .* cannot be made a directory"):
        fuse_pairs(modules(), DATA, out_dir=tmp_path / "file")


# --- resuming -----------------------------------------------------------------------------------


def test_results_are_not_written_over_a_models_file(files, tmp_path):
    taken = tmp_path / "b+c.safetensors"
    taken.write_bytes(Path(files["a"].path).read_bytes())
    models = {**files, "a": replace(files["a"], path=taken)}
    with pytest.raises(InputError, match=r"models\['a'\].* would be written over"):
        list(fuse_pairs(models, DATA, out_dir=tmp_path))
    assert taken.read_bytes() == Path(files["a"].path).read_bytes()


def test_what_is_whole_is_kept_and_what_is_not_is_done_again(expected, tmp_path, monkeypatch):
    list(fuse_pairs(modules(), DATA, out_dir=tmp_path, **SETTINGS))
    made = count_preparations(monkeypatch)
    results = list(fuse_pairs(modules(), DATA, out_dir=tmp_path, **SETTINGS))
    assert all(one.resumed for one in results)
    assert made == []
    assert_as_fused(results, expected)
    # a corrupt file, a missing one, a line cut short
    corrupt = tmp_path / "a+b.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-1] + b"\xff")
    (tmp_path / "b+c.safetensors").unlink()
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text[: len(text) - 40])
    results = list(fuse_pairs(modules(), DATA, out_dir=tmp_path, **SETTINGS))
    again = [(one.first, one.second) for one in results if not one.resumed]
    assert again == [("a", "b"), ("b", "c"), ("c", "d")]
    assert_as_fused(results, expected)
    assert len(lines(tmp_path)) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", 3),
        ("deep_layers", [1]),
        ("warnings", [None]),
        ("structure", []),
        ("deep", "z"),
        ("alignment", {"cost": []}),
    ],
)
def test_a_line_of_another_form_is_done_again(tmp_path, name, value):
    models = {name: modules()[name] for name in "ab"}
    list(fuse_pairs(models, DATA, out_dir=tmp_path, **SETTINGS))
    (line,) = lines(tmp_path)
    (tmp_path / "results.jsonl").write_text(json.dumps({**line, name: value}) + "\n")
    (result,) = fuse_pairs(models, DATA, out_dir=tmp_path, **SETTINGS)
    assert not result.resumed
    assert (result.error, len(lines(tmp_path))) == (None, 1)


def test_a_directory_in_place_of_the_results_is_refused(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(InputError, match=r"out_dir: .*results\.jsonl' cannot be read"):
        fuse_pairs(modules(), DATA, out_dir=tmp_path)


def test_results_that_can_no_longer_be_written_are_told(tmp_path, monkeypatch):
    run = fuse_pairs(modules(), DATA, out_dir=tmp_path, **SETTINGS)
    next(run)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        next(run)


def test_names_that_are_too_long_for_a_file_are_refused(tmp_path):
    longest = 241 - len(".01234567")  # which other settings add
    model, other = modules()["a"], "b" * (longest - len("a+.safetensors"))
    fuse_pairs({"a": model, other: model}, DATA, out_dir=tmp_path)
    with pytest.raises(InputError, match="too long for a file's name"):
        fuse_pairs({"a": model, other + "b": model}, DATA, out_dir=tmp_path)


def changed_weights():
    models = modules()
    with torch.no_grad():
        models["a"][0].weight[0, 0] += 1
    return {"models": models}


class Scaled(torch.nn.Sequential):
    """Its representation does not show the factor."""

    factor = 1.0

    def forward(self, x):
        return super().forward(self.factor * x)


def scaled(factor, seed):
    model = Scaled(*networks.mlp(*WIDTHS["b"], seed=seed))
    model.factor = factor
    return model


STALE = {  # what changes, how many pairs are fused again, and how many results are kept
    "settings": (lambda: {"weights": [0.6, 0.4]}, 6, 12),
    "options": (lambda: {"matching": Matching(cost="euclidean")}, 6, 12),
    "data": (lambda: {"data": DATA + 1}, 6, 6),
    "weights": (changed_weights, 3, 6),
    "asked for": (lambda: {"resume": False}, 6, 6),
}


@pytest.mark.parametrize("name", STALE)
def test_stale_results_are_done_again(tmp_path, name):
    list(fuse_pairs(modules(), DATA, out_dir=tmp_path, **SETTINGS))
    change, again, kept = STALE[name]
    given = {"models": modules(), "data": DATA, "out_dir": tmp_path, **SETTINGS, **change()}
    assert sum(not one.resumed for one in fuse_pairs(**given)) == again
    assert len(lines(tmp_path)) == kept


def test_results_of_other_attributes_are_done_again(tmp_path):
    for factor, is_kept in ((2.0, False), (2.0, True), (3.0, False)):
        models = {"a": scaled(factor, 0), "b": scaled(factor, 1)}
        (result,) = fuse_pairs(models, DATA, out_dir=tmp_path, **SETTINGS)
        assert result.resumed == is_kept


@pytest.mark.parametrize("named", ["file", "module"])
def test_results_of_other_code_are_done_again(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = tmp_path / f"code_{named}.py"
    code.write_text(FACTORY)
    factory = code.name if named == "file" else code.stem
    models = {}
    for name, widths in (("a", WIDTHS["a"]), ("b", WIDTHS["b"])):
        save_model(modules()[name], tmp_path / f"{name}.pt")
        models[name] = ModelFile(f"{factory}:mlp{widths}", tmp_path / f"{name}.pt")
    for is_kept in (False, True, False):
        (result,) = fuse_pairs(models, DATA, out_dir=tmp_path, **SETTINGS)
        assert result.error is None
        assert result.resumed == is_kept
        if is_kept:
            code.write_text(FACTORY.replace("ReLU", "Tanh"))


def test_other_pairs_in_the_directory_stay(tmp_path):
    list(fuse_pairs(modules(), DATA, [("a", "b")], out_dir=tmp_path, **SETTINGS))
    list(fuse_pairs(modules(), DATA, [("b", "a")], out_dir=tmp_path, **SETTINGS))
    assert [one["first"] for one in lines(tmp_path)] == ["a", "b"]


# --- memory -------------------------------------------------------------------------------------


def test_memory_stays_within_the_limit_and_the_results_in_order(
    files, expected, tmp_path, monkeypatch
):
    sizes = []

    def watched(name, *arguments, **keywords):
        found = prepare(name, *arguments, **keywords)
        sizes.append(found.num_bytes)
        return found

    monkeypatch.setattr(worker_module, "prepare", watched)
    list(fuse_pairs(files, DATA, **SETTINGS))
    assert len(sizes) == 4
    limit = sum(sorted(sizes)[-2:])
    taken = []
    measure = Worker._check_limit

    def check(self, pair):
        measure(self, pair)
        taken.append(self._num_bytes())

    fuse_pair = Worker._fuse

    def fused(self, *arguments):
        result = fuse_pair(self, *arguments)
        taken.append(self._num_bytes())
        kept.append(self._known_outputs.num_bytes)
        return result

    kept = []
    monkeypatch.setattr(Worker, "_check_limit", check)
    monkeypatch.setattr(Worker, "_fuse", fused)
    for folder in (tmp_path / "out", None):
        taken.clear()
        sizes.clear()
        results = fuse_pairs(files, DATA, out_dir=folder, memory_limit=limit, **SETTINGS)
        assert_as_fused(results, expected)
        assert max(taken) <= limit
        assert len(sizes) > 4  # some were freed and prepared again
    list(fuse_pairs(files, DATA, [("a", "b"), ("b", "c")], memory_limit=10 * limit, **SETTINGS))
    assert max(kept) > 0  # outputs are kept, where there is room
    (tight,) = fuse_pairs(files, DATA, [("a", "b")], memory_limit=1000, **SETTINGS)
    assert "memory_limit is 1,000 bytes, but" in tight.error


def test_models_are_freed_after_their_last_use(monkeypatch):
    held = []
    fuse_pair = Worker.fuse

    def watched(self, pair, source):
        held.append(sorted(self.prepared))
        return fuse_pair(self, pair, source)

    monkeypatch.setattr(Worker, "fuse", watched)
    list(fuse_pairs(modules(), DATA, [("a", "b"), ("a", "c"), ("c", "d")], **SETTINGS))
    assert held == [[], ["a"], ["c"]]


def test_the_order_brings_few_models_in_twice():
    names = [f"m{i}" for i in range(24)]
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    scheduler = Scheduler(pairs)
    at_hand, loads = {}, 0
    while scheduler.left:
        pair = scheduler.next(at_hand)
        for name in pair:
            if name not in at_hand:
                loads += 1
                if len(at_hand) == 6:
                    del at_hand[next(one for one in reversed(at_hand) if one not in pair)]
                at_hand[name] = None
        for name in scheduler.done(pair):
            del at_hand[name]
    # Five stay while all others pass: 24 + 19 + 14 + 9 + 4. In the given order it would be 200.
    assert loads <= 80
    tasks = split_into_tasks(pairs)
    assert sorted(pair for task in tasks for pair in task) == sorted(pairs)
    assert max(map(len, tasks)) == 4
