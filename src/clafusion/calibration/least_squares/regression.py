"""Regress all layers of a fused network, anchored where the parents' features differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.calibration.least_squares.hidden import hidden_channels
from clafusion.calibration.least_squares.places import Place, regressed_places
from clafusion.calibration.least_squares.walks import Candidate, Walks
from clafusion.config import LeastSquares
from clafusion.errors import FusionWarning, warn
from clafusion.execution.call import State
from clafusion.merging.copies import without_copies
from clafusion.merging.mean import average
from clafusion.merging.problem import FusionProblem, MergeWeights
from clafusion.profiling.batches import Data, in_chunks

__all__ = ["Regression", "anchored_weights", "regress_anchored"]

ANCHORS = (0.0, 0.8)
"""What ``"auto"`` tries."""

_CHUNK = 125  # inputs whose patches are held at once
_MOST_OUTPUTS = 1 << 25  # numbers in the outputs of a chunk
_TRIED, _EXACT = 16, 2e-5  # inputs, and how far their outputs may be apart, relative to the largest
_FEW = 8  # inputs in a chunk at the least
_WANTED = 100  # inputs; of fewer a warning speaks
_HELD = 1 << 32  # bytes of activations that all networks together may hold
_VALUES = 3  # of a network that are alive at a time: what a layer reads and writes, and a goal


@dataclass(frozen=True)
class Regression:
    """A fused state whose layers were regressed.

    Attributes
    ----------
    state
        Its parameters and buffers.
    anchor
        How far its interior leans towards one parent.
    solved
        The names of those that were solved for, or taken from one parent as they are.
    """

    state: dict[str, Tensor]
    anchor: float
    solved: frozenset[str]


def anchored_weights(problem: FusionProblem, anchor: float) -> list[MergeWeights]:
    """Return the parents' weights inside the network.

    ``anchor`` in [0, 1] is how far they go from the parents' own to the parent that has most of the
    outputs; of equals that is the problem's reference. Those of each layer add up to 1.
    """
    own = [one.weights for one in problem.parents]
    most = max(range(len(own)), key=lambda i: (own[i].overall, i == problem.reference))

    def anchored(given: Sequence[float]) -> tuple[float, ...]:
        moved = [weight + anchor * (float(i == most) - weight) for i, weight in enumerate(given)]
        return (max(1.0 - sum(moved[1:]), 0.0), *moved[1:])

    overall = anchored([one.overall for one in own])
    names = dict.fromkeys(name for one in own for name in one.own)
    by_name = {name: anchored([one.of(name) for one in own]) for name in names}
    return [
        MergeWeights(weight, {name: of_layer[i] for name, of_layer in by_name.items()})
        for i, weight in enumerate(overall)
    ]


def regress_anchored(
    problem: FusionProblem,
    data: Data,
    settings: LeastSquares,
    *,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Regression:
    """Average and regress, the interior anchored as it should be.

    ``"auto"`` tries all of ``ANCHORS`` and takes the one whose outputs come nearest to the parents'
    weighted mean.
    """
    problem = without_copies(problem)
    anchors: tuple[float, ...] = ANCHORS
    if not isinstance(settings.anchor, str):
        anchors = (settings.anchor,)
    elif max(one.weights.overall for one in problem.parents) >= 1.0:
        anchors = ANCHORS[:1]
    plain = dict(average(problem))
    if any(
        one.is_identity and one.weights.overall >= 1.0 and not one.weights.own
        for one in problem.parents
    ):
        return Regression(plain, anchors[0], frozenset(plain))  # that parent: nothing is lost
    if _is_exact(problem, plain, data):
        return Regression(plain, anchors[0], frozenset(plain))
    fused = {anchor: _anchored(problem, plain, anchor) for anchor in anchors}
    states, distances, solved = _regressed(problem, fused, data, settings, seed, progress)
    best = distances.index(min(distances))
    return Regression(states[best], anchors[best], solved)


@torch.no_grad()
def _is_exact(problem: FusionProblem, plain: State, data: Data) -> bool:
    """Say whether the average puts out what the parents put out together: nothing is to be mended.

    So it is of copies, of widened and of deepened ones, and with all weight on one parent where
    its channels are doubled. A regression would move the weights by what its ridge and its choice
    of channels leave.
    """
    target = problem.target
    counted = [one for one in problem.parents if one.weights.overall > 0]
    if target.types or any(one.output_plan is not None or one.weights.own for one in counted):
        return False  # half precision rounds too much to tell
    inputs = next(iter(in_chunks(data, target, _TRIED, _TRIED, device=target.device)))
    found = target.run(inputs, state=plain)
    of_parents = [one.traced.run(inputs) for one in counted]
    for value, *values in zip(found, *of_parents, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        goal = sum(
            one.weights.overall * of.double() for one, of in zip(counted, values, strict=True)
        )
        assert isinstance(goal, Tensor)
        if not float((value - goal).abs().max()) <= _EXACT * float(goal.abs().max()):
            return False
    return True


def _anchored(problem: FusionProblem, plain: State, anchor: float) -> State:
    """Return the average with the interior anchored, given the one by the parents' own weights."""
    if anchor == 0.0:
        return plain
    axes = problem.target.axes_by_parameter
    # Channels leave these in no group: the outputs' parameters, which are not anchored.
    outputs = {
        name: value
        for name, value in plain.items()
        if all(one.direction == "in" for _, one in axes.get(name, ()))
    }
    return {**average(problem, anchored_weights(problem, anchor)), **outputs}


