"""What a pair's result says beside its weights: sizes, hashes, settings, memory."""

import itertools
import json

import torch

import clafusion
from clafusion import Deeper, FusionConfig
from clafusion.batch.run import fuse_pairs
from clafusion.interop.records import read_record
from clafusion.weights.state_files import file_digest
from tests.support.many_pairs import DATA, SETTINGS, WIDTHS, lines, modules

PAIRS = [("a", "c")]
NEW = ("peak_memory", "parameters", "operations", "resized", "models", "settings", "taken")


def products(widths):
    return 2 * sum(one * other for one, other in itertools.pairwise(widths))


def parameters(widths):
    return products(widths) // 2 + sum(widths[1:])


def facts(one):
    return one.parameters, one.operations, one.resized, one.models, one.settings, one.factory


def test_sizes_hashes_and_settings_are_kept(files, tmp_path):
    out = tmp_path / "out"
    (one,) = fuse_pairs(files, DATA, PAIRS, out_dir=out, **SETTINGS)
    assert (one.parameters, one.operations) == (parameters(WIDTHS["c"]), products(WIDTHS["c"]))
    for name, found in one.models.items():
        assert found.parameters == parameters(WIDTHS[name])
        assert found.operations == products(WIDTHS[name])
        assert found.sha256 == file_digest(tmp_path / f"{name}.safetensors")
        assert found.source == f"{files[name].factory}, {files[name].path}"
    assert one.settings == json.loads(json.dumps(FusionConfig(**SETTINGS).to_dict()))
    assert not one.resized
    assert one.peak_memory.keys() == one.seconds.keys()
    assert min(one.peak_memory.values()) > 1e7
    alone = clafusion.fuse([files["a"], files["c"]], DATA, **SETTINGS)
    assert one.taken == json.loads(json.dumps(alone.taken)) | {"toward": one.taken["toward"]}
    assert read_record(one.path)["taken"] == one.taken
    loaded = clafusion.load(one.factory, one.path)
    assert torch.equal(loaded(DATA), one.model(DATA))
    (again,) = fuse_pairs(files, DATA, PAIRS, out_dir=out, **SETTINGS)
    assert again.resumed
    assert facts(again) == facts(one)
    assert (again.peak_memory, again.taken) == (one.peak_memory, one.taken)


def test_of_modules_and_of_other_widths(tmp_path):
    models = modules()
    (one,) = fuse_pairs(models, DATA, PAIRS, target=Deeper(width="wide"), **SETTINGS)
    wide = (12, 9, 9, 9, 5)  # layers that a lacks have its widths, too
    assert one.resized
    assert one.factory is None
    assert (one.parameters, one.operations) == (parameters(wide), products(wide))
    assert one.models["a"].source == "a module of class Sequential"
    others = fuse_pairs(models, DATA, [("a", "b")], out_dir=tmp_path, **SETTINGS)
    assert next(others).models["a"].sha256 == one.models["a"].sha256
    assert one.models["a"].sha256 != one.models["c"].sha256


def test_a_failed_pair_says_which_models_and_settings_it_was_made_of(files, tmp_path):
    (tmp_path / "a.safetensors").unlink()
    (one,) = fuse_pairs(files, DATA, PAIRS, out_dir=tmp_path / "out", **SETTINGS)
    assert one.error is not None
    assert one.models["a"].sha256 is None
    assert one.models["c"].sha256 == file_digest(tmp_path / "c.safetensors")
    assert one.models["c"].operations is None
    assert one.settings["calibration"]
    assert (one.parameters, one.operations, one.peak_memory) == (None, None, {})


def test_lines_of_earlier_versions_are_taken_over(files, tmp_path):
    (one,) = fuse_pairs(files, DATA, PAIRS, out_dir=tmp_path / "out", **SETTINGS)
    (line,) = lines(tmp_path / "out")
    (tmp_path / "out" / "results.jsonl").write_text(
        json.dumps({name: value for name, value in line.items() if name not in NEW}) + "\n"
    )
    (again,) = fuse_pairs(files, DATA, PAIRS, out_dir=tmp_path / "out", **SETTINGS)
    assert again.resumed
    assert facts(again) == (None, None, False, {}, {}, one.factory)
    assert again.taken == {}
    assert again.assessment == one.assessment
