"""The moments that REPAIR works with: as in float64, and taken once for all of a model's pairs."""

from dataclasses import replace

import pytest
import torch

from clafusion import FusionConfig, InputError, LeastSquares, align, profile, trace
from clafusion.fusion import align_profiles, fuse_aligned
from clafusion.profiling.moments import channel_moments, observed_moments
from clafusion.profiling.profile import profile_models
from tests.support import networks
from tests.support.data import PROFILED


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((9, 5, 7, 6), 1), ((9, 5, 30), 1), ((90, 5), 1), ((9, 30, 5), 2), ((3, 5, 4, 3, 2), 1)],
)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_are_those_of_float64(shape, axis, offset):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=generator) * 0.1 + offset
    others = [one for one in range(len(shape)) if one != axis]
    mean, deviation = channel_moments(value, axis)
    expected = value.double()
    # Rounding of the float32 sums of an image, and of the mean that is taken off.
    assert torch.allclose(mean, expected.mean(others), rtol=1e-6, atol=1e-6)
    reference = expected.std(others, correction=0)
    assert torch.allclose(deviation, reference, rtol=2e-6, atol=2e-7 * offset)


def test_a_constant_channel_has_no_deviation():
    _, deviation = channel_moments(torch.full((8, 3, 16, 16), 0.1), 1)
    assert float(deviation.max()) < 1e-7


PAIRS = {
    "chain": lambda: (networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 6, 5, seed=1)),
    "vgg": lambda: (networks.vgg(3, 2), networks.vgg(1, 1, seed=1)),
    "resnet": lambda: (networks.resnet(1, 2), networks.resnet(2, 3, widths=(6, 12), seed=1)),
}


def inputs_for(name):
    shape = (12,) if name == "chain" else (3, 12, 12)
    return torch.randn(300, *shape, generator=torch.Generator().manual_seed(3))


def with_moments(aligned, data):
    profiles = tuple(
        replace(
            one,
            moments=tuple(observed_moments(one.traced, data)),
            batch_sizes=tuple(len(batch) for batch in data.split(256)),
        )
        for one in aligned.profiles
    )
    return replace(aligned, profiles=profiles)


@pytest.mark.parametrize("name", PAIRS)
def test_moments_taken_beforehand_give_the_same_bytes(name):
    """Those of the profile's own pass, and those of a pass of their own."""
    data = inputs_for(name)
    aligned = align(PAIRS[name](), data, calibration="repair", assessment="none")
    assert all(one.moments is not None for one in aligned.profiles)
    whole = FusionConfig(calibration="repair", assessment="none")
    plain = fuse_aligned(aligned, data, config=whole).model.state_dict()
    bare = align(PAIRS[name](), data, calibration="none", assessment="none")
    assert all(one.moments is None for one in bare.profiles)
    cached = fuse_aligned(with_moments(bare, data), data, config=whole).model.state_dict()
    assert plain.keys() == cached.keys()
    for key, tensor in plain.items():
        assert torch.equal(tensor, cached[key]), key


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"calibration": "repair"}, True),
        ({"matching": {"solver": "zip"}}, True),
        ({"calibration": "none"}, False),
        ({"calibration": "batchnorm"}, False),
        ({"calibration": LeastSquares()}, False),
        ({"calibration": LeastSquares(), "merging": "barycentre"}, True),
    ],
    ids=str,
)
def test_moments_are_taken_where_they_are_needed(settings, wanted):
    config = FusionConfig(**settings, assessment="none")
    profiled = profile(PAIRS["chain"]()[0], inputs_for("chain"), config)
    assert (profiled.moments is not None) == wanted
    assert profiled.batch_sizes == ((256, 44) if wanted else ())


@pytest.mark.parametrize("name", PAIRS)
def test_profiling_takes_the_same_moments(name):
    data = inputs_for(name)
    graph = trace(PAIRS[name]()[0], data)
    (profile,) = profile_models([graph], data, **PROFILED, moments=True)
    observed = observed_moments(graph, data)
    assert len(profile.moments) == len(observed) == 2
    for one, other in zip(profile.moments, observed, strict=True):
        assert one.keys() == other.keys()
        for node, pair in one.items():
            assert all(map(torch.equal, pair, other[node])), node
    assert profile.batch_sizes == (256, 44)


@pytest.mark.parametrize("limit", [100, 280, 300, 1000])
@pytest.mark.parametrize("name", PAIRS)
def test_moments_are_of_all_inputs_however_few_are_profiled(name, limit):
    data = list(inputs_for(name).split(70))
    graphs = [trace(model, data[0]) for model in PAIRS[name]()]
    profiles = profile_models(graphs, data, **PROFILED, moments=True, max_inputs=limit)
    plain = profile_models(graphs, data, **PROFILED, max_inputs=limit)
    for graph, found, one in zip(graphs, profiles, plain, strict=True):
        assert found.num_inputs == min(limit, 300) == one.num_inputs
        assert found.data_key == one.data_key
        assert found.rows.keys() == one.rows.keys()
        assert all(torch.equal(rows, one.rows[key]) for key, rows in found.rows.items())
        assert all(map(torch.equal, found.grams, one.grams))
        assert one.moments is None
        assert found.batch_sizes == (70, 70, 70, 70, 20)
        observed = observed_moments(graph, data)
        assert len(found.moments) == len(observed) == 5
        for batch, other in zip(found.moments, observed, strict=True):
            assert batch.keys() == other.keys()
            for node, pair in batch.items():
                assert all(map(torch.equal, pair, other[node])), node


def test_moments_of_fewer_batches_are_refused():
    data = inputs_for("chain")
    repair = FusionConfig(calibration="repair")
    aligned = align(PAIRS["chain"](), data, repair)
    first, second = aligned.profiles
    fewer = replace(second, moments=second.moments[:1], batch_sizes=second.batch_sizes[:1])
    other = replace(second, batch_sizes=(200, 100))
    for wrong in (fewer, other):
        with pytest.raises(InputError, match="parents' profiles are of different batches of data"):
            fuse_aligned(replace(aligned, profiles=(first, wrong)), data, config=repair)
    both = [
        replace(one, moments=one.moments[:1], batch_sizes=one.batch_sizes[:1])
        for one in aligned.profiles
    ]
    with pytest.raises(InputError, match="the goals are of 1 batches, data has more: profile the"):
        fuse_aligned(replace(aligned, profiles=tuple(both)), data, config=repair)


def test_profiles_without_moments_are_refused_by_name():
    data = inputs_for("chain")
    models = dict(zip("ab", PAIRS["chain"](), strict=True))
    profiles = [
        profile(model, data, calibration="none" if name == "b" else "repair")
        for name, model in models.items()
    ]
    aligned = align_profiles(tuple(models), profiles)
    with pytest.raises(InputError, match="the profile of 'b' has no moments, which REPAIR needs"):
        fuse_aligned(aligned, data, config=FusionConfig(calibration="repair"))
    assert fuse_aligned(aligned, data, config=FusionConfig(calibration="none")).model
