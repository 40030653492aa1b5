"""What stands between two blocks: an affine map of the channels, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clafusion.errors import StructureError
from clafusion.reassembly.cutting import Cut
from clafusion.threads import one_thread

__all__ = ["Stitch", "StitchPlan", "fitted", "stitch_plan"]

_MOST_FEATURES = 1024  # of an image whose positions become features
_SCARCE = 100  # how much more the penalty is where there is one row for each column
_SURE = 2  # rows for each column, of which an exact fit is no accident
_MOST_SCALED = 2.0
_NO_RIDGE, _EXACT = 1e-12, 1e-9
_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLINGS: tuple[Any, ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@dataclass(frozen=True)
class StitchPlan:
    """How a value is brought into the form that a block reads, before its channels are mapped.

    Attributes
    ----------
    source, target
        The value, and that which the block reads in its own model.
    pooled
        The positions to which the value is averaged; None where it keeps its own.
    is_flat
        Whether positions become features of a vector.
    """

    source: Cut
    target: Cut
    pooled: tuple[int, ...] | None
    is_flat: bool

    @property
    def features(self) -> int:
        """How many numbers the map reads for one row."""
        positions = self.source.positions if self.pooled is None else self.pooled
        return self.source.channels * (math.prod(positions) if self.is_flat else 1)

    @property
    def parameters(self) -> int:
        """How many parameters the map has."""
        return (self.features + 1) * self.target.channels


def stitch_plan(source: Cut, target: Cut, called: str) -> StitchPlan:
    """Say how a value becomes one of another shape.

    Raises
    ------
    StructureError
        The target has positions that the source lacks; the message says ``called``.
    """
    ours, theirs = source.positions, target.positions
    is_image = source.axis == 1 and len(ours) > 0
    if ours == theirs and (len(ours) == 0 or (source.axis == 1) == (target.axis == 1)):
        return StitchPlan(source, target, None, False)
    if not theirs:
        if not is_image:
            return StitchPlan(source, target, (1,) * len(ours), True)
        side = min(ours)
        while side > 1 and source.channels * side ** len(ours) > _MOST_FEATURES:
            side -= 1
        pooled = tuple(min(one, side) for one in ours)
        return StitchPlan(source, target, None if pooled == ours else pooled, True)
    if (
        is_image
        and target.axis == 1
        and len(ours) == len(theirs)
        and all(one >= other for one, other in zip(ours, theirs, strict=True))
    ):
        return StitchPlan(source, target, theirs, False)
    raise StructureError(
        f"{called} cannot be joined: a value of {_shown(source)} would become one of "
        f"{_shown(target)}, and nothing says what belongs to the positions that it lacks"
    )


def _shown(cut: Cut) -> str:
    where = " x ".join(map(str, cut.positions))
    return f"{cut.channels} channels" + (f" at {where} positions" if where else "")


class Stitch(nn.Module):
    """Averages positions where there are too many, and maps channels to those of the next block.

    Parameters
    ----------
    plan
        How.
    weight
        ``(features + 1, channels)``: the map, and last its constant.
    """

    def __init__(self, plan: StitchPlan, weight: Tensor, like: Tensor) -> None:
        super().__init__()
        self.axis = plan.source.axis
        self.pooled = plan.pooled
        self.is_flat = plan.is_flat
        self.is_positive = plan.target.is_positive
        positions = () if plan.is_flat else plan.target.positions
        matrix, constant = weight[:-1].T, weight[-1]
        layer: Any = nn.Linear(plan.features, plan.target.channels)
        if positions and self.axis == 1:
            layer = _CONVOLUTIONS[len(positions) - 1](plan.features, plan.target.channels, 1)
        self.layer: nn.Module = layer.to(like)
        with torch.no_grad():
            layer.weight.copy_(matrix.reshape(layer.weight.shape))
            layer.bias.copy_(constant)

    def forward(self, x: Tensor) -> Tensor:
        """Return the value that the next block reads."""
        made: Tensor = self.layer(_shaped(x, self.axis, self.pooled, self.is_flat))
        return made.relu() if self.is_positive else made


def _shaped(x: Tensor, axis: int, pooled: tuple[int, ...] | None, is_flat: bool) -> Tensor:
    """Return a value with the positions that are wanted."""
    if pooled is not None and axis == 1:
        x = _POOLINGS[len(pooled) - 1](x, pooled)
    elif pooled is not None:
        x = x.mean(tuple(i for i in range(1, x.dim()) if i != axis))
    return x.flatten(1) if is_flat else x


def _rows(x: Tensor, axis: int) -> Tensor:
    """Return a value with its channels last, one row for each input and position, in float64."""
    return x.movedim(axis, -1).reshape(-1, x.size(axis)).double()


@torch.no_grad()
def fitted(
    plan: StitchPlan, pairs: Iterable[tuple[Tensor, Tensor]], ridge: float
) -> tuple[Stitch, float]:
    """Return the best stitch, and the share of the goal's variance that it leaves.

    Parameters
    ----------
    plan
        How the value is brought into form.
    pairs
        Batches: what comes out of the block before, and what the block behind reads in its own
        model.
    ridge
        The penalty on the squares of the map, relative to the mean square of what it reads.
    """
    size, channels = plan.features + 1, plan.target.channels
    gram = torch.zeros(size, size, dtype=torch.float64)
    sides = torch.zeros(size, channels, dtype=torch.float64)
    squares = torch.zeros(channels, dtype=torch.float64)
    count, like = 0, torch.empty(0)
    for x, goal in pairs:
        like = x  # what the block before puts out has the type of its weights
        x = _shaped(x, plan.source.axis, plan.pooled, plan.is_flat)
        rows = _rows(x, 1 if plan.is_flat else plan.source.axis)
        rows = F.pad(rows, (0, 1), value=1.0)
        wanted = _rows(goal, plan.target.axis)
        gram, sides, squares = gram.to(rows), sides.to(rows), squares.to(rows)
        gram += rows.T @ rows
        sides += rows.T @ wanted
        squares += wanted.square().sum(0)
        count += len(rows)
    variance = max(float((squares - sides[-1].square() / max(count, 1)).sum()), 1e-30)

    def solved(ridge: float) -> tuple[Tensor, float]:
        with one_thread():
            weight = _solved(gram, sides, ridge)
            left = squares - 2 * (weight * sides).sum(0) + (weight * (gram @ weight)).sum(0)
        return weight, float(left.sum().clamp(min=0)) / variance

    if count >= _SURE * size:
        weight, residual = solved(_NO_RIDGE)
        if residual <= _EXACT:  # the values are the same, in other channels
            return Stitch(plan, weight, like), residual
    weight, residual = solved(ridge * (1 + _SCARCE * size / max(count, 1)))
    return Stitch(plan, _scaled(weight, gram, sides[-1], squares, count), like), residual


def _scaled(weight: Tensor, gram: Tensor, sums: Tensor, squares: Tensor, count: int) -> Tensor:
    """Return a map whose outputs have the goal's deviations, where those are not far larger.

    A regression shrinks what it cannot explain, and what reads it is used to more.
    """
    mean = weight.T @ gram[-1] / count
    own = (weight * (gram @ weight)).sum(0) / count - mean.square()
    wanted = squares / count - (sums / count).square()
    factors = (wanted.clamp(min=0) / own.clamp(min=1e-30)).sqrt().clamp(1.0, _MOST_SCALED)
    scaled = weight * factors
    scaled[-1] += (1 - factors) * mean
    return scaled


def _solved(gram: Tensor, sides: Tensor, ridge: float) -> Tensor:
    """Return the map, given the penalty relative to the mean square of what it reads."""
    penalty = ridge * max(float(gram.diagonal()[:-1].mean()), 1e-30)
    damped = gram + penalty * torch.eye(len(gram)).to(gram)
    damped[-1, -1] = gram[-1, -1]  # a constant is no slope
    found: Tensor = torch.linalg.solve(damped, sides)
    return found
