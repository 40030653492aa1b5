"""Weights that are divided by a norm of their own are averaged as plain ones."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from clafusion import fuse

VECTORS = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = weight_norm(nn.Linear(12, 16)), nn.Linear(16, 12)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def net(depth, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), *[Block() for _ in range(depth)], nn.Linear(12, 3))


@pytest.mark.parametrize("weights", [(0.5, 0.25, 0.25), (0.2, 0.4, 0.4)])
def test_lengths_are_those_of_the_mean_whoever_lacks_the_layer(weights):
    models = [net(depth, seed) for seed, depth in enumerate((1, 2, 2))]
    fused = fuse(models, VECTORS, weights, calibration="none").model
    for block in fused[1:-1]:
        length, direction = (
            getattr(block.up.parametrizations.weight, f"original{i}") for i in (0, 1)
        )
        torch.testing.assert_close(length, direction.norm(dim=1, keepdim=True))


class Standard(nn.Linear):
    """A layer by its weight with mean 0 and variance 1 in each row, times a gain and a scale."""

    def __init__(self, into, out):
        super().__init__(into, out)
        self.gain = nn.Parameter(torch.rand(out, 1) + 0.5)

    def applied(self):
        gain = (self.gain * self.in_features**-0.5).view(-1)
        weight = self.weight.reshape(1, self.out_features, -1)
        return nn.functional.batch_norm(
            weight, None, None, gain, training=True, momentum=0.0, eps=1e-4
        )[0]

    def forward(self, x):
        return nn.functional.linear(x, self.applied(), self.bias)


class StandardBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), Standard(16, 12)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def test_standardised_weights_are_averaged_as_the_weights_that_they_are():
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Linear(5, 12), StandardBlock(), nn.Linear(12, 3))

    first, other = net(), net()
    other.load_state_dict(first.state_dict())
    with torch.no_grad():
        other[1].down.gain.mul_(3)
        other[1].down.weight.mul_(0.1).add_(1)  # another scale and mean: the same weight
        expected = (first[1].down.applied() + other[1].down.applied()) / 2
        found = fuse([first, other], VECTORS, calibration="none").model[1].down
        torch.testing.assert_close(found.applied(), expected, rtol=0, atol=1e-5)


def test_half_a_layer_that_the_other_network_lacks_has_half_its_gains():
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(5, 12), StandardBlock(), StandardBlock(), nn.Linear(12, 3))
    shallow = nn.Sequential(nn.Linear(5, 12), StandardBlock(), nn.Linear(12, 3))
    kept = {name: value for name, value in deep.state_dict().items() if name[0] != "2"}
    shallow.load_state_dict({name.replace("3.", "2."): value for name, value in kept.items()})
    with torch.no_grad():
        found = fuse([deep, shallow], VECTORS, (0.25, 0.75), calibration="none").model
        torch.testing.assert_close(found[2].down.applied(), deep[2].down.applied() / 4)
