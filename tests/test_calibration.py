"""The moments that REPAIR works with: as in float64, and taken once for all of a model's pairs."""

from dataclasses import replace

import pytest
import torch

from clafusion import InputError, align, trace
from clafusion.fusion import fuse_aligned
from clafusion.profiling.moments import channel_moments, observed_moments
from clafusion.profiling.profile import profile_models
from tests import networks


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


def with_moments(pair, data):
    deep, shallow = (
        replace(one, moments=tuple(observed_moments(one.traced, data)))
        for one in (pair.deep, pair.shallow)
    )
    return replace(pair, deep=deep, shallow=shallow)


@pytest.mark.parametrize("name", PAIRS)
def test_moments_taken_beforehand_give_the_same_bytes(name):
    data = inputs_for(name)
    pair = align(*PAIRS[name](), data)
    plain = fuse_aligned(pair, data).model.state_dict()
    cached = fuse_aligned(with_moments(pair, data), data).model.state_dict()
    assert plain.keys() == cached.keys()
    for key, tensor in plain.items():
        assert torch.equal(tensor, cached[key]), key


@pytest.mark.parametrize("name", PAIRS)
def test_profiling_takes_the_same_moments(name):
    data = inputs_for(name)
    graph = trace(PAIRS[name]()[0], data)
    (profile,) = profile_models([graph], data, moments=True)
    observed = observed_moments(graph, data)
    assert len(profile.moments) == len(observed) == 2
    for one, other in zip(profile.moments, observed, strict=True):
        assert one.keys() == other.keys()
        for node, pair in one.items():
            assert all(map(torch.equal, pair, other[node])), node


def test_moments_of_fewer_batches_are_refused():
    data = inputs_for("chain")
    pair = align(*PAIRS["chain"](), data)
    observed = with_moments(pair, data)
    fewer = replace(observed.shallow, moments=observed.shallow.moments[:1])
    with pytest.raises(InputError, match="observed has 2 and 1 batches, data more"):
        fuse_aligned(replace(observed, shallow=fewer), data)
