"""Regress all layers of a fused network, anchored where the parents' features differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clafusion.calibration.least_squares.choice import choose_channels, hidden_grams
from clafusion.calibration.least_squares.hidden import hidden_channels
from clafusion.calibration.least_squares.places import regressed_places
from clafusion.calibration.least_squares.walks import Walks
from clafusion.config import LeastSquares
from clafusion.execution.call import State
from clafusion.merging.mean import average, weighted_mean
from clafusion.merging.problem import FusionProblem, MergeWeights
from clafusion.profiling.batches import Data, in_chunks

__all__ = ["anchored_weights", "regress", "regress_anchored"]

ANCHORS = (0.0, 0.8)
"""What ``"auto"`` tries."""

_CHUNK = 125  # inputs whose patches are held at once


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


def regress(
    problem: FusionProblem,
    fused: State,
    data: Data,
    *,
    ridge: float,
    samples: int,
    anchor: float = 0.0,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the fused state with every layer regressed onto the parents.

    Parameters
    ----------
    problem
        The target and its parents. Sums on a residual stream aim at the mean by the overall
        weights, inner layers at that by the weights of their own.
    fused
        The state averaged with the interior's weights.
    data
        Unlabelled inputs; the first ``samples`` are used. The activations at the current layer
        are held for all of them, of all parents and the fused network: this bounds the memory.
    anchor
        How far the interior leans towards one parent: see :func:`anchored_weights`.
    ridge
        The penalty on changes, relative to the mean square of the layer's inputs.
    samples
        How many inputs to use.
    seed
        Seed of the choice of positions.
    progress
        Called with a text and the number of layers done.
    """
    return _Regression(problem, fused, data, ridge, samples, seed).run(fused, anchor, progress)


class _Regression:
    """What regressions of a network share, however its interior is anchored."""

    def __init__(
        self,
        problem: FusionProblem,
        like: State,
        data: Data,
        ridge: float,
        samples: int,
        seed: int,
    ) -> None:
        self._problem = problem
        self._ridge = ridge
        self._seed = seed
        where = next(iter(like.values())).device
        self._inputs = list(in_chunks(data, problem.target, samples, _CHUNK, device=where))
        self._places = regressed_places(problem, like)
        self._states = [one.traced.state() for one in problem.parents]
        self._hidden = hidden_channels(problem, self._places, self._states, problem.target.state())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self._grams = hidden_grams(problem, self._hidden, self._inputs, self._states, generator)

    def run(
        self, fused: State, anchor: float, progress: Callable[[str, int], None] | None
    ) -> dict[str, Tensor]:
        """Return a state regressed; see :func:`regress`."""
        state = {name: tensor.clone() for name, tensor in fused.items()}
        weights = self._weights(anchor)
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            choices = choose_channels(
                self._problem, self._hidden, self._grams, self._states, weights
            )
            walks = Walks(
                self._problem,
                state,
                self._inputs,
                self._places,
                self._ridge,
                self._states,
                self._hidden,
                choices,
            )
            for done, place in enumerate(self._places):
                walks.solve(place, weights[place.affine.name], generator)
                if progress is not None:
                    progress("calibrate", done + 1)
        return state

    def _weights(self, anchor: float) -> dict[str, list[float]]:
        """Return the parents' weights at each layer, by its node."""
        own = [one.weights for one in self._problem.parents]
        inside = anchored_weights(self._problem, anchor)
        found = {}
        for place in self._places:
            is_output = bool((place.point.groups < 0).all())
            given = own if is_output else inside
            # The sums on a stream are the work of all its layers: no layer's own weight is theirs.
            is_sum = place.shortcut is not None
            found[place.affine.name] = [
                one.overall if is_sum else one.of(place.point.weight) for one in given
            ]
        return found


def regress_anchored(
    problem: FusionProblem,
    data: Data,
    settings: LeastSquares,
    *,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Average and regress, the interior anchored as it should be; return the state and the anchor.

    ``"auto"`` tries all of ``ANCHORS`` and takes the one whose outputs come nearest to the parents'
    weighted mean.
    """
    overall = [one.weights.overall for one in problem.parents]
    if isinstance(settings.anchor, str):
        anchors = ANCHORS if max(overall) < 1.0 else ANCHORS[:1]
    else:
        anchors = (settings.anchor,)
    best: tuple[dict[str, Tensor], float] | None = None
    least = math.inf
    plain = average(problem)
    axes = problem.target.axes_by_parameter
    # Channels leave these in no group: the outputs' parameters, which are not anchored.
    outputs = {
        name for name in plain if all(one.direction == "in" for _, one in axes.get(name, ()))
    }
    regression = _Regression(problem, plain, data, settings.ridge, settings.samples, seed)
    for anchor in anchors:
        inside = average(problem, anchored_weights(problem, anchor))
        fused = {name: plain[name] if name in outputs else inside[name] for name in plain}
        state = regression.run(fused, anchor, progress)
        distance = 0.0
        if len(anchors) > 1:
            distance = _distance(problem, state, data, settings.samples)
        if best is None or distance < least:
            best, least = (state, anchor), distance
    assert best is not None
    return best


def _distance(problem: FusionProblem, state: State, data: Data, samples: int) -> float:
    """Return the squared distance of a network's outputs from the parents' weighted mean."""
    models = [one.traced for one in problem.parents]
    weights = [one.weights.overall for one in problem.parents]
    where = next(iter(state.values())).device
    states = [one.state() for one in models]
    total = 0.0
    with torch.no_grad():
        for inputs in in_chunks(data, problem.target, samples, _CHUNK, device=where):
            outputs = problem.target.run(inputs, state=state)
            wanted = [model.run(inputs, state=of) for model, of in zip(models, states, strict=True)]
            for output, *goals in zip(outputs, *wanted, strict=True):
                if isinstance(output, Tensor) and output.is_floating_point():
                    goal = weighted_mean([one.double() for one in goals], weights)
                    total += float((output.double() - goal).square().sum())
    return total
