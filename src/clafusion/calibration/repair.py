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

from clafusion.calibration.epilogues import Epilogue, epilogues
from clafusion.errors import FusionWarning, InputError, warn
from clafusion.execution.call import State
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
from clafusion.profiling.moments import (
    BatchMoments,
    Moments,
    channel_moments,
    side_by_side,
)
from clafusion.tracing.layer import CalibrationPoint
from clafusion.tracing.model import TracedModel

__all__ = ["MomentGoals", "moment_goals", "repair"]

_WANTED = 10  # inputs; of fewer a warning speaks
_ROUNDING = 1e-5  # of a deviation: no data tell it more exactly
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
    sizes = problem.parents[0].profile.batch_sizes
    if any(one.profile.batch_sizes != sizes for one in problem.parents):
        raise InputError("the parents' profiles are of different batches of data")
    points = _points(problem)
    known = [_moved(one, points, sizes) for one in problem.parents]
    goals = _goals(problem, points, known, [one.weights for one in problem.parents])
    if problem.owners:
        goals = _of_owners(problem, points, known, sizes)
    rows = [
        {node: (value[row, 0], value[row, 1]) for node, value in goals.items()}
        for row in range(len(sizes) + 1)
    ]
    return MomentGoals(tuple(rows[:-1]), rows[-1])


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


def _moved(
    parent: Parent, points: Sequence[CalibrationPoint], sizes: Sequence[int]
) -> dict[str, Tensor]:
    """Return a parent's means and deviations in the target's channels, where it has any.

    ``(num_batches + 1, 2, num_channels)`` for each point: of each batch, and last of all inputs.
    """
    correspondence, moments = parent.correspondence, parent.profile.moments or ()
    found = {}
    for point in points:
        other = correspondence.points.get(point.node)
        if correspondence.origins[point.weight] == "zero_residual":
            like = next(iter(moments[0].values()))[0]
            found[point.node] = like.new_zeros(len(sizes) + 1, 2, len(point.groups))
        elif other is not None:
            of_batches = torch.stack([torch.stack(one[other.node]) for one in moments])
            values = _with_overall(of_batches, sizes)
            found[point.node] = parent.moved(values, point.node, other)
    return found


def _with_overall(moments: Tensor, sizes: Sequence[int]) -> Tensor:
    """Add the moments of all inputs to those of batches, ``(num_batches, 2, num_channels)``."""
    means, deviations = moments.unbind(1)
    shares = [size / sum(sizes) for size in sizes]
    mean = torch.stack([share * one for share, one in zip(shares, means, strict=True)]).sum(0)
    squares = deviations.square() + (means - mean).square()
    variance = torch.stack([share * one for share, one in zip(shares, squares, strict=True)]).sum(0)
    return torch.cat([moments, torch.stack([mean, variance.sqrt()])[None]])


def _goals(
    problem: FusionProblem,
    points: Sequence[CalibrationPoint],
    known: Sequence[Mapping[str, Tensor]],
    weights: Sequence[MergeWeights],
) -> dict[str, Tensor]:
    """Return the parents' weighted mean of what :func:`_moved` returns."""
    goals = {}
    for point in points:
        own = [i for i, one in enumerate(known) if point.node in one]
        masks = [problem.parents[i].covers(point.node) for i in own]
        of_parents = counted([weights[i].of(point.weight) for i in own], masks)
        goals[point.node] = weighted_mean([known[i][point.node] for i in own], of_parents)
    return goals


def _of_owners(
    problem: FusionProblem,
    points: Sequence[CalibrationPoint],
    known: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[int],
) -> dict[str, Tensor]:
    """Return the goals where each batch has those of one parent alone."""
    count = len(problem.parents)
    alone = [
        _goals(problem, points, known, [MergeWeights(float(i == owner)) for i in range(count)])
        for owner in range(count)
    ]
    goals = {}
    for node in alone[0]:
        of_batches = [alone[owner][node][batch] for batch, owner in enumerate(problem.owners)]
        goals[node] = _with_overall(torch.stack(of_batches), sizes)
    return goals


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
    steps = epilogues(target, state, points.values())
    measured = {node: Moments() for node in points}
    where = target.device
    seen = done = 0
    with torch.no_grad():
        for inputs in batches(data, target.example_inputs, target.keywords, device=where):
            if done == len(goals.batches):
                raise InputError(_other_batches(goals, "more"))
            told = observe if len(goals.batches) == 1 else None
            _run_repaired(target, state, inputs, steps, goals.batches[done], measured, told)
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
    steps: Mapping[str, Epilogue],
    goals: BatchMoments,
    measured: Mapping[str, Moments],
    observe: Callable[[tuple[Tensor, ...], list[Tensor]], None] | None = None,
) -> None:
    """Run a batch, correct every layer's output on the way, and add what was there to measured."""
    in_parts = side_by_side(target, inputs)
    sources = {one.source for one in steps.values()}
    walks = [Walk(target, part, state, set(sources), fastest=True) for part in in_parts]
    masks = masks_of_parts(kept_positions(target, inputs), in_parts)
    before: Callable[[Walk], None] | None = None
    for node, step in steps.items():
        over_parts = Moments()
        for walk, mask in zip(walks, masks, strict=True):
            if before is not None:
                before(walk)  # now, for the next layer reads what this writes
            over_parts.add(*_measured(target, walk, step, mask))
        found = step.moments(over_parts.result())
        measured[node].add(inputs[0].size(0), *found)
        scale, shift = _correction(found, goals[node], step.point.bias is not None)
        before = partial(step.run, scale=scale, shift=shift)
    if observe is not None:
        for part, walk in zip(in_parts, walks, strict=True):
            if before is not None:
                before(walk)
            observe(part, walk.output_tensors())


def _measured(
    target: TracedModel, walk: Walk, step: Epilogue, mask: Tensor | None
) -> tuple[int, Tensor, Tensor]:
    """Return how many numbers a walk has at a step's source, and its channels' moments there."""
    value = walk.reach(step.source)
    counting = counting_values(target, step.point.node, value, mask)
    kept, axis = without_masked(value, step.point.axis, counting)
    return kept.numel(), *channel_moments(kept, axis)


def _correction(
    measured: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor], can_shift: bool
) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift that bring measured statistics to the goal's.

    Of what differs by rounding alone they are 1 and 0: equal networks keep their weights.
    """
    (mean, deviation), (goal_mean, goal_deviation) = measured, goal
    alive = deviation * _LARGEST_FACTOR > goal_deviation
    alike = (deviation - goal_deviation).abs() <= _ROUNDING * goal_deviation
    factor = goal_deviation / torch.where(alive, deviation, 1.0)
    scale = torch.where(alive & ~alike, factor, 1.0)
    if not can_shift:
        return scale, torch.zeros_like(mean)
    shift = goal_mean - scale * mean
    nothing = _ROUNDING * (goal_deviation + 0.1 * goal_mean.abs())
    return scale, torch.where(shift.abs() <= nothing, 0.0, shift)
