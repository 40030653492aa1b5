"""The numbers of a run: for every pair, and for the models alone, as tables and maps show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from clafusion.batch.results import Pair, PairResult
from clafusion.reports.page.markup import compact, percent

__all__ = ["Accuracies", "Measure", "measures_of", "quality_of"]


@dataclass(frozen=True)
class Accuracies:
    """Accuracies on labelled data, from 0 to 1. What is not known is left out.

    Attributes
    ----------
    pairs
        Of the fused networks, by the names of their first and second model.
    models
        Of the models alone, by name.
    ensembles
        Of both models' outputs together, by the names of the pair.
    """

    pairs: Mapping[Pair, float] = field(default_factory=dict)
    models: Mapping[str, float] = field(default_factory=dict)
    ensembles: Mapping[Pair, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """One number of every pair, as far as it is known.

    Attributes
    ----------
    key
        What the page's code calls it.
    title
        What the page calls it, with its unit.
    values
        By the index of the pair among all results.
    show
        How a number is written.
    better
        Which end is good; None where neither is.
    models
        The same number of the models alone, by name.
    in_map, in_table
        Whether it has a heat map, and a column in the table of pairs.
    """

    key: str
    title: str
    values: Mapping[int, float]
    show: Callable[[float], str]
    better: Literal["high", "low"] | None = None
    models: Mapping[str, float] = field(default_factory=dict)
    in_map: bool = True
    in_table: bool = True


def quality_of(measures: Sequence[Measure]) -> Measure | None:
    """Return the measure that ranks the pairs: accuracy, else agreement, distance, or the cost."""
    known = {one.key: one for one in measures}
    keys = ("accuracy", "agreement", "distance", "cost")
    return next((known[key] for key in keys if key in known), None)


def measures_of(
    results: Sequence[PairResult],
    accuracies: Accuracies | None = None,
    values: Mapping[str, Mapping[Pair, float]] | None = None,
) -> list[Measure]:
    """Return all measures of which a number is known, in the order in which they are shown."""
    fused = {i: one for i, one in enumerate(results) if one.error is None}
    given = accuracies or Accuracies()
    found = [
        Measure(
            "accuracy", "accuracy, %", _of_pairs(fused, given.pairs), percent, "high", given.models
        ),
        *_assessed(fused),
        *_gaps(fused, given),
        *_sizes(fused),
        *(
            Measure(f"given{i}", label, _of_pairs(fused, numbers), _number)
            for i, (label, numbers) in enumerate((values or {}).items())
        ),
    ]
    return [one for one in found if one.values]


def _assessed(fused: Mapping[int, PairResult]) -> Iterable[Measure]:
    agreements = {i: one.agreement for i, one in fused.items()}
    distances = {i: one.distance for i, one in fused.items()}
    yield Measure(
        "agreement",
        "agreement, %",
        {i: one for i, one in agreements.items() if one is not None},
        percent,
        "high",
        _alone(fused.values(), lambda near: near.agreement),
    )
    yield Measure(
        "distance",
        "distance",
        {i: one for i, one in distances.items() if math.isfinite(one)},
        _number,
        "low",
        _alone(fused.values(), lambda near: near.distance),
    )


def _alone(results: Iterable[PairResult], number: Callable[..., float | None]) -> dict[str, float]:
    """Return each model's mean number over its pairs: how near it alone is to both together."""
    found: dict[str, list[float]] = {}
    for one in results:
        if one.assessment is not None:
            for name, near in one.assessment.parents.items():
                value = number(near)
                if value is not None and math.isfinite(value):
                    found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def _gaps(fused: Mapping[int, PairResult], given: Accuracies) -> Iterable[Measure]:
    """Return how far each result is above the better parent, and above the ensemble.

    Of accuracies where they are given, else of the agreement with the ensemble, else of distances.
    """
    parent: dict[int, float] = {}
    ensemble: dict[int, float] = {}
    is_share = bool(given.pairs) or any(one.agreement is not None for one in fused.values())
    for i, one in fused.items():
        pair = one.first, one.second
        if given.pairs:
            if pair in given.pairs and all(name in given.models for name in pair):
                parent[i] = given.pairs[pair] - max(given.models[name] for name in pair)
            if pair in given.pairs and pair in given.ensembles:
                ensemble[i] = given.pairs[pair] - given.ensembles[pair]
        elif is_share and one.assessment is not None and one.agreement is not None:
            near = [alone.agreement or 0.0 for alone in one.assessment.parents.values()]
            parent[i] = one.agreement - max(near)
            ensemble[i] = one.agreement - 1
        elif not is_share and one.assessment is not None and math.isfinite(one.distance):
            near = [alone.distance for alone in one.assessment.parents.values()]
            parent[i] = min(near) - one.distance
    unit, show = ("points", _points) if is_share else ("distance", _signed)
    yield Measure("gap_parent", f"gap to better parent, {unit}", parent, show, "high")
    yield Measure(
        "gap_ensemble", f"gap to ensemble, {unit}", ensemble, show, "high", in_map=bool(given.pairs)
    )


def _sizes(fused: Mapping[int, PairResult]) -> Iterable[Measure]:
    costs = {i: one.alignment.total_cost for i, one in fused.items() if one.alignment is not None}
    yield Measure("cost", "alignment cost", costs, "{:.3f}".format, "low")
    parents = {name: facts for one in fused.values() for name, facts in one.models.items()}
    for key in ("parameters", "operations"):
        found = {i: getattr(one, key) for i, one in fused.items()}
        own = {name: getattr(facts, key) for name, facts in parents.items()}
        yield Measure(
            key,
            key,
            {i: one for i, one in found.items() if one is not None},
            compact,
            "low",
            {name: one for name, one in own.items() if one is not None},
            in_map=False,
        )
    seconds = {i: math.fsum(one.seconds.values()) for i, one in fused.items()}
    yield Measure("seconds", "seconds", seconds, "{:.2f}".format, "low")


def _of_pairs(fused: Mapping[int, PairResult], numbers: Mapping[Pair, float]) -> dict[int, float]:
    found = {i: numbers.get((one.first, one.second)) for i, one in fused.items()}
    return {i: float(one) for i, one in found.items() if one is not None and math.isfinite(one)}


def _number(value: float) -> str:
    return f"{value:.3g}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"
