"""Models prepared for many pairs: traces that are shared, and profiles kept on disk."""

import logging
from dataclasses import fields

import pytest
import torch
from safetensors import SafetensorError

from clafusion import (
    FusionConfig,
    InputError,
    Matching,
    Merging,
    NoCalibration,
    Profiling,
    Repair,
    fuse,
    profile,
    trace,
)
from clafusion.batch.prepared import prepare
from clafusion.batch.run import fuse_pairs
from clafusion.profiling import cache as cache_module
from clafusion.tracing import trace as trace_module
from clafusion.tracing.export import export_model
from clafusion.tracing.trace_cache import TraceCache
from tests.support import networks
from tests.support.many_pairs import DATA, SETTINGS, assert_as_fused, modules
from tests.support.preparations import count_preparations


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda seed: networks.mlp(12, 9, 8, 5, seed=seed), (12,)),
        (lambda seed: networks.vgg(2, 1, seed=seed), (3, 8, 8)),
        (lambda seed: networks.resnet(2, 1, seed=seed), (3, 8, 8)),
    ],
)
def test_profiles_made_alone_are_those_made_together(make, shape):
    first, second = make(0), make(1)
    data = torch.randn(300, *shape, generator=torch.Generator().manual_seed(3))
    aligned = fuse([first, second], data, **SETTINGS).aligned
    for model, together in zip((first, second), aligned.profiles, strict=True):
        alone = profile(model, data, **SETTINGS)
        assert alone.data_key == together.data_key
        assert all(map(torch.equal, alone.grams, together.grams))
        assert alone.rows.keys() == together.rows.keys()
        assert all(torch.equal(rows, together.rows[key]) for key, rows in alone.rows.items())


# --- one trace for all models of an architecture ------------------------------------------------


def test_models_of_one_architecture_share_a_trace(monkeypatch):
    models = {
        "a": networks.resnet(1, 2),
        "b": networks.resnet(1, 2, seed=1),
        "c": networks.resnet(2, 2, seed=2),
        "d": networks.resnet(1, 2, seed=3),
    }
    models["d"].register_forward_hook(lambda *_: None)
    data = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    exported = []

    def counted(model, *arguments):
        exported.append(len(model.state_dict()))
        return export_model(model, *arguments)

    monkeypatch.setattr(trace_module, "export_model", counted)
    monkeypatch.setattr(trace_module, "_cache", TraceCache())
    for one in fuse_pairs(models, data, **SETTINGS):
        assert one.error is None
        monkeypatch.setattr(trace_module, "_cache", TraceCache())
        wanted = fuse([models[one.first], models[one.second]], data, **SETTINGS).model.state_dict()
        assert all(torch.equal(one.state[name], tensor) for name, tensor in wanted.items())
    monkeypatch.setattr(trace_module, "_cache", TraceCache())
    exported.clear()
    list(fuse_pairs(models, data, **SETTINGS))
    assert exported == [len(models[name].state_dict()) for name in "acd"]


class Gated(torch.nn.Module):
    """Its gate is a constant of the class, which no attribute of an instance tells."""

    gate = 0.0

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(12, 9), torch.nn.Linear(9, 5)

    def forward(self, x):
        ramp = torch.arange(9.0) * type(self).gate
        return self.two(torch.relu(self.one(x)) + ramp)


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_model_whose_kept_trace_does_not_stand_the_proof_is_traced_as_in_fuse(
    monkeypatch, tmp_path, is_cached
):
    config = FusionConfig(**SETTINGS)
    settings = {"data_hash": "", "cache_dir": tmp_path if is_cached else None}
    monkeypatch.setattr(Gated, "gate", 0.0)
    prepare("first", Gated(), DATA, DATA, config, **settings)
    monkeypatch.setattr(Gated, "gate", 1.0)
    model = Gated()
    torch.nn.init.zeros_(model.two.weight)  # so that the outputs do not show the gate
    made = prepare("second", model, DATA, DATA, config, **settings)
    assert not made.from_cache
    wanted = trace(model, DATA)
    assert made.profile.traced.module is wanted.module
    again = prepare("second", model, DATA, DATA, config, **settings)
    assert again.from_cache == is_cached


def test_a_model_that_shares_a_trace_is_checked_on_its_own(monkeypatch):
    settings = {"data_hash": ""}
    config = FusionConfig(**SETTINGS)
    first, like_it = Gated(), Gated()
    found = [prepare("first", one, DATA, DATA, config, **settings) for one in (first, like_it)]
    assert found[0].profile.traced.module is found[1].profile.traced.module
    monkeypatch.setattr(Gated, "gate", 1.0)
    changed = prepare("second", like_it, DATA, DATA, config, **settings).profile.traced
    assert changed.module is not found[0].profile.traced.module
    torch.testing.assert_close(changed.run((DATA,))[0], like_it(DATA))
    broken = Gated()
    with torch.no_grad():
        broken.one.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"models\['third'\]: parameter 'one\.bias' holds 1 NaN"):
        prepare("third", broken, DATA, DATA, config, **settings)


