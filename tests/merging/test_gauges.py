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
