"""What fused networks and their parents put out together on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import Tensor

from clafusion.execution.call import State
from clafusion.merging.mean import weighted_mean
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data, in_chunks

__all__ = ["KnownOutputs", "is_exact", "outputs_and_goals"]

KnownOutputs: TypeAlias = Sequence[tuple[tuple[Tensor, ...], Sequence[Tensor]]]
"""Inputs, in the order of the data, with what a network puts out for them."""

_TRIED, _EXACT = 16, 2e-5  # inputs, and how far their outputs may be apart, relative to the largest
_FIRST, _FAR = 2, 100.0  # of these inputs, and how many times as far no others can make good


def outputs_and_goals(
    problem: FusionProblem, states: Sequence[State], inputs: tuple[Tensor, ...]
) -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """Yield each output's node, its value with each state, and the parents' mean, in float64.

    Each parent runs once, whatever the number of states.
    """
    counted = [one for one in problem.parents if one.weights.overall > 0]
    of_states = [problem.target.run(inputs, state=one) for one in states]
    of_parents = [one.traced.run(inputs) for one in counted]
    weights = [one.weights.overall for one in counted]
    outputs = [
        (found, values)
        for found, values in zip(
            zip(*of_states, strict=True), zip(*of_parents, strict=True), strict=True
        )
        if isinstance(found[0], Tensor)
    ]
    for name, (found, values) in zip(problem.target.output_names, outputs, strict=True):
        if found[0].is_floating_point():
            goal = weighted_mean([one.double() for one in values], weights)
            yield name, [one.double() for one in found], goal


def is_exact(problem: FusionProblem, plain: State, data: Data) -> bool:
    """Say whether the average puts out what the parents put out together: nothing is to be mended.

    So it is of copies, of widened and of deepened ones, and with all weight on one parent where
    its channels are doubled. A regression would move the weights by what its ridge and its choice
    of channels leave.

    Two inputs are run first. Where their outputs are far apart the others are not run: an average
    that is exact misses by rounding alone, on every input.
    """
    target = problem.target
    counted = [one for one in problem.parents if one.weights.overall > 0]
    if target.types or any(one.output_plan is not None or one.weights.own for one in counted):
        return False  # half precision rounds too much to tell
    if (problem.owners and len(counted) > 1) or problem.is_beginning:
        return False  # they need not put out the same together
    inputs = next(iter(in_chunks(data, target, _TRIED, _TRIED, device=target.device)))
    is_cut = not any(one.takes_whole_batches for one in (target, *(one.traced for one in counted)))
    if is_cut and inputs[0].size(0) > _FIRST:
        few = tuple(one[:_FIRST] for one in inputs)
        # Goals of zero say nothing of how large others are.
        if any(gap > _FAR * _EXACT * largest > 0 for gap, largest in _misses(problem, plain, few)):
            return False
    return all(gap <= _EXACT * largest for gap, largest in _misses(problem, plain, inputs))


def _misses(
    problem: FusionProblem, state: State, inputs: tuple[Tensor, ...]
) -> Iterator[tuple[float, float]]:
    """Yield each output's largest difference from its goal, and the largest goal."""
    for _, (value,), goal in outputs_and_goals(problem, [state], inputs):
        yield float((value - goal).abs().max()), float(goal.abs().max())
