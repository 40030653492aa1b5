r"""REPAIR: give every layer's outputs the statistics that they should have.

Averaging networks' weights shrinks the variance of every layer's output, for their errors do not
align; most of the accuracy that fusion loses is lost here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from clafusion import _native
from clafusion.errors import FusionWarning, InputError, warn
from clafusion.execution.call import State, flatten_tensors
from clafusion.execution.lazy import LazyState
from clafusion.execution.walk import Walk
from clafusion.merging.mean import counted, weighted_mean
from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
from clafusion.profiling.batches import Data, batches
from clafusion.profiling.masks import (
    counting_values,
    kept_positions,
    masks_of_parts,
    without_masked,
)
from clafusion.profiling.moments import BatchMoments, Moments, channel_moments, is_plain, parts
from clafusion.tracing.layer import CalibrationPoint
from clafusion.tracing.model import TracedModel

__all__ = ["MomentGoals", "moment_goals", "repair"]

_WANTED = 10  # inputs; of fewer a warning speaks
_LARGEST_FACTOR = 1e3  # a channel that is all but constant carries nothing to restore


@dataclass(frozen=True)
class MomentGoals:
    """What means and standard deviations a network's layers should have.

    Attributes
    ----------
    batches
        For each batch of the data: calibration point's node -> mean and deviation of each channel.
    overall
        The same over all batches.
    """

    batches: tuple[BatchMoments, ...]
    overall: BatchMoments


def moment_goals(problem: FusionProblem) -> MomentGoals:
    r"""Return the parents' weighted mean statistics at the target's calibration points.

    Raises
    ------
    InputError
        A parent's profile has no moments, or they are of other batches.
    """
    for one in problem.parents:
        if one.profile.moments is None:
            raise InputError(
                f"the profile of {one.name!r} has no moments, which REPAIR needs: profile the "
                "model with moments=True"
            )
    of_parents = [one.profile.moments or () for one in problem.parents]
    weights = [one.weights for one in problem.parents]
    sizes = problem.parents[0].profile.batch_sizes
    if any(one.profile.batch_sizes != sizes for one in problem.parents):
        raise InputError("the parents' profiles are of different batches of data")
    points = _points(problem)
    of_batches = list(zip(*of_parents, strict=True))
    if problem.owners:
        alone = [
            [MergeWeights(float(i == owner)) for i in range(len(weights))]
            for owner in problem.owners
        ]
        goals = tuple(
            _goals(problem, points, one, of) for one, of in zip(of_batches, alone, strict=True)
        )
        return MomentGoals(goals, _overall(goals, sizes))
    goals = tuple(_goals(problem, points, one, weights) for one in of_batches)
    overall = _goals(problem, points, [_overall(one, sizes) for one in of_parents], weights)
    return MomentGoals(goals, overall)


def _points(problem: FusionProblem) -> list[CalibrationPoint]:
    """Return the calibration points at which the goal is known."""
    origins = [(one.correspondence, one.correspondence.origins) for one in problem.parents]
    # No one factor serves all that read them.
    shared = problem.target.shared_parameters | problem.frozen
    # What flows past an inserted layer does not always show: then its statistics stay as they are.
    return [
        point
        for layer in problem.target.layers
        for point in layer.calibration_points
        if shared.isdisjoint((point.weight, point.bias))
        and all(
            point.node in correspondence.points or of[point.weight] != "identity"
            for correspondence, of in origins
        )
        and any(
            point.node in correspondence.points or of[point.weight] == "zero_residual"
            for correspondence, of in origins
        )
    ]


def _overall(moments: Sequence[BatchMoments], sizes: Sequence[int]) -> BatchMoments:
    total: dict[str, Moments] = {}
    for batch, size in zip(moments, sizes, strict=True):
        for node, (mean, deviation) in batch.items():
            total.setdefault(node, Moments()).add(size, mean, deviation)
    return {node: one.result() for node, one in total.items()}


def _goals(
    problem: FusionProblem,
    points: Sequence[CalibrationPoint],
    moments: Sequence[BatchMoments],
    given: Sequence[MergeWeights],
) -> BatchMoments:
    goals = {}
    for point in points:
        values, weights, masks = [], [], []
        for parent, known, own in zip(problem.parents, moments, given, strict=True):
            value = _moved(parent, point, known)
            if value is not None:
                values.append(value)
                weights.append(own.of(point.weight))
                masks.append(parent.covers(point.node))
        mean, deviation = weighted_mean(values, counted(weights, masks))
        goals[point.node] = mean, deviation
    return goals


def _moved(parent: Parent, point: CalibrationPoint, known: BatchMoments) -> Tensor | None:
    """Return a parent's statistics ``(2, num_channels)`` in the target's channels, or None."""
    correspondence = parent.correspondence
    if correspondence.origins[point.weight] == "zero_residual":
        like = next(iter(known.values()))[0]
        return like.new_zeros(2, len(point.groups))
    other = correspondence.points.get(point.node)
    if other is None:
        return None
    return parent.moved(torch.stack(known[other.node]), point.node, other)


def repair(
    target: TracedModel,
    state: State,
    data: Data,
    goals: MomentGoals,
    *,
    progress: Callable[[str, int], None] | None = None,
    observe: Callable[[tuple[Tensor, ...], list[Tensor]], None] | None = None,
) -> State:
    r"""Rescale and shift every layer's outputs to the statistics that they should have (REPAIR).

    With :math:`\mu_y, \sigma_y` a channel's mean and standard deviation over inputs and positions,
    and :math:`\mu, \sigma` those that it should have, the network's pre-activations ``y`` become

    .. math:: \frac{y - \mu_y}{\sigma_y}\, \sigma + \mu

    (Jordan et al., arXiv 2211.08403, section 4). The change is folded into the layer's weights, or
    into those of the BatchNorm that follows it, so that networks without norm layers are served as
    well. The network runs on every batch once; within a batch, each layer sees inputs that are
    repaired already.

    Parameters
    ----------
    target
        The network's structure.
    state
        Its weights, for example the mean of several networks'.
    data
        The inputs over which the goals are; in the same batches.
    goals
        The statistics: see :func:`moment_goals`.
    progress
        Called with a text and the number of inputs done.
    observe
        Called with inputs that ran side by side and what the network puts out for them, where the
        data are one batch: then this is what the repaired parameters give, up to rounding.

    Returns
    -------
    State
        The state with the repaired parameters, which are made when they are read.

    Raises
    ------
    InputError
        The data has other batches than the goals.
    """
    by_node = {one.node: one for layer in target.layers for one in layer.calibration_points}
    order = [one.name for one in target.module.graph.nodes]  # as they are computed
    points = {node: by_node[node] for node in order if node in by_node and node in goals.overall}
    measured = {node: Moments() for node in points}
    where = target.device
    seen = done = 0
    with torch.no_grad():
        for inputs in batches(data, target.example_inputs, target.keywords, device=where):
            if done == len(goals.batches):
                raise InputError(_other_batches(goals, "more"))
            told = observe if len(goals.batches) == 1 else None
            _run_repaired(target, state, inputs, points, goals.batches[done], measured, told)
            done += 1
            seen += inputs[0].size(0)
            if progress is not None:
                progress("calibrate", seen)
    if done < len(goals.batches):
        raise InputError(_other_batches(goals, "fewer"))
    if points and seen < _WANTED:
        warn(
            f"REPAIR has {seen} inputs to learn from; statistics of fewer than {_WANTED} may be "
            'far from those of others: give more, or take calibration="none"',
            FusionWarning,
        )
    changes: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for node, point in points.items():
        scale, shift = _correction(
            measured[node].result(), goals.overall[node], point.bias is not None
        )
        changes.setdefault(point.weight, []).append(partial(point.scaled, factors=scale))
        if point.bias is not None:
            changes.setdefault(point.bias, []).append(
                partial(_moved_bias, scale=scale, shift=shift)
            )

    def make(name: str) -> Tensor:
        return reduce(lambda value, change: change(value), changes.get(name, ()), state[name])

    return LazyState(state, make)


def _moved_bias(bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (bias.double() * scale + shift).to(bias)


def _other_batches(goals: MomentGoals, has: str) -> str:
    return (
        f"the goals are of {len(goals.batches)} batches, data has {has}: profile the parents on "
        "the same data"
    )


def _run_repaired(
    target: TracedModel,
    state: State,
    inputs: tuple[Tensor, ...],
    points: Mapping[str, CalibrationPoint],
    goals: BatchMoments,
    measured: Mapping[str, Moments],
    observe: Callable[[tuple[Tensor, ...], list[Tensor]], None] | None = None,
) -> None:
    """Run a batch, correct every layer's output on the way, and add what was there to measured."""
    in_parts = parts(target, inputs)
    walks = [Walk(target, part, state, set(points)) for part in in_parts]
    masks = masks_of_parts(kept_positions(target, inputs), in_parts)
    before: tuple[CalibrationPoint, Tensor, Tensor] | None = None
    for node, point in points.items():
        over_parts = Moments()
        for walk, mask in zip(walks, masks, strict=True):
            if before is not None:
                _correct(walk, *before)
            value = walk.reach(node)
            counting = counting_values(target, node, value, mask)
            kept, axis = without_masked(value, point.axis, counting)
            over_parts.add(kept.numel(), *channel_moments(kept, axis))
        found = over_parts.result()
        measured[node].add(inputs[0].size(0), *found)
        scale, shift = _correction(found, goals[node], point.bias is not None)
        before = point, scale, shift
    if observe is not None:
        for part, walk in zip(in_parts, walks, strict=True):
            if before is not None:
                _correct(walk, *before)
            observe(part, list(flatten_tensors(list(walk.finish()))))


def _correct(walk: Walk, point: CalibrationPoint, scale: Tensor, shift: Tensor) -> None:
    # In place: the output is the layer's own, and new memory takes longer to get than to fill.
    value = walk.reach(point.node)
    if is_plain(value):
        _native.scale_channels(value, point.axis, scale, shift)
    else:
        shape = [1] * value.dim()
        shape[point.axis] = -1
        value.mul_(scale.to(value).view(shape)).add_(shift.to(value).view(shape))
    walk.release(point.node)


def _correction(
    measured: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor], can_shift: bool
) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift that bring measured statistics to the goal's."""
    (mean, deviation), (goal_mean, goal_deviation) = measured, goal
    alive = deviation * _LARGEST_FACTOR > goal_deviation
    scale = torch.where(alive, goal_deviation / torch.where(alive, deviation, 1.0), 1.0)
    shift = goal_mean - scale * mean if can_shift else torch.zeros_like(mean)
    return scale, shift
