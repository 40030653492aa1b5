"""Widths of which the result's are no multiples are told where one network has all weight."""

import warnings

import pytest
import torch

from clafusion import Like, WidthWarning, fuse
from tests.support import networks

INPUTS = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


def pair(wide, narrow):
    return [networks.randomise(networks.mlp(6, one, 4), i) for i, one in enumerate([wide, narrow])]


def gap(model, other):
    with torch.no_grad():
        found, wanted = model(INPUTS), other(INPUTS)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("sizes", [(12, 8), (8, 12)])
def test_a_function_that_uneven_widths_change_is_told(sizes):
    models = pair(*sizes)
    target = Like(networks.mlp(6, sizes[0], 4))
    with pytest.warns(WidthWarning, match=rf"alone .* {sizes[0]} of .* for its {sizes[1]}"):
        result = fuse(models, INPUTS, [0, 1], calibration="none", target=target)
    assert gap(result.model, models[1]) > 1e-2


@pytest.mark.parametrize("weights", [[0, 1], [1, 0], [0.5, 0.5]])
def test_multiples_are_not_told(weights):
    models = pair(16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WidthWarning)
        result = fuse(models, INPUTS, weights, calibration="none")
    if 1 in weights:
        assert gap(result.model, models[weights.index(1)]) < 1e-5


def test_an_average_is_not_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error", WidthWarning)
        fuse(pair(12, 8), INPUTS, [0.2, 0.8], calibration="none")
