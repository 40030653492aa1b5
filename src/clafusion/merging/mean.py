r"""The one weighted mean: of parameters, of statistics, of outputs.

.. math:: \bar x = \frac{\sum_p w_p\, x_p}{\sum_p w_p}

over the parents that have something there. Inside a block that a parent lacks only the others
count; what such a block adds to its stream is zero for that parent. That averages the functions,
where averaging every weight with zero would shrink the block once a layer.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from clafusion.errors import InputError, check_type
from clafusion.merging.gauges import complete, gauged
from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
from clafusion.tracing.model import TracedModel

__all__ = ["Weight", "average", "counted", "shares", "weighted_mean"]

Weight = float | Tensor

_AT_ONCE = 1 << 22  # elements


def weighted_mean(values: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """Return the mean of tensors by their weights.

    A weight is a number, or a tensor that broadcasts to the values. Where no weight is above 0, the
    last value counts. Equal values give exactly that value, and a weight of 1 beside zeros exactly
    the value that it belongs to, infinite ones, too: masks of attention hold them.
    """
    mean, total = values[0], weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + weight
        if isinstance(total, Tensor):
            part = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 1.0)
            mean = _between(mean, value, part.to(mean))
        else:
            mean = _between(mean, value, float(weight / total) if total > 0 else 1.0)
    return mean


def _between(first: Tensor, second: Tensor, part: float | Tensor) -> Tensor:
    """Return ``first + part * (second - first)``, also where that difference is none of numbers."""
    found = torch.lerp(first, second, part)
    lost = found.isnan()
    if not bool(lost.any()):
        return found
    given = torch.as_tensor(part, dtype=first.dtype, device=first.device)
    mixed = (1 - given) * first + given * second
    mixed = torch.where(given == 0, first, torch.where(given == 1, second, mixed))
    return torch.where(lost, mixed, found)


def counted(weights: Sequence[float], masks: Sequence[Tensor | None]) -> list[Weight]:
    """Return the weights with which parents count, given the channels into which each moves.

    Where none of those that move there has a weight, all of them count alike.
    """
    if all(one is None for one in masks):
        return list(weights)
    shape = next(one.shape for one in masks if one is not None)
    present = [torch.ones(shape) if one is None else one.float() for one in masks]
    present = [one.double() for one in present]
    found = [weight * one for weight, one in zip(weights, present, strict=True)]
    total = torch.stack(found).sum(0)
    return [torch.where(total > 0, one, mask) for one, mask in zip(found, present, strict=True)]


def shares(weights: Sequence[float], masks: Sequence[Tensor | None]) -> list[Weight]:
    """Return what :func:`counted` does, with the sum of all weights in every channel."""
    found = counted(weights, masks)
    if not isinstance(found[0], Tensor):
        return found
    total = torch.stack([one for one in found if isinstance(one, Tensor)]).sum(0)
    scale = sum(weights) / torch.where(total > 0, total, 1.0)
    return [one * scale for one in found]


def average(
    problem: FusionProblem, weights: Sequence[MergeWeights] | None = None
) -> MutableMapping[str, Tensor]:
    """Return the weighted mean of all parents' parameters in the target's structure.

    It is kept where ``problem.storage`` says. Where the problem has ``merged`` parameters, it is
    these.

    Parameters
    ----------
    problem
        The target and its parents.
    weights
        Weights to be taken instead of the parents' own.

    Raises
    ------
    InputError
        The problem is none, or the weights are not those of its parents.
    StructureError
        Matched parameters differ in an axis that is no channel axis.
    """
    check_type(problem, FusionProblem, "problem", "a clafusion.FusionProblem")
    if weights is not None:
        of_kind = isinstance(weights, Sequence) and all(
            isinstance(one, MergeWeights) for one in weights
        )
        if not of_kind or len(weights) != len(problem.parents):
            raise InputError(
                f"weights must be {len(problem.parents)} clafusion.MergeWeights, one for each "
                f"parent; got {weights!r}"
            )
    if problem.merged is not None:
        merged = problem.storage.empty()
        for name, tensor in problem.target.state().items():
            merged[name] = problem.merged[name].to(tensor, copy=True)
        return merged
    weights = [one.weights for one in problem.parents] if weights is None else weights
    is_gauged = bool(problem.target.normalised) and _is_mixed(problem, weights)
    parents = [gauged(one) for one in problem.parents] if is_gauged else problem.parents
    states = [one.state(problem.normalisation) for one in parents]
    fused = problem.storage.empty()
    for name, tensor in problem.target.state().items():
        present = [i for i, state in enumerate(states) if name in state]
        if not present:
            fused[name] = tensor.clone()
            continue
        parents = [problem.parents[i] for i in present]
        masks = [_rows_covered(one, name, tensor) for one in parents]
        own = counted([weights[i].of(name) for i in present], masks)
        values = [states[i][name] for i in present]
        if len(values) > 1:
            fused[name] = _mean_in_parts(values, own, tensor)
        else:
            fused[name] = values[0].to(tensor, copy=True)
    if is_gauged:
        complete(fused, problem.target, states, weights)
    return fused


def _is_mixed(problem: FusionProblem, weights: Sequence[MergeWeights]) -> bool:
    """Return whether more counts than one parent that is the target itself."""
    counting = [
        one
        for one, weight in zip(problem.parents, weights, strict=True)
        if weight.overall > 0 or any(value > 0 for value in weight.own.values())
    ]
    return len(counting) != 1 or not counting[0].is_identity


def _mean_in_parts(values: Sequence[Tensor], weights: Sequence[Weight], like: Tensor) -> Tensor:
    """Return the mean, taken in float64, in the type of ``like``; a part of the rows at a time."""
    if like.numel() <= _AT_ONCE or like.dim() == 0:
        return weighted_mean([one.double() for one in values], weights).to(like)
    mean = torch.empty_like(like, memory_format=torch.contiguous_format)
    count = max(_AT_ONCE * len(like) // like.numel(), 1)
    for start in range(0, len(like), count):
        rows = slice(start, start + count)
        of_rows = [one[rows] if isinstance(one, Tensor) and one.dim() else one for one in weights]
        mean[rows] = weighted_mean([one[rows].double() for one in values], of_rows)
    return mean


def _rows_covered(parent: Parent, name: str, tensor: Tensor) -> Tensor | None:
    """Return for each entry of a parameter whether its channel is made of the parent's."""
    if all(one is None for one in parent.covered):
        return None
    target: TracedModel = parent.correspondence.target
    mask = torch.ones(tensor.shape, dtype=torch.bool)
    for group, axis in target.axes_by_parameter.get(name, ()):
        covered = parent.covered[group.index]
        if axis.direction == "out" and covered is not None:
            rows = axis.use.view(mask).movedim(axis.axis, 0)
            by_position = covered.repeat_interleave(axis.positions.size(1))
            rows[axis.positions.reshape(-1)] = by_position.view(-1, *[1] * (rows.dim() - 1))
    return mask
