"""Comparing models in words."""

from itertools import pairwise

import pytest
from torch import nn

from clafusion import InputError, explain
from tests.support.data import VECTORS
from tests.support.networks import mlp


def chain(*widths, slope, bias=True):
    layers = []
    for into, out in pairwise(widths[:-1]):
        layers += [nn.Linear(into, out, bias=bias), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:])).eval()


def test_models_that_fit_are_said_to():
    text = explain({"deep": mlp(12, 9, 9, 5), "shallow": mlp(12, 10, 5, seed=1)}, VECTORS)
    first, *_, last = text.splitlines()
    assert first == "models['shallow'] (2 layers) and models['deep'] (3 layers)"
    assert last == "verdict: they can be fused"
    assert "else the nearest: what differs" in text


def test_every_difference_is_said_and_not_the_first_only():
    models = [chain(12, 9, 9, 5, slope=0.1), chain(12, 9, 9, 5, slope=0.2, bias=False)]
    text = explain(models, VECTORS)
    for name in ("0", "2"):
        assert f"{name}: linear: without a bias and with; leaky_relu: negative_slope 0.2" in text
    assert "verdict: they cannot be fused: " in text


def test_more_than_two_are_compared_with_the_deepest():
    text = explain([mlp(12, 9, 5), mlp(12, 9, 9, 9, 5), chain(12, 9, 5, slope=0.3)], VECTORS)
    assert text.count("verdict: ") == 2
    assert text.count("and models[1] (4 layers)") == 2


def test_what_cannot_be_analysed_is_part_of_the_text():
    class Sorted(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    text = explain([mlp(12, 9, 5), mlp(12, 9, 9, 5), Sorted()], VECTORS)
    assert "cannot be analysed: models[2]: " in text
    assert "verdict: they can be fused" in text
    with pytest.raises(InputError, match="at least two networks"):
        explain([mlp(12, 9, 5)], VECTORS)
