"""Heat maps of all pairs, as tables: a row for each first model, a column for each second one."""

from __future__ import annotations

from collections.abc import Sequence

from clafusion.batch.results import PairResult
from clafusion.reports.page.markup import element, scrollable, text
from clafusion.reports.page.measures import Measure

__all__ = ["NUM_COLOURS", "colour_of", "heatmaps"]

NUM_COLOURS = 10
_MOST_COLUMNS = 14  # with numbers in the cells; more are squares, whose number is told on touch


def colour_of(value: float, low: float, high: float, *, is_low_good: bool = False) -> int:
    """Return which colour a value between two others has: 0 is the worst, and pale."""
    share = (value - low) / (high - low) if high > low else 0.5
    share = 1 - share if is_low_good else share
    return min(NUM_COLOURS - 1, max(0, int(share * NUM_COLOURS)))


def heatmaps(results: Sequence[PairResult], measures: Sequence[Measure]) -> str:
    """Return a map for each measure, and radio buttons that switch between them without code."""
    shown = [one for one in measures if one.in_map]
    if not shown:
        return ""
    switch = "".join(
        element("input", type="radio", name="map", id=f"map-{one.key}", checked=i == 0).replace(
            "</input>", ""
        )
        + element("label", text(one.title), for_=f"map-{one.key}")
        for i, one in enumerate(shown)
    )
    legend = element("legend", "Show")
    maps = "".join(element("div", _map(results, one), class_="map") for one in shown)
    return element("fieldset", legend, switch, maps, class_="maps")


def _map(results: Sequence[PairResult], measure: Measure) -> str:
    firsts = list(dict.fromkeys(one.first for one in results))
    seconds = list(dict.fromkeys(one.second for one in results))
    # Models that are all on one side only have no diagonal: a row and a column show them.
    is_square = not set(firsts).isdisjoint(seconds)
    names = list(dict.fromkeys(name for one in results for name in (one.first, one.second)))
    rows, columns = (names, names) if is_square else (firsts, seconds)
    low, high = _range(measure)
    places = {(one.first, one.second): i for i, one in enumerate(results)}

    def cell(first: str, second: str) -> str:
        if first == second:
            return alone(first)
        place = places.get((first, second))
        if place is None:
            return "<td></td>"
        value = measure.values.get(place)
        if value is None:
            failed = results[place].error is not None
            return element("td", "failed" if failed else "unknown", class_="none")
        colour = colour_of(value, low, high, is_low_good=measure.better == "low")
        return f'<td class="c{colour}" data-p="{place}">{text(measure.show(value))}</td>'

    def alone(name: str) -> str:
        value = measure.models.get(name)
        if value is None:
            return '<td class="own"></td>'
        colour = colour_of(value, low, high, is_low_good=measure.better == "low")
        return element("td", text(measure.show(value)), class_=f"own c{colour}")

    titles = [*([] if is_square else ["alone"]), *columns]
    head = "".join(
        element("th", element("span", text(name)), scope="col", title=name) for name in titles
    )
    lines = [element("tr", element("td"), head)]
    if not is_square and measure.models:
        cells = "".join(alone(name) for name in columns)
        lines.append(element("tr", element("th", "alone", scope="row"), "<td></td>", cells))
    for first in rows:
        beside = "" if is_square else alone(first)
        cells = "".join(cell(first, second) for second in columns)
        title = element("th", element("span", text(first)), scope="row", title=first)
        lines.append(element("tr", title, beside, cells))
    kind = "heat dense" if len(titles) > _MOST_COLUMNS else "heat"
    caption = f"{measure.title}: rows are first models, columns second ones"
    table = element("table", element("caption", text(caption)), *lines, class_=kind)
    return scrollable(table, caption) + _legend(measure, low, high)


def _range(measure: Measure) -> tuple[float, float]:
    every = [*measure.values.values(), *measure.models.values()]
    return min(every), max(every)


def _legend(measure: Measure, low: float, high: float) -> str:
    ends = [measure.show(low), measure.show(high)]
    if measure.better == "low":
        ends.reverse()
    if measure.better is not None:
        ends[1] += " (best)"
    bar = "".join(f'<i class="c{i}"></i>' for i in range(NUM_COLOURS))
    own = "Framed: the models alone." if measure.models else "The models alone have no such number."
    return element(
        "p",
        element("span", text(ends[0])),
        element("span", bar, class_="bar", aria_hidden="true"),
        element("span", text(ends[1])),
        element("span", text(own), class_="note"),
        element("span", class_="readout", aria_live="polite"),
        class_="legend",
    )