def _regressed(
    problem: FusionProblem,
    fused: Mapping[float, State],
    data: Data,
    settings: LeastSquares,
    seed: int,
    progress: Callable[[str, int], None] | None,
) -> tuple[list[dict[str, Tensor]], list[float], frozenset[str]]:
    """Regress the states, given by their anchors, side by side.

    Returns the new states, how far their outputs are from the parents' weighted mean, and the names
    of the parameters that were solved for or chosen.
    """
    like = next(iter(fused.values()))
    where = next(iter(like.values())).device
    samples = min(settings.samples, _most_inputs(problem, len(fused)))
    numbers = sum(math.prod(shape) for shape, _ in problem.target.outputs)
    chunk = min(_CHUNK, max(_MOST_OUTPUTS // max(numbers, 1), _FEW))
    inputs = list(in_chunks(data, problem.target, samples, chunk, device=where))
    num_inputs = sum(one[0].size(0) for one in inputs)
    if num_inputs < _WANTED:
        warn(
            f"least squares has {num_inputs} inputs to learn from; with fewer than {_WANTED} it "
            "may fit these and no others, which figures on the same inputs do not show: give more, "
            'or take calibration="repair"',
            FusionWarning,
        )
    places = regressed_places(problem, like)
    states = [one.traced.state() for one in problem.parents]
    hidden = hidden_channels(problem, places, states, problem.target.state())
    candidates = [
        Candidate(
            {name: tensor.clone() for name, tensor in state.items()},
            _weights(problem, places, anchor),
        )
        for anchor, state in fused.items()
    ]
    with torch.no_grad():
        walks = Walks(problem, candidates, inputs, places, hidden, states, seed)
        for done, place in enumerate(places):
            walks.solve(place, settings.ridge)
            if progress is not None:
                progress("calibrate", (done + 1) * num_inputs // len(places))
        distances = walks.distances() if len(candidates) > 1 else [0.0]
    solved = {name for place in places for name in place.parameters}
    solved |= {axis.use.parameter for one in hidden.values() for axis in one.carried}
    return [one.state for one in candidates], distances, frozenset(solved)


def _most_inputs(problem: FusionProblem, num_candidates: int) -> int:
    """Return for how many inputs all activations at one layer can be held."""
    networks = [one.traced for one in problem.parents] + [problem.target] * num_candidates
    sizes = [
        max(
            (
                math.prod(point.positions) * len(point.groups)
                for layer in network.layers
                for point in layer.hook_points
            ),
            default=1,
        )
        for network in networks
    ]
    item = next(iter(problem.target.state().values())).element_size()
    return max(_HELD // (_VALUES * item * sum(sizes)), 1)


def _weights(
    problem: FusionProblem, places: Sequence[Place], anchor: float
) -> dict[str, list[float]]:
    """Return the parents' weights at each layer, by its node."""
    own = [one.weights for one in problem.parents]
    inside = anchored_weights(problem, anchor)
    found = {}
    for place in places:
        is_output = bool((place.point.groups < 0).all())
        given = own if is_output else inside
        # The sums on a stream are the work of all its layers: no layer's own weight is theirs.
        is_sum = place.shortcut is not None
        found[place.affine.name] = [
            one.overall if is_sum else one.of(place.point.weight) for one in given
        ]
    return found
