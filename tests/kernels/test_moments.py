"""The moments of channels, and their rescaling, against NumPy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clafusion import _native, set_num_threads

SHAPES = [
    ((3, 4, 5, 6), 1),
    ((2, 3, 1, 1), 1),
    ((7, 5), 1),
    ((130, 5), 1),
    ((1, 1), 1),
    ((4, 70, 9), 2),
    ((4, 70, 9), -1),
    ((6, 3, 2), 1),
    ((2, 3, 40_001), 1),
    ((5, 8), 0),
    ((33, 6, 7, 7), 1),  # many short rows
    ((130, 2, 5, 51), 1),
    ((70, 3, 16, 16), 1),  # many long ones
    ((33, 500, 9, 15), 1),  # of wide entries
    ((512, 16), 1),  # few channels, of which several rows are read at once
    ((12, 4, 4, 5), 3),
    ((200, 1), 1),
    ((66, 3), 1),
]


def values(shape, offset=0.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset


def expected(x, axis):
    flat = np.moveaxis(x.numpy().astype(np.float64), axis, -1).reshape(-1, x.shape[axis])
    return flat.mean(0), flat.var(0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_moments_are_numpys(shape, axis, offset):
    x = values(shape, offset)
    mean, variance = _native.channel_moments(x, axis)
    of_mean, of_variance = expected(x, axis)
    np.testing.assert_allclose(mean, of_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, of_variance, rtol=1e-5, atol=1e-5 if offset else 1e-9)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_channels_are_scaled_in_place(shape, axis):
    x = values(shape)
    scale, shift = (values((shape[axis],), seed=i).double() for i in (1, 2))
    view = [1] * len(shape)
    view[axis] = -1
    wanted = x.double() * scale.view(view) + shift.view(view)
    place = x.data_ptr()
    _native.scale_channels(x, axis, scale, shift)
    assert x.data_ptr() == place
    torch.testing.assert_close(x.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("bounds", [{}, {"low": 0.0}, {"low": -0.5, "high": 0.75}])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_what_follows_is_done_in_the_same_pass(shape, axis, bounds, other):
    x, added, out = (values(shape, seed=seed) for seed in (0, 3, 4))
    scale, shift = (values((shape[axis],), seed=i) for i in (1, 2))
    view = [1] * len(shape)
    view[axis] = -1
    wanted = x.double() * scale.view(view) + shift.view(view) + (added.double() if other else 0.0)
    wanted = wanted.clamp(bounds.get("low", -np.inf), bounds.get("high", np.inf))
    before = x.clone()
    given = {"other": added if other else None, **bounds}
    assert _native.scale_channels(x, axis, scale, shift, out=out, **given) is out
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
    _native.scale_channels(x, axis, scale, shift, **given)
    assert torch.equal(x, out)  # in place, the same bytes


def test_clamping_keeps_nan():
    x = values((3, 4, 5))
    x[1, 2, 3] = torch.nan
    found = _native.scale_channels(x, 1, torch.ones(4), torch.zeros(4), low=0.0, high=1.0)
    assert found.isnan().sum() == 1
    assert bool(found[1, 2, 3].isnan())


@pytest.mark.parametrize("name", ["other", "out"])
def test_other_sizes_are_refused(name):
    x, small = values((3, 4, 5)), values((3, 4, 4))
    with pytest.raises(ValueError, match="as many numbers as x"):
        _native.scale_channels(x, 1, torch.ones(4), torch.zeros(4), **{name: small})


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2**31)
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape, axis, seed):
    x, axis = values(shape, seed=seed), axis % len(shape)
    mean, variance = _native.channel_moments(x, axis)
    of_mean, of_variance = expected(x, axis)
    np.testing.assert_allclose(mean, of_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, of_variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((64, 32, 40, 40), 1), ((20_000, 48), 1)])
def test_bytes_do_not_depend_on_threads(shape, axis):
    x = values(shape)
    found = []
    for count in (1, 2, 5):
        set_num_threads(count)
        y = x.clone()
        mean, variance = _native.channel_moments(y, axis)
        _native.scale_channels(y, axis, mean, variance)
        found.append((mean, variance, y))
    set_num_threads(0)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(61, 64, 49), (3, 64, 49), (1000, 64), (128, 64, 16, 16)])
def test_channels_that_are_all_but_zero_have_no_negative_variance(shape):
    channels = 1e-17 * values((64,)).view(1, -1, *[1] * (len(shape) - 2))
    mean, variance = _native.channel_moments(channels.expand(shape).contiguous(), 1)
    torch.testing.assert_close(mean, channels.flatten().double(), rtol=1e-6, atol=0.0)
    assert bool((variance >= 0).all())


def test_what_is_not_finite_shows():
    x = values((2, 3, 10))
    x[0, 1, 4] = torch.nan
    x[1, 2, 0] = torch.inf
    mean, variance = _native.channel_moments(x, 1)
    assert mean.isfinite().tolist() == variance.isfinite().tolist() == [True, False, False]
