"""Where averaging loses nothing, least squares changes nothing."""

import pytest
import torch
from torch import nn

from clafusion import Deeper, Matching, fuse
from tests.support.networks import mlp, output, permuted_copy, randomise

INPUTS = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, width, times=1, gain=False):
        super().__init__()
        self.into = nn.Linear(8, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 4)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width)) if gain else None
        self.times = times

    def forward(self, x):
        x = self.into(x).relu()
        for _ in range(self.times):
            x = (x + self.down(self.up(x).relu())).relu()
        if self.gain is not None:
            x = x * self.gain
        return self.out(x)


class Excited(nn.Module):
    """Squeeze and excitation: channels that other channels scale."""

    def __init__(self, width):
        super().__init__()
        self.into, self.out = nn.Linear(8, width), nn.Linear(width, 4)
        self.less, self.more = nn.Linear(width, 3), nn.Linear(3, width)

    def forward(self, x):
        x = self.into(x).relu()
        return self.out(x * self.more(self.less(x).relu()).sigmoid())


NETWORKS = {
    "residual": lambda width: Residual(width),
    "applied twice": lambda width: Residual(width, times=2),
    "learned scale": lambda width: Residual(width, gain=True),
    "squeeze and excitation": Excited,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_weight_on_a_network_whose_channels_are_doubled_gives_it_back(name):
    narrow, wide = (randomise(NETWORKS[name](width), width) for width in (6, 12))
    wanted = output(narrow, INPUTS)
    found = output(fuse([narrow, wide], INPUTS, [1, 0], target=Deeper(width="wide")).model, INPUTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("importance", ["uniform", "norm", "activation", "sensitivity"])
def test_a_permuted_copy_comes_back_whatever_counts(importance):
    model = mlp(8, 20, 16, 4)
    copied = permuted_copy(model, INPUTS)
    matching = Matching(importance=importance)
    wanted = output(model, INPUTS)
    found = output(fuse([model, copied], INPUTS, matching=matching).model, INPUTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
