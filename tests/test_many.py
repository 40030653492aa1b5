"""Many pairs: the bytes that `fuse` gives, however they are interrupted, cached and shipped."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clafusion import (
    ClafusionError,
    GraphVerificationError,
    InputError,
    ModelFile,
    fuse,
    fuse_many,
    pipeline,
    profile,
)
from clafusion import many as many_module
from clafusion import prepared as prepared_module
from clafusion.batch.prepared import prepare
from clafusion.tracing.trace import architecture
from clafusion.weights.digests import structure_digest
from clafusion.weights.files import save_model
from tests import networks

FACTORY = """
from torch import nn

def mlp(*widths):
    layers = []
    for into, out in zip(widths, widths[1:]):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
"""
WIDTHS = {
    "a": (12, 9, 5),
    "b": (12, 9, 8, 5),
    "c": (12, 7, 8, 6, 5),
    "d": (12, 9, 8, 7, 6, 5),
}
DATA = torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
SETTINGS = {"alignment_samples": 100, "matching_rows": 200}


def modules():
    return {name: networks.mlp(*widths, seed=i) for i, (name, widths) in enumerate(WIDTHS.items())}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY)
    found = {}
    for name, model in modules().items():
        save_model(model, tmp_path / f"{name}.safetensors")
        factory = f"{tmp_path}/nets.py:mlp{WIDTHS[name]}"
        found[name] = ModelFile(factory, tmp_path / f"{name}.safetensors")
    return found


@pytest.fixture(scope="module")
def expected():
    models = modules()
    names = list(models)
    return {
        (one, other): fuse(models[one], models[other], DATA, **SETTINGS)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    }


def assert_as_fused(results, expected):
    results = list(results)
    assert [(one.first, one.second) for one in results] == list(expected)
    for one in results:
        assert one.error is None
        wanted = expected[one.first, one.second]
        state = wanted.model.state_dict()
        assert one.state.keys() == state.keys()
        assert all(torch.equal(one.state[name], tensor) for name, tensor in state.items())
        assert one.alignment.deep_to_shallow == wanted.alignment.deep_to_shallow
        assert (one.alignment.cost == wanted.alignment.cost).all()
        assert one.alignment.total_cost == wanted.alignment.total_cost
        assert one.deep == (one.first if wanted.pair.deep_is_first else one.second)
        assert torch.equal(one.model(DATA), wanted.model(DATA))


def count_preparations(monkeypatch):
    made = []

    def counted(name, *arguments, **keywords):
        found = prepare(name, *arguments, **keywords)
        made.append((name, found.from_cache))
        return found

    monkeypatch.setattr(many_module, "prepare", counted)
    return made


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# --- the same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda seed: networks.mlp(12, 9, 8, 5, seed=seed), (12,)),
        (lambda seed: networks.vgg(2, 1, seed=seed), (3, 8, 8)),
        (lambda seed: networks.resnet(2, 1, seed=seed), (3, 8, 8)),
    ],
)
def test_signatures_made_alone_are_those_made_together(make, shape):
    first, second = make(0), make(1)
    data = torch.randn(300, *shape, generator=torch.Generator().manual_seed(3))
    pair = fuse(first, second, data, **SETTINGS).pair
    for model, together in ((first, pair.deep), (second, pair.shallow)):
        alone = profile(model, data, **SETTINGS)
        assert alone.data_key == together.data_key
        assert all(map(torch.equal, alone.grams, together.grams))
        assert alone.rows.keys() == together.rows.keys()
        assert all(torch.equal(rows, together.rows[key]) for key, rows in alone.rows.items())


def test_all_pairs_are_as_fused_one_by_one_and_each_model_is_made_ready_once(expected, monkeypatch):
    made = count_preparations(monkeypatch)
    assert_as_fused(fuse_many(modules(), DATA, **SETTINGS), expected)
    assert sorted(made) == [("'a'", False), ("'b'", False), ("'c'", False), ("'d'", False)]


@pytest.mark.parametrize("calibration", ["none", "batchnorm", "least_squares", "repair"])
def test_residual_networks_are_as_fused_one_by_one(calibration):
    models = {
        "deep": networks.resnet(2, 3),
        "shallow": networks.resnet(1, 2, widths=(6, 12), seed=1).train(),
    }
    data = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {**SETTINGS, "calibration": calibration, "weight": 0.3}
    wanted = fuse(models["shallow"], models["deep"], data, **settings)
    pairs = [("shallow", "deep")]
    (found,) = fuse_many(models, data, pairs, **settings)
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(found.state[name], tensor), name
    assert found.model.training == wanted.model.training


@pytest.mark.parametrize(
    "settings",
    [
        {"balance": "merge", "calibration": "least_squares"},
        {"width": "wide"},
        {"balance": "merge", "width": "narrow"},
        {"lean": 0.2, "calibration": "least_squares"},
        {"importance": "norm"},
        {"layer_weights": "sensitivity", "calibration": "least_squares"},
        {"layer_weights": "sensitivity", "width": "wide"},
    ],
)
def test_other_depths_and_widths_are_as_fused_one_by_one(settings):
    models = {"a": networks.mlp(12, 9, 8, 7, 5), "b": networks.mlp(12, 30, 20, 5, seed=1)}
    wanted = fuse(models["a"], models["b"], DATA, **SETTINGS, **settings)
    (found,) = fuse_many(models, DATA, **SETTINGS, **settings)
    assert found.error is None
    assert torch.equal(found.model(DATA), wanted.model(DATA))
    assert found.structure == ("b" if "balance" in settings else "a")
    assert [one.weight.shape for one in found.model if hasattr(one, "weight")] == [
        one.weight.shape for one in wanted.model if hasattr(one, "weight")
    ]


def test_lazily_loaded_models_and_batches_of_data(files, expected, tmp_path):
    batches = [(x, 0) for x in DATA.split(256)]
    results = fuse_many(files, batches, out_dir=tmp_path / "out", **SETTINGS)
    assert_as_fused(results, expected)
    for (first, second), wanted in expected.items():
        name = f"{first}+{second}.safetensors"
        save_model(wanted.model, tmp_path / "alone.safetensors")
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "alone.safetensors"
        ).read_bytes()
    assert [(one["first"], one["second"]) for one in lines(tmp_path / "out")] == list(expected)


# --- one trace for all models of an architecture ------------------------------------------------


def count_traces(monkeypatch):
    made = []

    def counted(name, *arguments):
        made.append(name)
        return pipeline.traced_to_fuse(name, *arguments)

    monkeypatch.setattr(prepared_module, "traced_to_fuse", counted)
    return made


def test_models_of_one_architecture_share_a_trace(monkeypatch):
    models = {
        "a": networks.resnet(1, 2),
        "b": networks.resnet(1, 2, seed=1),
        "c": networks.resnet(2, 2, seed=2),
        "d": networks.resnet(1, 2, seed=3),
    }
    models["d"].register_forward_hook(lambda *_: None)
    data = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    made = count_traces(monkeypatch)
    for one in fuse_many(models, data, **SETTINGS):
        assert one.error is None
        wanted = fuse(models[one.first], models[one.second], data, **SETTINGS).model.state_dict()
        assert all(torch.equal(one.state[name], tensor) for name, tensor in wanted.items())
    assert made == ["'a'", "'c'", "'d'"]


def test_a_model_that_shares_a_trace_is_checked_on_its_own():
    class Gated(torch.nn.Module):
        """Its gate is a constant of the class, which no attribute of an instance tells."""

        gate = 0.0

        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(12, 9), torch.nn.Linear(9, 5)

        def forward(self, x):
            ramp = torch.arange(9.0) * type(self).gate
            return self.two(torch.relu(self.one(x)) + ramp)

    known = {}
    settings = {"data_hash": "", "known": known}
    config = pipeline.FusionConfig(alignment_samples=100, matching_rows=200)
    prepare("first", Gated(), DATA, DATA, config, **settings)
    assert len(known) == 1
    Gated.gate = 1.0
    with pytest.raises(GraphVerificationError, match="traced graph computes something else"):
        prepare("second", Gated(), DATA, DATA, config, **settings)
    broken = Gated()
    with torch.no_grad():
        broken.one.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"the third model: parameter 'one\.bias' holds 1 NaN"):
        prepare("third", broken, DATA, DATA, config, **settings)
    assert len(known) == 1


class _Plain(torch.nn.Module):
    def __init__(self, slope=1.0, mask=1.0, tied=False, function=torch.relu):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.slope, self.function = slope, function
        self.register_buffer("mask", torch.full((6,), mask))
        if tied:
            self.two.weight = self.one.weight


def test_an_architecture_is_all_that_an_export_can_depend_on():
    plain = architecture(_Plain())
    assert plain is not None
    other = _Plain()
    with torch.no_grad():
        other.one.weight.add_(1.0)
        other.norm.running_mean.add_(1.0)
    assert architecture(other) == plain
    for change in (
        {"slope": 2.0},
        {"slope": 1},
        {"mask": 0.0},
        {"tied": True},
        {"function": torch.tanh},
    ):
        assert architecture(_Plain(**change)) not in (plain, None)
    assert architecture(_Plain().train(False)) != plain
    assert architecture(_Plain().double()) != plain
    hooked = _Plain()
    hooked.one.register_forward_pre_hook(lambda *_: None)
    for opaque in (hooked, _Plain(slope=object()), _Plain(slope=torch.ones(1))):
        assert architecture(opaque) is None


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
        for one in fuse_many(models, DATA, out_dir=tmp_path / "out", **SETTINGS)
    }
    assert len(results) == 21
    failed = {pair: one for pair, one in results.items() if one.error is not None}
    assert set(failed) == {pair for pair in results if {"t", "n", "gone"} & set(pair)}
    assert "StructureError" in failed["b", "t"].error
    assert "model 'n': InputError" in failed["a", "n"].error
    assert "NaN" in failed["n", "gone"].error
    assert "gone.pt' does not exist" in failed["a", "gone"].error
    assert failed["a", "n"].alignment is None
    with pytest.raises(InputError, match="'a' and 'n' were not fused: model 'n'"):
        _ = failed["a", "n"].model
    assert len(made) == 5
    assert_as_fused((one for pair, one in results.items() if pair in expected), expected)
    # Failed pairs are tried again, the others are not.
    monkeypatch.undo()
    models["n"] = networks.mlp(12, 6, 5)
    again = list(fuse_many(models, DATA, out_dir=tmp_path / "out", **SETTINGS))
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
    "setting": ({"weight": 2}, "weight must be in"),
    "data": ({"data": []}, "data is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_at_once(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message):
        fuse_many(**{"models": modules(), "data": DATA, **arguments})


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out_dir .* cannot be made a directory"):
        fuse_many(modules(), DATA, out_dir=tmp_path / "file")


# --- resuming -----------------------------------------------------------------------------------


def test_results_are_not_written_over_a_models_file(files, tmp_path):
    taken = tmp_path / "b+c.safetensors"
    taken.write_bytes(Path(files["a"].path).read_bytes())
    models = {**files, "a": replace(files["a"], path=taken)}
    with pytest.raises(InputError, match=r"models\['a'\].* would be written over"):
        list(fuse_many(models, DATA, out_dir=tmp_path))
    assert taken.read_bytes() == Path(files["a"].path).read_bytes()


def test_what_is_whole_is_kept_and_what_is_not_is_done_again(expected, tmp_path, monkeypatch):
    list(fuse_many(modules(), DATA, out_dir=tmp_path, **SETTINGS))
    made = count_preparations(monkeypatch)
    results = list(fuse_many(modules(), DATA, out_dir=tmp_path, **SETTINGS))
    assert all(one.resumed for one in results)
    assert made == []
    assert_as_fused(results, expected)
    # a corrupt file, a missing one, a line cut short
    corrupt = tmp_path / "a+b.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-1] + b"\xff")
    (tmp_path / "b+c.safetensors").unlink()
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text[: len(text) - 40])
    results = list(fuse_many(modules(), DATA, out_dir=tmp_path, **SETTINGS))
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
    list(fuse_many(models, DATA, out_dir=tmp_path, **SETTINGS))
    (line,) = lines(tmp_path)
    (tmp_path / "results.jsonl").write_text(json.dumps({**line, name: value}) + "\n")
    (result,) = fuse_many(models, DATA, out_dir=tmp_path, **SETTINGS)
    assert not result.resumed
    assert (result.error, len(lines(tmp_path))) == (None, 1)


def test_a_directory_in_place_of_the_results_is_refused(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(InputError, match=r"out_dir: .*results\.jsonl' cannot be read"):
        fuse_many(modules(), DATA, out_dir=tmp_path)


def test_results_that_can_no_longer_be_written_are_told(tmp_path, monkeypatch):
    run = fuse_many(modules(), DATA, out_dir=tmp_path, **SETTINGS)
    next(run)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(many_module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        next(run)


def test_names_that_are_too_long_for_a_file_are_refused(tmp_path):
    model, other = modules()["a"], "b" * (241 - len("a+.safetensors"))
    fuse_many({"a": model, other: model}, DATA, out_dir=tmp_path)
    with pytest.raises(InputError, match="too long for a file's name"):
        fuse_many({"a": model, other + "b": model}, DATA, out_dir=tmp_path)


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


STALE = {
    "settings": (lambda: {"weight": 0.4}, 6),
    "data": (lambda: {"data": DATA + 1}, 6),
    "weights": (changed_weights, 3),
    "asked for": (lambda: {"resume": False}, 6),
}


@pytest.mark.parametrize("name", STALE)
def test_stale_results_are_done_again(tmp_path, name):
    list(fuse_many(modules(), DATA, out_dir=tmp_path, **SETTINGS))
    change, again = STALE[name]
    given = {"models": modules(), "data": DATA, "out_dir": tmp_path, **SETTINGS, **change()}
    assert sum(not one.resumed for one in fuse_many(**given)) == again
    assert len(lines(tmp_path)) == 6


def test_results_of_other_attributes_are_done_again(tmp_path):
    for factor, is_kept in ((2.0, False), (2.0, True), (3.0, False)):
        models = {"a": scaled(factor, 0), "b": scaled(factor, 1)}
        (result,) = fuse_many(models, DATA, out_dir=tmp_path, **SETTINGS)
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
        (result,) = fuse_many(models, DATA, out_dir=tmp_path, **SETTINGS)
        assert result.error is None
        assert result.resumed == is_kept
        if is_kept:
            code.write_text(FACTORY.replace("ReLU", "Tanh"))


def test_equal_models_have_equal_structure_digests():
    def model(function, factor=2.0):
        made = networks.mlp(12, 9, 5)
        made.function, made.names, made.own = function, {"x", "y", "z"}, made[0]
        made.settings = {"factor": factor, "mask": torch.ones(2)}
        made.register_forward_hook(lambda *_: None)
        return made

    def times(number):
        return lambda x: number * x

    one = structure_digest(model(times(2)))
    assert one == structure_digest(model(times(2)))
    assert one != structure_digest(model(times(3)))
    assert one != structure_digest(model(times(2), 2.5))
    assert one != structure_digest(model(torch.relu))


def test_other_pairs_in_the_directory_stay(tmp_path):
    list(fuse_many(modules(), DATA, [("a", "b")], out_dir=tmp_path, **SETTINGS))
    list(fuse_many(modules(), DATA, [("b", "a")], out_dir=tmp_path, **SETTINGS))
    assert [one["first"] for one in lines(tmp_path)] == ["a", "b"]


# --- profiles on disk -------------------------------------------------------------------------


def test_signatures_are_read_from_disk_and_corrupt_ones_made_again(
    expected, tmp_path, monkeypatch, caplog
):
    made = count_preparations(monkeypatch)
    for _ in range(2):
        results = fuse_many(modules(), DATA, cache_dir=tmp_path, **SETTINGS)
        assert_as_fused(results, expected)
    assert [cached for _, cached in made] == [False] * 4 + [True] * 4
    entries = sorted(tmp_path.iterdir())
    assert len(entries) == 4
    whole = entries[0].read_bytes()
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], b""):
        entries[0].write_bytes(broken)
        made.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "clafusion"):
            assert_as_fused(fuse_many(modules(), DATA, cache_dir=tmp_path, **SETTINGS), expected)
        assert sorted(cached for _, cached in made) == [False, True, True, True]
        assert "is corrupt and is made again" in caplog.text
        assert entries[0].read_bytes() == whole


@pytest.mark.parametrize(
    "settings",
    [
        {"importance": "sensitivity"},
        {"layer_weights": "sensitivity"},
        {"importance": "norm", "layer_weights": "sensitivity"},
    ],
)
def test_masses_and_sensitivities_are_kept_on_disk(tmp_path, monkeypatch, settings):
    models = {"a": networks.mlp(12, 9, 8, 7, 5), "b": networks.mlp(12, 30, 20, 5, seed=1)}
    wanted = fuse(models["a"], models["b"], DATA, **SETTINGS, **settings)
    made = count_preparations(monkeypatch)
    cache = {"cache_dir": tmp_path / "cache", "out_dir": tmp_path / "out", "resume": False}
    for _ in range(2):
        (found,) = fuse_many(models, DATA, **cache, **SETTINGS, **settings)
        assert torch.equal(found.model(DATA), wanted.model(DATA))
        assert found.shares == tuple(wanted.shares.values())
    assert [cached for _, cached in made] == [False] * 2 + [True] * 2


def test_a_cache_that_cannot_be_written_is_told_and_the_pairs_are_done(
    expected, tmp_path, caplog, monkeypatch
):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(prepared_module, "save_file", full)
    with caplog.at_level(logging.WARNING, "clafusion"):
        results = fuse_many(modules(), DATA, cache_dir=tmp_path, **SETTINGS)
        assert_as_fused(results, expected)
    assert "cannot be written: No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_entry_under_another_ones_name_is_not_taken(expected, tmp_path, caplog):
    list(fuse_many(modules(), DATA, cache_dir=tmp_path, **SETTINGS))
    one, other = sorted(tmp_path.iterdir())[:2]
    one.write_bytes(other.read_bytes())
    assert_as_fused(fuse_many(modules(), DATA, cache_dir=tmp_path, **SETTINGS), expected)
    assert "is corrupt" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"matching_rows": 100},
        {"alignment_samples": 50},
        {"data": DATA[:200]},
        {"importance": "norm"},
        {"layer_weights": "sensitivity"},
    ],
)
def test_stale_signatures_are_not_taken(tmp_path, monkeypatch, change):
    made = count_preparations(monkeypatch)
    given = {"models": modules(), "data": DATA, "cache_dir": tmp_path, **SETTINGS}
    list(fuse_many(**given))
    list(fuse_many(**{**given, **change}))
    assert not any(cached for _, cached in made)
    made.clear()
    list(fuse_many(**{**given, "weight": 0.1}))  # on which no profile depends
    assert all(cached for _, cached in made)


# --- memory -------------------------------------------------------------------------------------


def test_memory_stays_within_the_limit_and_the_results_in_order(
    files, expected, tmp_path, monkeypatch
):
    sizes = []

    def watched(name, *arguments, **keywords):
        found = prepare(name, *arguments, **keywords)
        sizes.append(found.num_bytes)
        return found

    monkeypatch.setattr(many_module, "prepare", watched)
    list(fuse_many(files, DATA, **SETTINGS))
    assert len(sizes) == 4
    limit = sum(sorted(sizes)[-2:])
    taken = []
    measure = many_module._Workshop._check_limit

    def check(self, pair):
        measure(self, pair)
        taken.append(self._taken())

    monkeypatch.setattr(many_module._Workshop, "_check_limit", check)
    for folder in (tmp_path / "out", None):
        taken.clear()
        sizes.clear()
        results = fuse_many(files, DATA, out_dir=folder, memory_limit=limit, **SETTINGS)
        assert_as_fused(results, expected)
        assert max(taken) <= limit
        assert len(sizes) > 4  # some were freed and made ready again
    (tight,) = fuse_many(files, DATA, [("a", "b")], memory_limit=1000, **SETTINGS)
    assert "memory_limit is 1,000 bytes, but" in tight.error


def test_models_are_freed_after_their_last_use(monkeypatch):
    held = []
    fuse_pair = many_module._Workshop.fuse

    def watched(self, pair, source):
        held.append(sorted(self.ready))
        return fuse_pair(self, pair, source)

    monkeypatch.setattr(many_module._Workshop, "fuse", watched)
    list(fuse_many(modules(), DATA, [("a", "b"), ("a", "c"), ("c", "d")], **SETTINGS))
    assert held == [[], ["a"], ["c"]]


def test_the_order_brings_few_models_in_twice():
    names = [f"m{i}" for i in range(24)]
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    agenda = many_module._Agenda(pairs)
    ready, loads = {}, 0
    while agenda.left:
        pair = agenda.next(ready)
        for name in pair:
            if name not in ready:
                loads += 1
                if len(ready) == 6:
                    del ready[next(one for one in reversed(ready) if one not in pair)]
                ready[name] = None
        for name in agenda.done(pair):
            del ready[name]
    # Five stay while all others pass: 24 + 19 + 14 + 9 + 4. In the given order it would be 200.
    assert loads <= 80
    tasks = many_module._tasks(pairs)
    assert sorted(pair for task in tasks for pair in task) == sorted(pairs)
    assert max(map(len, tasks)) == 4


# --- executors ----------------------------------------------------------------------------------


def test_processes_and_threads_give_the_same_bytes(files, expected, tmp_path):
    assert_as_fused(fuse_many(files, DATA, executor=2, out_dir=tmp_path, **SETTINGS), expected)
    assert len(lines(tmp_path)) == 6
    with ThreadPoolExecutor(2) as executor:
        results = fuse_many(modules(), list(DATA.split(256)), executor=executor, **SETTINGS)
        assert_as_fused(results, expected)


def test_no_process_is_left_when_results_are_not_taken(files):
    run = fuse_many(files, DATA, executor=2, **SETTINGS)
    next(run)
    run.close()
    end = time.monotonic() + 60
    while active_children():
        assert time.monotonic() < end
        time.sleep(0.02)


class Failing(ThreadPoolExecutor):
    """An executor that loses what it is to do."""

    def submit(self, *_):
        if self._max_workers == 1:
            raise RuntimeError("cannot schedule new futures")
        future = Future()
        future.set_exception(RuntimeError("lost"))
        return future


@pytest.mark.parametrize(("workers", "message"), [(1, "cannot schedule new futures"), (2, "lost")])
def test_an_executor_that_fails_is_told(workers, message):
    with pytest.raises(ClafusionError, match=f"executor failed .*{message}.* 0 of 6 pairs"):
        list(fuse_many(modules(), DATA, executor=Failing(workers), **SETTINGS))


def test_a_model_that_cannot_be_sent_is_refused():
    models = {**modules(), "local": networks.mlp(12, 6, 5)}
    models["local"].register_forward_hook(lambda *_: None)
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(InputError, match=r"models\['local'\] cannot be sent .*clafusion\.ModelFile"),
    ):
        list(fuse_many(models, DATA, executor=executor, **SETTINGS))


def _kill_once(flag, function, *arguments):
    if function is many_module._work and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)


class _Killing(ProcessPoolExecutor):
    """Its first pairs end by the death of its worker."""

    def __init__(self, flag):
        super().__init__(1, mp_context=get_context("spawn"))
        self.flag = flag

    def submit(self, function, *arguments):
        return super().submit(_kill_once, self.flag, function, *arguments)


def test_a_worker_that_dies_is_told_and_the_next_run_goes_on(files, expected, tmp_path):
    with (
        _Killing(tmp_path / "flag") as executor,
        pytest.raises(ClafusionError, match=r"a worker process died.*0 of 6 pairs are done"),
    ):
        list(fuse_many(files, DATA, executor=executor, out_dir=tmp_path / "out", **SETTINGS))
    assert_as_fused(fuse_many(files, DATA, out_dir=tmp_path / "out", **SETTINGS), expected)
    assert len(lines(tmp_path / "out")) == 6


SCRIPT = """
import sys, torch
from pathlib import Path
from clafusion import ModelFile, fuse_many
folder = Path(sys.argv[1])
widths = {widths}
models = {{
    name: ModelFile(f"{{folder}}/nets.py:mlp{{one}}", folder / f"{{name}}.safetensors")
    for name, one in widths.items()
}}
data = torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
settings = {{"alignment_samples": 100, "matching_rows": 200}}
for one in fuse_many(models, data, out_dir=folder / "out", **settings):
    print(one.first, one.second, flush=True)
"""


@pytest.mark.parametrize("seen", [0, 2])
def test_a_run_that_is_killed_goes_on_where_it_was(files, expected, tmp_path, seen):
    command = [sys.executable, "-c", SCRIPT.format(widths=WIDTHS), str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(seen):
        run.stdout.readline()
    if not seen:
        time.sleep(1)
    run.kill()
    run.communicate()
    results = list(fuse_many(files, DATA, out_dir=tmp_path / "out", **SETTINGS))
    assert sum(one.resumed for one in results) >= seen
    assert_as_fused(results, expected)
    done = lines(tmp_path / "out")
    assert sorted((one["first"], one["second"]) for one in done) == list(expected)
    for one in done:
        load_file(tmp_path / "out" / one["file"])