# --- profiles on disk -------------------------------------------------------------------------


def test_profiles_are_read_from_disk_and_corrupt_ones_made_again(
    expected, tmp_path, monkeypatch, caplog
):
    made = count_preparations(monkeypatch)
    for _ in range(2):
        results = fuse_pairs(modules(), DATA, cache_dir=tmp_path, **SETTINGS)
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
            assert_as_fused(fuse_pairs(modules(), DATA, cache_dir=tmp_path, **SETTINGS), expected)
        assert sorted(cached for _, cached in made) == [False, True, True, True]
        assert "is corrupt and is made again" in caplog.text
        assert entries[0].read_bytes() == whole


@pytest.mark.parametrize(
    "settings",
    [
        {"matching": Matching(importance="sensitivity")},
        {"merging": Merging(layer_weights="sensitivity")},
        {
            "matching": Matching(importance="norm"),
            "merging": Merging(layer_weights="sensitivity"),
        },
    ],
)
def test_masses_and_sensitivities_are_kept_on_disk(tmp_path, monkeypatch, settings):
    models = {"a": networks.mlp(12, 9, 8, 7, 5), "b": networks.mlp(12, 30, 20, 5, seed=1)}
    wanted = fuse([models["a"], models["b"]], DATA, **SETTINGS, **settings)
    made = count_preparations(monkeypatch)
    cache = {"cache_dir": tmp_path / "cache", "out_dir": tmp_path / "out", "resume": False}
    for _ in range(2):
        (found,) = fuse_pairs(models, DATA, **cache, **SETTINGS, **settings)
        assert torch.equal(found.model(DATA), wanted.model(DATA))
        assert found.layer_weights == wanted.layer_weights
    assert [cached for _, cached in made] == [False] * 2 + [True] * 2


def test_a_cache_that_cannot_be_written_is_told_and_the_pairs_are_done(
    expected, tmp_path, caplog, monkeypatch
):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with caplog.at_level(logging.WARNING, "clafusion"):
        results = fuse_pairs(modules(), DATA, cache_dir=tmp_path, **SETTINGS)
        assert_as_fused(results, expected)
    assert "cannot be written: No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_entry_under_another_ones_name_is_not_taken(expected, tmp_path, caplog):
    list(fuse_pairs(modules(), DATA, cache_dir=tmp_path, **SETTINGS))
    one, other = sorted(tmp_path.iterdir())[:2]
    one.write_bytes(other.read_bytes())
    assert_as_fused(fuse_pairs(modules(), DATA, cache_dir=tmp_path, **SETTINGS), expected)
    assert "is corrupt" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"profiling": Profiling(alignment_samples=100, matching_rows=100)},
        {"profiling": Profiling(alignment_samples=50, matching_rows=200)},
        {"data": DATA[:200]},
        {"matching": Matching(importance="norm")},
        {"merging": Merging(layer_weights="sensitivity")},
    ],
)
def test_stale_profiles_are_not_taken(tmp_path, monkeypatch, change):
    made = count_preparations(monkeypatch)
    given = {"models": modules(), "data": DATA, "cache_dir": tmp_path, **SETTINGS}
    list(fuse_pairs(**given))
    list(fuse_pairs(**{**given, **change}))
    assert not any(cached for _, cached in made)
    made.clear()
    list(fuse_pairs(**{**given, "weights": [0.9, 0.1]}))  # on which no profile depends
    assert all(cached for _, cached in made)


@pytest.mark.parametrize("inputs", [None, 270])
def test_a_profile_from_disk_is_the_profile_that_was_written(tmp_path, inputs):
    model = networks.mlp(12, 9, 8, 5)
    options = Profiling(alignment_samples=100, matching_rows=200, inputs=inputs)
    for calibration, has_moments in ((Repair(), True), (NoCalibration(), False)):
        config = FusionConfig(
            profiling=options,
            matching=Matching(importance="norm"),
            merging=Merging(layer_weights="sensitivity"),
            calibration=calibration,
        )
        keywords = {"data_hash": "", "cache_dir": tmp_path}
        written, read = (prepare("a", model, DATA, DATA, config, **keywords) for _ in range(2))
        assert (written.from_cache, read.from_cache) == (False, True)
        assert written.num_bytes == read.num_bytes
        one, other = written.profile, read.profile
        assert (one.batch_sizes != ()) == has_moments
        for field in fields(one):
            if field.name != "traced":
                assert_same(getattr(one, field.name), getattr(other, field.name))


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_same(list(one.values()), [other[key] for key in one])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for part, of_other in zip(one, other, strict=True):
            assert_same(part, of_other)
    else:
        assert one == other
