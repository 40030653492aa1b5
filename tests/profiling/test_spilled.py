"""Rows that are read from a file are those that would have been kept."""

import gc

import pytest
import torch

import clafusion
from clafusion import Assessment, Deeper, FusionConfig, Matching, trace
from clafusion.execution.walk import Walk
from clafusion.profiling import profile as profiling
from clafusion.profiling.spilled import SpilledRows, with_columns
from tests.support.attention import IMAGES, TOKENS, Encoder, Grouped, Logits
from tests.support.networks import output, randomise, resnet
from tests.support.transformers import transformer

PIXELS = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(2))
WORDS = torch.randint(0, 50, (60, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def rows_are_much(monkeypatch):
    monkeypatch.setattr(profiling, "_MUCH", 0)


def profiles_of(models, data, *, spill, samples=200):
    return profiling.profile_models(
        [trace(one, data[:3]) for one in models],
        data,
        alignment_samples=samples,
        matching_rows=300,
        layer_values="preactivation",
        spill=spill,
    )


@pytest.mark.usefixtures("rows_are_much")
def test_they_are_those_that_would_have_been_kept():
    models = [resnet(2, 1, seed=1), resnet(1, 1, seed=2)]
    kept = profiles_of(models, IMAGES, spill=False)
    made = profiles_of(models, IMAGES, spill=True)
    for one, other in zip(kept, made, strict=True):
        assert isinstance(other.rows, SpilledRows)
        assert one.rows.keys() == other.rows.keys()
        for key in [*one.rows, *reversed([*one.rows])]:  # in any order
            assert torch.equal(one.rows[key], other.rows[key]), key
        assert all(torch.equal(a, b) for a, b in zip(one.grams, other.grams, strict=True))


@pytest.mark.usefixtures("rows_are_much")
def test_reading_them_runs_nothing(monkeypatch):
    (profile,) = profiles_of([resnet(2, 1)], IMAGES, spill=True)

    def refused(*_):
        raise AssertionError("the network runs again")

    monkeypatch.setattr(Walk, "__init__", refused)
    for key in [*profile.rows, *reversed([*profile.rows])]:
        profile.rows[key]


@pytest.mark.usefixtures("rows_are_much")
def test_a_full_disk_is_named(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    models = [resnet(2, 1, seed=1), resnet(1, 1, seed=2)]
    with pytest.raises(clafusion.InputError, match="No space left on device; let TMPDIR name"):
        clafusion.fuse(models, IMAGES)


@pytest.mark.parametrize(
    ("models", "data"),
    [
        ([resnet(2, 1, seed=1), resnet(1, 1, widths=(6, 12), seed=2)], IMAGES),
        ([randomise(Encoder(2), 1), randomise(Encoder(1), 2)], TOKENS),
        ([randomise(Encoder(2, shared=2), 1), randomise(Encoder(2, shared=2), 2)], TOKENS),
        ([randomise(Encoder(2, heads=4), 1), randomise(Encoder(2, heads=2), 2)], TOKENS),
        ([randomise(Grouped(2), 1), randomise(Grouped(1), 2)], IMAGES),
        ([Logits(transformer("ViT", n, seed=n)) for n in (2, 1)], PIXELS),
        ([Logits(transformer("GPT-2", n, seed=n)) for n in (2, 1)], WORDS),
    ],
    ids=["resnet", "attention", "shared", "heads", "grouped", "ViT", "GPT-2"],
)
@pytest.mark.filterwarnings("ignore::clafusion.WidthWarning")
def test_fusion_gives_the_same_bytes(models, data, monkeypatch):
    models = [one.eval() for one in models]
    config = FusionConfig(calibration="repair", assessment=Assessment(outputs="none"))
    expected = clafusion.fuse(models, data, config=config)
    assert isinstance(expected.aligned.profiles[0].rows, dict)
    monkeypatch.setattr(profiling, "_MUCH", 0)
    found = clafusion.fuse(models, data, config=config)
    assert isinstance(found.aligned.profiles[0].rows, SpilledRows)
    assert torch.equal(output(found.model, data), output(expected.model, data))


@pytest.mark.parametrize(
    "options",
    [
        {"merging": "barycentre"},
        {"matching": Matching(solver="zip")},
        {"target": Deeper(width="wide")},
        {"target": "shallower"},
        {"matching": Matching(outputs=True), "profiling": {"layer_values": "preactivation"}},
    ],
    ids=["barycentre", "zip", "wide", "shallower", "outputs"],
)
def test_all_ways_to_fuse_read_them(options, monkeypatch):
    models = [resnet(2, 1, seed=1), resnet(1, 1, widths=(6, 12), seed=2)]
    if "zip" in str(options) or "outputs" in str(options):
        models[1] = resnet(1, 1, seed=2)
    expected = clafusion.fuse(models, IMAGES, calibration="none", **options)
    monkeypatch.setattr(profiling, "_MUCH", 0)
    found = clafusion.fuse(models, IMAGES, calibration="none", **options)
    assert torch.equal(output(found.model, IMAGES), output(expected.model, IMAGES))


@pytest.mark.parametrize("merging", ["many_to_one", "barycentre"])
@pytest.mark.usefixtures("rows_are_much")
def test_a_result_keeps_neither_inputs_nor_activations(merging):
    models = [resnet(2, 1, seed=1), resnet(1, 1, seed=2)]
    result = clafusion.fuse(models, IMAGES, calibration="none", merging=merging)
    rows = result.aligned.profiles[0].rows
    with pytest.raises(clafusion.StructureError, match="gone when their fusion ends"):
        rows[next(iter(rows))]
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is Walk]


@pytest.mark.usefixtures("rows_are_much")
def test_rows_of_many_inputs_are_kept():
    (profile,) = profiles_of([resnet(1, 1)], IMAGES, spill=True, samples=50)
    assert isinstance(profile.rows, dict)


def test_data_of_small_networks_is_not_read_again():
    class Counts:
        read = 0

        def __iter__(self):
            self.read += 1
            yield IMAGES

    data, models = Counts(), [trace(resnet(1, 1), IMAGES[:3])]
    profiling.profile_models(models, data, alignment_samples=200, matching_rows=300, spill=True)
    assert data.read == 1


@pytest.mark.usefixtures("rows_are_much")
def test_data_whose_order_changes_is_read_once():
    class Shuffles:
        def __iter__(self):
            yield IMAGES[torch.randperm(len(IMAGES))]

    models = [trace(resnet(1, 1), IMAGES[:3])]
    (profile,) = profiling.profile_models(
        models, Shuffles(), alignment_samples=200, matching_rows=300, spill=True
    )
    assert isinstance(profile.rows, dict)


@pytest.mark.usefixtures("rows_are_much")
def test_what_a_user_aligns_keeps_its_rows():
    aligned = clafusion.align([resnet(2, 1, seed=1), resnet(1, 1, seed=2)], IMAGES)
    assert isinstance(aligned.profiles[0].rows, dict)


@pytest.mark.usefixtures("rows_are_much")
@pytest.mark.parametrize("spill", [True, False])
def test_other_columns_of_rows(spill):
    (profile,) = profiles_of([resnet(1, 1)], IMAGES, spill=spill)
    first, second = list(profile.rows)[:2]
    columns = torch.tensor([2, 0])
    changed = with_columns(profile.rows, {first: columns, second: None})
    assert list(changed) == [first, second]
    assert torch.equal(changed[first], profile.rows[first][:, columns])
    assert torch.equal(changed[second], profile.rows[second])
    assert (3, 3) not in changed
