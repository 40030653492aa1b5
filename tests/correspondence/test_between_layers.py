"""What lies between layers is compared by name, flag and number, whatever the examples' size."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import FusionWarning, Shallower, explain, fuse
from tests.support.assertions import assert_same_function

IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, pool, end=None, width=6, depth=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.pool = nn.Conv2d(3, width, 3, padding=1), pool
        self.rest = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth - 1))
        self.end = end or (lambda x: x.mean((2, 3)))
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        x = self.pool(self.first(x).relu())
        for one in self.rest:
            x = one(x).relu()
        return self.last(self.end(x).flatten(1))


UNLIKE = {
    "ceil_mode": (nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2)),
    "count_include_pad": (nn.AvgPool2d(2), nn.AvgPool2d(2, count_include_pad=False)),
    "adaptive": (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4)),
    "size": (nn.Upsample(size=16), nn.Upsample(scale_factor=2)),
    "whole": (nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(1)),
    "crop": (lambda x: x[:, :, :7], lambda x: x[:, :, :-1]),
}


@pytest.mark.parametrize("changes", [{}, {"width": 3}, {"depth": 3}], ids=str)
@pytest.mark.parametrize("kind", UNLIKE)
def test_operations_that_agree_at_the_examples_size_only_are_told(kind, changes):
    one, other = UNLIKE[kind]
    models = [Net(one).eval(), Net(other, seed=1, **changes).eval()]
    with pytest.warns(FusionWarning, match="perhaps not on others: between its layers lies"):
        fuse(models, IMAGES, [0, 1], calibration="none")
    assert "for inputs of this shape" in explain(models, IMAGES)


@pytest.mark.parametrize("options", [{}, {"target": Shallower()}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"width": 4}, {"depth": 3}], ids=str)
@pytest.mark.parametrize("pool", [one for one, _ in UNLIKE.values()])
def test_networks_that_differ_in_widths_and_depth_only_are_not(pool, changes, options):
    models = [Net(pool).eval(), Net(pool, seed=1, **changes).eval()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionWarning)
        fuse(models, IMAGES, calibration="none", assessment="none", **options)
    assert explain(models, IMAGES).endswith("they can be fused")


def test_the_mean_of_all_positions_is_the_same_however_it_is_written():
    ends = [
        nn.AdaptiveAvgPool2d(1),
        lambda x: x.mean((2, 3)),
        lambda x: x.mean(dim=(-1, -2), keepdim=True),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    ]
    models = [Net(nn.MaxPool2d(2), end, seed=i).eval() for i, end in enumerate(ends)]
    larger = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionWarning)
        fused = fuse(models, IMAGES, [0, 0, 1, 0], calibration="none").model
    assert_same_function(fused, models[2], larger)
