"""The numbers of a run: for every pair, and for the models alone, as tables and maps show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from clafusion.assessment.evaluation import MEANS
from clafusion.batch.results import Pair, PairResult
from clafusion.reports.page.markup import compact, percent
from clafusion.results import RESULT

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
    """Return the measure that ranks the pairs.

    With labels that is the accuracy, or of values the loss, else agreement, distance, or the cost.
    """
    known = {one.key: one for one in measures}
    keys = ("accuracy", "loss", "agreement", "distance", "cost")
    return next((known[key] for key in keys if key in known), None)


def measures_of(
    results: Sequence[PairResult],
    accuracies: Accuracies | None = None,
    values: Mapping[str, Mapping[Pair, float]] | None = None,
) -> list[Measure]:
    """Return all measures of which a number is known, in the order in which they are shown."""
    fused = {i: one for i, one in enumerate(results) if one.error is None}
    accuracy = _given(fused, accuracies) if accuracies else _scored(fused, "accuracy")
    loss = _scored(fused, "loss")
    is_ranking = not accuracy.pairs  # of values the loss is all there is
    groups = [_assessed(fused), _gaps(fused, accuracy, loss)]
    if accuracy.pairs or loss.pairs:  # then the gaps are of them
        groups.reverse()
    found = [
        Measure("accuracy", "accuracy, %", accuracy.pairs, percent, "high", accuracy.models),
        Measure("loss", "loss", loss.pairs, _number, "low", loss.models, in_map=is_ranking),
        *chain.from_iterable(groups),
        *_sizes(fused),
        *(
            Measure(f"given{i}", label, _of_pairs(fused, numbers), _number)
            for i, (label, numbers) in enumerate((values or {}).items())
        ),
    ]
    return [one for one in found if one.values]


@dataclass(frozen=True)
class _Scores:
    """One score of the results and of both models together, by index, and of the models alone."""

    pairs: Mapping[int, float]
    models: Mapping[str, float]
    ensembles: Mapping[int, float]


def _given(fused: Mapping[int, PairResult], given: Accuracies) -> _Scores:
    return _Scores(_of_pairs(fused, given.pairs), given.models, _of_pairs(fused, given.ensembles))


def _scored(fused: Mapping[int, PairResult], name: Literal["accuracy", "loss"]) -> _Scores:
    """Return what labels said, as far as there were any."""
    pairs: dict[int, float] = {}
    models: dict[str, float] = {}
    ensembles: dict[int, float] = {}
    for i, one in fused.items():
        scores = {} if one.evaluation is None else one.evaluation.scores
        known = {key: getattr(score, name) for key, score in scores.items()}
        known = {key: value for key, value in known.items() if value is not None}
        if RESULT in known and math.isfinite(known[RESULT]):
            pairs[i] = known[RESULT]
        models |= {key: known[key] for key in (one.first, one.second) if key in known}
        together = next((known[key] for key in reversed(MEANS) if key in known), None)
        if together is not None:
            ensembles[i] = together
    return _Scores(pairs, models, ensembles)


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


def _gaps(fused: Mapping[int, PairResult], accuracy: _Scores, loss: _Scores) -> Iterable[Measure]:
    """Return how far each result is above the better parent, and above the ensemble.

    Of accuracies or losses where they are known, else of the agreement with the ensemble, else of
    distances.
    """
    is_share = bool(accuracy.pairs) or (
        not loss.pairs and any(one.agreement is not None for one in fused.values())
    )
    if accuracy.pairs or loss.pairs:
        parent, ensemble = _gaps_of(fused, accuracy if is_share else loss, 1 if is_share else -1)
    else:
        parent, ensemble = _gaps_of_nearness(fused, is_share=is_share)
    what = "loss" if loss.pairs else "distance"
    unit, show = ("points", _points) if is_share else (what, _signed)
    yield Measure("gap_parent", f"gap to better parent, {unit}", parent, show, "high")
    is_known = bool(accuracy.pairs or loss.pairs)  # by agreement it is the agreement again
    yield Measure(
        "gap_ensemble", f"gap to ensemble, {unit}", ensemble, show, "high", in_map=is_known
    )


def _gaps_of(
    fused: Mapping[int, PairResult], scores: _Scores, sign: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Return how much better each result is than the better parent, and than both together."""
    parent: dict[int, float] = {}
    ensemble: dict[int, float] = {}
    for i, value in scores.pairs.items():
        names = fused[i].first, fused[i].second
        if all(name in scores.models for name in names):
            parent[i] = sign * value - max(sign * scores.models[name] for name in names)
        if i in scores.ensembles:
            ensemble[i] = sign * (value - scores.ensembles[i])
    return parent, ensemble


def _gaps_of_nearness(
    fused: Mapping[int, PairResult], *, is_share: bool
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the same of agreements with both together, or of distances from them."""
    parent: dict[int, float] = {}
    ensemble: dict[int, float] = {}
    for i, one in fused.items():
        alone = [] if one.assessment is None else list(one.assessment.parents.values())
        if alone and is_share and one.agreement is not None:
            parent[i] = one.agreement - max(near.agreement or 0.0 for near in alone)
            ensemble[i] = one.agreement - 1
        elif alone and not is_share and math.isfinite(one.distance):
            parent[i] = min(near.distance for near in alone) - one.distance
    return parent, ensemble


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
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # no -0.0


def _signed(value: float) -> str:
    return f"{value:+.3g}"
