"""How far the interior leans towards one parent: what is tried, and how it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.calibration.outputs import outputs_and_goals
from clafusion.config import LeastSquares
from clafusion.execution.call import State
from clafusion.merging.problem import FusionProblem, MergeWeights
from clafusion.profiling.masks import counting_values, kept_positions, zeroed

__all__ = [
    "ANCHORS",
    "FULL",
    "Lean",
    "Trial",
    "anchored_weights",
    "leans",
    "nearest",
    "output_distances",
]

ANCHORS = (0.0, 0.9)
"""The anchors that ``"auto"`` tries towards the parent with the largest weight."""
FULL = 1.0
"""The one that it tries as well towards each parent: its interior alone, with all their outputs."""

_PART, _LEAST_PART = 8, 3  # one of so many inputs is regressed, and another one compared
_CLEARLY = 0.8  # of the squared distance of what gives up less of the parents
_ROWS = 32  # of the outputs, that are regressed at the least


@dataclass(frozen=True)
class Lean:
    """How far the interior goes from the parents' own weights, in [0, 1], and to which parent."""

    anchor: float
    toward: int


def leans(problem: FusionProblem, settings: LeastSquares) -> tuple[Lean, ...]:
    """Return what is to be tried, as the settings ask for it."""
    most = problem.largest
    own = [one.weights.overall for one in problem.parents]
    if problem.merged is not None:  # whose interior leans towards nobody
        return (Lean(0.0, most),)
    others: list[int] = []
    if max(own) < 1.0 and settings.toward != "largest":
        others = [i for i, weight in enumerate(own) if weight > 0 and i != most]
    if not isinstance(settings.anchor, str):
        anchor = settings.anchor
        aims = [most, *others] if anchor > 0 and settings.toward == "any" else [most]
        return tuple(Lean(anchor, i) for i in aims)
    if problem.is_beginning or max(own) >= 1.0:  # no output tells which one is the best
        return (Lean(0.0, most),)
    found = [Lean(anchor, most) for anchor in ANCHORS]
    if others:
        found += [Lean(FULL, i) for i in (most, *others)]
    return tuple(found)


def nearest(
    problem: FusionProblem, toward: str, tried: Sequence[Lean], far: Sequence[float]
) -> Lean:
    """Return what is to be taken of several, given how far each one's outputs are off, squared.

    A lean gives up what a parent knows. On inputs that another one was trained on that does not
    show: there its own features tell what it has learnt by heart. So what gives up more must come
    clearly nearer: one parent's interior alone than any other way, unless the settings ask for
    ``toward`` any; and where the parents put out a mean of probabilities, as they learnt different
    things, any lean than none.
    """
    order = sorted(range(len(tried)), key=lambda i: far[i])
    best = order[0]
    if toward == "auto" and tried[best].anchor == FULL:
        parts = [i for i in order if tried[i].anchor < FULL]
        if parts and far[best] > _CLEARLY * far[parts[0]]:
            best = parts[0]
    if problem.combination.means == "probabilities":
        for i, one in enumerate(tried):
            if one.anchor == 0.0 and far[best] > _CLEARLY * far[i]:
                return one
    return tried[best]


def anchored_weights(problem: FusionProblem, lean: Lean) -> list[MergeWeights]:
    """Return the parents' weights inside the network: ``w + anchor * ([i = toward] - w)``.

    Those of each layer add up to 1.
    """
    own = [one.weights for one in problem.parents]

    def anchored(given: Sequence[float]) -> tuple[float, ...]:
        moved = [
            weight + lean.anchor * (float(i == lean.toward) - weight)
            for i, weight in enumerate(given)
        ]
        return (max(1.0 - sum(moved[1:]), 0.0), *moved[1:])

    overall = anchored([one.overall for one in own])
    names = dict.fromkeys(name for one in own for name in one.own)
    by_name = {name: anchored([one.of(name) for one in own]) for name in names}
    return [
        MergeWeights(weight, {name: of_layer[i] for name, of_layer in by_name.items()})
        for i, weight in enumerate(overall)
    ]


@dataclass(frozen=True)
class Trial:
    """Inputs on which all anchors are regressed, and others on which they are compared.

    Both are spread over all inputs, which may be sorted.
    """

    regressed: list[tuple[Tensor, ...]]
    compared: list[tuple[Tensor, ...]]

    @classmethod
    def of(cls, inputs: Sequence[tuple[Tensor, ...]], positions: int) -> Trial | None:
        """Part inputs, which come in batches; None where they are too few.

        ``positions`` is how many rows of outputs an input has.
        """
        whole = [torch.cat(one) for one in zip(*inputs, strict=True)]
        part = min(_PART, len(whole[0]) * positions // _ROWS)
        if part < _LEAST_PART:
            return None
        chunk = max(len(one[0]) for one in inputs)
        regressed, compared = (
            list(zip(*(one[first::part].split(chunk) for one in whole), strict=True))
            for first in (0, part // 2)
        )
        return cls(regressed, compared)


def output_distances(
    problem: FusionProblem, states: Sequence[State], inputs: Sequence[tuple[Tensor, ...]]
) -> list[float]:
    """Return how far each state's outputs are from the parents' weighted mean: sums of squares."""
    far = [0.0] * len(states)
    for batch in inputs:
        mask = kept_positions(problem.target, batch)
        for name, found, goal in outputs_and_goals(problem, states, batch):
            counting = counting_values(problem.target, name, goal, mask)
            for i, value in enumerate(found):
                far[i] += float(zeroed(value - goal, counting).square().sum())
    return far
