"""What fused networks and their parents put out together on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from clafusion.execution.call import State
from clafusion.merging.mean import weighted_mean
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data, in_chunks

__all__ = ["is_exact", "outputs_and_goals"]

_TRIED, _EXACT = 16, 2e-5  # inputs, and how far their outputs may be apart, relative to the largest


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
    """
    target = problem.target
    counted = [one for one in problem.parents if one.weights.overall > 0]
    if target.types or any(one.output_plan is not None or one.weights.own for one in counted):
        return False  # half precision rounds too much to tell
    if (problem.owners and len(counted) > 1) or problem.is_beginning:
        return False  # they need not put out the same together
    inputs = next(iter(in_chunks(data, target, _TRIED, _TRIED, device=target.device)))
    return all(
        float((value - goal).abs().max()) <= _EXACT * float(goal.abs().max())
        for _, (value,), goal in outputs_and_goals(problem, [plain], inputs)
    )
