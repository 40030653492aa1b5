"""Widths of which the result's are no multiples are told where one network has all weight."""

import warnings

import pytest
import torch
from torch import nn

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


def net(width, norm=nn.Identity, seed=0):
    layers = nn.Linear(6, width), norm(width), nn.ReLU(), nn.Linear(width, 4)
    return networks.randomise(nn.Sequential(*layers), seed)


def test_copies_of_some_channels_change_a_norm_over_them_and_nothing_else():
    models = [net(8), net(8, seed=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", WidthWarning)
        fused = fuse(models, INPUTS, [1, 0], calibration="none", target=Like(net(12))).model
    assert gap(fused, models[0]) < 1e-5
    models = [net(8, nn.LayerNorm), net(8, nn.LayerNorm, seed=1)]
    with pytest.warns(WidthWarning, match="alone has weight"):
        fused = fuse(
            models, INPUTS, [1, 0], calibration="none", target=Like(net(12, nn.LayerNorm))
        ).model
    assert gap(fused, models[0]) > 1e-2


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
