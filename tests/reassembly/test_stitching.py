"""Stitches against NumPy's least squares, and which values cannot become which."""

import numpy as np
import pytest
import torch

from clafusion.errors import StructureError
from clafusion.reassembly.cutting import Cut
from clafusion.reassembly.stitching import fitted, stitch_plan


def cut(channels, *positions, axis=1, positive=False):
    return Cut("node", axis, channels, positions, positive)


def values(cut, count=40, seed=0):
    shape = [count, *cut.positions]
    shape.insert(cut.axis, cut.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def columns(value, axis=1):
    return np.moveaxis(value.double().numpy(), axis, -1).reshape(-1, value.size(axis))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (cut(5), cut(3)),
        (cut(5, 4, 4), cut(3, 4, 4)),
        (cut(5, 6), cut(3, 6)),
        (cut(5, 2, 2, 2), cut(3, 2, 2, 2)),
        (cut(5, 6, axis=2), cut(3, 6, axis=2)),
    ],
)
def test_a_stitch_is_the_least_squares_map(source, target):
    x, goal = values(source), values(target, seed=1)
    plan = stitch_plan(source, target, "they")
    pairs = [(x[:25], goal[:25]), (x[25:], goal[25:])]
    stitch, left = fitted(plan, pairs, 1e-9)
    rows = np.c_[columns(x, source.axis), np.ones(len(columns(x, source.axis)))]
    wanted = columns(goal, target.axis)
    weight, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    found = columns(stitch(x).detach(), target.axis)
    own = rows @ weight
    factors = np.clip(wanted.std(0) / own.std(0), 1, 2)
    np.testing.assert_allclose(found, own.mean(0) + factors * (own - own.mean(0)), atol=1e-4)
    residual = np.square(wanted - rows @ weight).sum()
    assert left == pytest.approx(residual / np.square(wanted - wanted.mean(0)).sum(), rel=1e-5)
    assert sum(one.numel() for one in stitch.parameters()) == plan.parameters


def test_a_stitch_has_the_type_of_what_it_reads():
    plan = stitch_plan(cut(5), cut(3), "they")
    x = values(cut(5)).bfloat16()
    stitch, _ = fitted(plan, [(x, values(cut(3), seed=1))], 1e-4)
    assert stitch(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "target", "features"),
    [
        (cut(5, 8, 8), cut(3, 4, 4), 5),
        (cut(5, 4, 4), cut(3), 80),
        (cut(100, 4, 4), cut(3), 900),  # 3 x 3 of 4 x 4 positions
        (cut(5, 6, axis=2), cut(3), 5),
    ],
)
def test_positions_are_averaged(source, target, features):
    x, goal = values(source), values(target, seed=1)
    plan = stitch_plan(source, target, "they")
    assert plan.features == features
    stitch, _ = fitted(plan, [(x, goal)], 1e-3)
    assert stitch(x).shape == goal.shape


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (cut(5), cut(3, 4, 4)),
        (cut(5, 4, 4), cut(3, 8, 8)),
        (cut(5, 4, 4), cut(3, 16, axis=2)),
        (cut(5, 16, axis=2), cut(3, 4, axis=2)),
    ],
)
def test_positions_are_not_invented(source, target):
    with pytest.raises(StructureError, match=r"they cannot be joined: a value of 5 channels"):
        stitch_plan(source, target, "they")


def test_the_ridge_shrinks_the_map_and_not_the_mean():
    x, goal = values(cut(5)), values(cut(3), seed=1) + 7
    stitch, _ = fitted(stitch_plan(cut(5), cut(3), ""), [(x, goal)], 1e6)
    assert float(stitch.layer.weight.detach().abs().max()) < 1e-3
    assert torch.allclose(stitch(x), goal.mean(0).expand(40, 3), atol=1e-2)


def test_what_a_relu_has_made_stays_positive():
    target = cut(3, positive=True)
    stitch, _ = fitted(stitch_plan(cut(5), target, ""), [(values(cut(5)), values(target))], 1e-3)
    assert float(stitch(values(cut(5))).detach().min()) >= 0
