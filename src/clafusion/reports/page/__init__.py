"""The outcome of many pairs as one HTML file that needs nothing else, and no network.

Without scripts the page has all tables, maps and plots; its code adds sorting, filtering, copying
and the pictures of alignments.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from clafusion.batch.named_tasks import NamedResult
from clafusion.batch.results import Pair, PairResult
from clafusion.errors import InputError, check_type
from clafusion.reports.page.details import detail, page_data
from clafusion.reports.page.failures import failures
from clafusion.reports.page.heatmaps import heatmaps
from clafusion.reports.page.markup import element, section, text
from clafusion.reports.page.measures import Accuracies, Measure, measures_of, quality_of
from clafusion.reports.page.scatter import scatter
from clafusion.reports.page.sections import (
    leaderboard,
    lines_to_load,
    models_table,
    ranked,
    run_facts,
    settings,
    stages,
)
from clafusion.reports.page.tasks import counted_tasks, task_tiles, tasks_sections
from clafusion.weights.atomic import check_output, replacing

__all__ = ["Accuracies", "write_report"]


def write_report(
    results: Sequence[PairResult],
    path: str | os.PathLike[str],
    *,
    chosen: Pair | None = None,
    accuracies: Accuracies | None = None,
    values: Mapping[str, Mapping[Pair, float]] | None = None,
    run: Mapping[str, str] | None = None,
    tasks: Sequence[NamedResult] = (),
) -> None:
    """Write a page about many pairs: one HTML file, for any browser, without a network.

    It has a table of all pairs that can be sorted and filtered, heat maps, the alignment costs
    against the quality, pairs in detail, failures by cause, the models, and time and memory by
    stage; and a table of merges and one of reassemblies, where there are any. The same arguments
    give the same bytes.

    Parameters
    ----------
    results
        What :func:`clafusion.fuse_pairs` gave.
    path
        A ``.html`` file. An old one stays as it is until the new one is complete.
    chosen
        A pair that is shown in detail beside the best and the worst one. Any other can be chosen on
        the page.
    accuracies
        Accuracies on labelled data of your own. They rank the pairs then, and stand in place of
        those that :func:`clafusion.fuse_pairs` measured, if it had labels. Without either the
        agreements do.
    values
        More numbers of pairs, by what they are called: each gets a heat map and a column.
    run
        What the page says of the run, for example its ``"command"``, ``"date"`` and ``"data"``.
    tasks
        What became of merges and reassemblies: see :mod:`clafusion.batch.named_tasks`.

    Raises
    ------
    InputError
        An argument is of another kind, ``chosen`` or a pair in ``accuracies`` or ``values`` is none
        of the results or was not fused, or the file cannot be written.
    """
    path = check_output(path, (".html",), "report")
    _check_kinds(results, accuracies, values, run, tasks)
    _check_pairs(results, chosen, accuracies, values or {})
    measures = measures_of(results, accuracies, values)
    quality = quality_of(measures)
    order = ranked(results, quality)
    shown = _shown_in_detail(results, order, chosen)
    page = Template(_file("page.html")).substitute(
        title=f"clafusion: {text(_counted(results, tasks))}",
        style=_file("page.css"),
        code=_file("page.js"),
        header=_header(results, quality, run or {}, tasks),
        sections="\n".join([*_sections(results, measures, quality, shown), *tasks_sections(tasks)]),
        data=page_data(results, [*shown, *order]),
    )
    with replacing(path, "report") as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def _check_kinds(results: Any, accuracies: Any, values: Any, run: Any, tasks: Any) -> None:
    """Refuse arguments of another kind, by their names."""
    check_type(results, Sequence, "results", "a list of results of clafusion.fuse_pairs")
    for i, one in enumerate(results):
        check_type(one, PairResult, f"results[{i}]", "a result of clafusion.fuse_pairs")
    if accuracies is not None:
        check_type(accuracies, Accuracies, "accuracies", "an Accuracies")
    for name, given in (("values", values), ("run", run)):
        if given is not None:
            check_type(given, Mapping, name, "a mapping")
    for name, numbers in (values or {}).items():
        check_type(numbers, Mapping, f"values[{name!r}]", "a mapping of pairs to numbers")
    check_type(tasks, Sequence, "tasks", "a list of what became of merges and reassemblies")
    for i, one in enumerate(tasks):
        check_type(one, NamedResult, f"tasks[{i}]", "what became of a merge or a reassembly")


def _check_pairs(
    results: Sequence[PairResult],
    chosen: Pair | None,
    accuracies: Accuracies | None,
    values: Mapping[str, Mapping[Pair, float]],
) -> None:
    fused = {(one.first, one.second) for one in results if one.error is None}
    given: list[Pair] = [] if chosen is None else [chosen]
    if accuracies is not None:
        given += [*accuracies.pairs, *accuracies.ensembles]
    for numbers in values.values():
        given += numbers
    for pair in given:
        if not isinstance(pair, Sequence) or tuple(pair) not in fused:
            raise InputError(f"the report has no fused pair {pair!r}; check the names' order")


def _file(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _shown_in_detail(
    results: Sequence[PairResult], order: Sequence[int], chosen: Pair | None
) -> dict[int, str]:
    """Return the pairs that are shown in detail, each with its heading."""
    shown: dict[int, str] = {}
    if chosen is not None:
        place = next(i for i in order if (results[i].first, results[i].second) == tuple(chosen))
        shown[place] = "Chosen pair"
    if order:
        shown.setdefault(order[0], "Best pair" if len(order) > 1 else "The pair")
        shown.setdefault(order[-1], "Worst pair")
    return shown


# --- the page's parts -----------------------------------------------------------------------------


def _counted(results: Sequence[PairResult], tasks: Sequence[NamedResult]) -> str:
    """Return what the page is about: how many pairs, merges and reassemblies."""
    several = "" if len(results) == 1 else "s"
    pairs = [f"{len(results)} pair{several}"] if results or not tasks else []
    return ", ".join([*pairs, *([counted_tasks(tasks)] if tasks else [])])


def _header(
    results: Sequence[PairResult],
    quality: Measure | None,
    run: Mapping[str, str],
    tasks: Sequence[NamedResult],
) -> str:
    names = {name for one in results for name in (one.first, one.second)}
    names |= {name for one in tasks for name in one.models}
    tiles = _tiles(results, quality) if results or not tasks else {}
    failed = sum(one.error is not None for one in results)
    resumed = sum(one.resumed for one in results)
    told = f"{len(results) - failed} fused, {failed} failed"
    told += f", {resumed} taken over from an earlier run." if resumed else "."
    tiles |= task_tiles(tasks)
    return (
        element("h1", text(f"{_counted(results, tasks)} of {len(names)} models"))
        + (element("p", text(told)) if results or not tasks else "")
        + element(
            "ul",
            *(
                element("li", element("b", text(value)), element("span", text(name)))
                for name, value in tiles.items()
            ),
            class_="tiles",
        )
        + run_facts(run)
        + settings(results)
    )


def _tiles(results: Sequence[PairResult], quality: Measure | None) -> dict[str, str]:
    """Return the large figures about the pairs, by what they are."""
    failed = sum(one.error is not None for one in results)
    tiles = {"pairs fused": f"{len(results) - failed} of {len(results)}"}
    if quality is not None:
        numbers = list(quality.values.values())
        name, _, unit = quality.title.partition(", ")
        best = max(numbers) if quality.better == "high" else min(numbers)
        sign = " %" if unit == "%" else ""
        tiles[f"best {name}"] = quality.show(best) + sign
        tiles[f"median {name}"] = quality.show(statistics.median(numbers)) + sign
    tiles["seconds, all pairs"] = f"{math.fsum(s for r in results for s in r.seconds.values()):.1f}"
    return tiles


def _sections(
    results: Sequence[PairResult],
    measures: Sequence[Measure],
    quality: Measure | None,
    shown: Mapping[int, str],
) -> list[str]:
    parts = []
    if shown:
        parts.append(
            section(
                "board",
                "All pairs",
                element("p", _BOARD, class_="note"),
                leaderboard(results, measures, quality),
                lines_to_load(results),
            )
        )
        parts.append(section("maps", "Heat maps", heatmaps(results, measures)))
        parts.append(_plots(results, measures, quality))
        details = "".join(detail(results[i], i, heading) for i, heading in shown.items())
        waiting = element("div", id="opened", aria_live="polite")
        parts.append(section("details", "Pairs in detail", _OPEN, waiting, details))
    failed = failures(results)
    if failed:
        parts.append(section("failures", "Failures by cause", failed))
    if results:
        parts.append(section("models", "Models", models_table(results, measures)))
    timed = stages(results)
    if timed:
        note = element("p", _STAGES, class_="note")
        parts.append(section("stages", "Time and memory by stage", timed, note))
    return parts


def _plots(
    results: Sequence[PairResult], measures: Sequence[Measure], quality: Measure | None
) -> str:
    known = {one.key: one for one in measures}
    cost = known.get("cost")
    plots = []
    if cost is not None and quality is not None and quality is not cost:
        plots.append(scatter(results, cost, quality))
    if quality is not None and quality.key in ("accuracy", "loss") and "agreement" in known:
        plots.append(scatter(results, known["agreement"], quality))
    if not plots:
        return ""
    note = element("p", _COSTS, class_="note")
    drawn = element("div", *plots, class_="plots")
    return section("plots", "Alignment cost against quality", note, drawn)


_BOARD = (
    "Agreement and distance say how near the fused network comes to what both models put out "
    "together, the ensemble, on inputs that were kept out of the fusion. A distance "
    "is a Kullback-Leibler divergence in nats, or of values a relative squared error: less is "
    "better. Accuracy and loss are on the labels of the same inputs. Gaps are of accuracies where "
    "the page has them, else of agreements or distances; "
    "above 0 the fused network is better. Operations are floating-point ones for one input; a "
    "multiplication and an addition are two."
)
_COSTS = (
    "The cost of an alignment says how different the matched layers are. It says little about "
    "the result: over 21 pairs each of two sets of networks its rank correlation "
    "with the accuracy was -0.35 and +0.19, that of the agreement 0.95 and 0.82. Hollow points: "
    "the networks' structures admit one alignment only, so the costs decided nothing."
)
_STAGES = (
    "Work that pairs share is counted in the pair for which it was done. Memory: what was held at "
    "the most in any pair. On a GPU it is PyTorch's, there. Elsewhere it is that of the whole "
    "process, exact for the stage that held the most; of the others only what was held at the "
    "beginning or the end is known."
)
_OPEN = (
    '<p class="note scripted">A row of the table, a square of a map or a point of a plot opens its '
    "pair here.</p>"
)
