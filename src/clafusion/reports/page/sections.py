"""The parts of the page that are tables: what was run, the pairs, the models, the stages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from clafusion.batch.results import PairResult
from clafusion.reports.options import changed_options, flat_options
from clafusion.reports.page.details import load_line
from clafusion.reports.page.markup import compact, definitions, element, scrollable, sortable, text
from clafusion.reports.page.measures import Measure
from clafusion.reports.tables import total_seconds
from clafusion.weights.digests import versions

__all__ = [
    "leaderboard",
    "lines_to_load",
    "models_table",
    "ranked",
    "run_facts",
    "settings",
    "stages",
]

_Rows = Sequence[Sequence[str]]


def run_facts(run: Mapping[str, str]) -> str:
    """Return what made the results: the caller's facts, and the releases of the packages."""
    used = ", ".join(f"{name} {release}" for name, release in versions().items())
    return definitions({"versions": used, **run})


# --- settings -------------------------------------------------------------------------------------


def settings(results: Sequence[PairResult]) -> str:
    """Return the options of all pairs, those that are not the default first."""
    found = _distinct_settings(results)
    parts = []
    for i, packed in enumerate(found):
        given = json.loads(packed)
        shown = ", ".join(f"{path} {one}" for path, one in changed_options(given).items())
        told = shown or "all as they are by default"
        name = f"Settings {i + 1}" if len(found) > 1 else "Settings"
        parts.append(
            element(
                "details",
                element("summary", element("strong", f"{name}: "), text(told)),
                definitions(flat_options(given)),
                class_="settings",
            )
        )
    return "".join(parts)


def _distinct_settings(results: Sequence[PairResult]) -> list[str]:
    """Return the settings of all pairs as JSON, each once, in the order of the pairs."""
    return list(dict.fromkeys(json.dumps(one.settings) for one in results if one.settings))


# --- tables ---------------------------------------------------------------------------------------


def leaderboard(
    results: Sequence[PairResult], measures: Sequence[Measure], quality: Measure | None
) -> str:
    """Return the table of all fused pairs, the best first."""
    columns = [one for one in measures if one.in_table]
    places = ranked(results, quality)
    several = _distinct_settings(results)
    more = ["settings"] if len(several) > 1 else []
    titles = ["first", "second", *(one.title for one in columns), *more, "file"]
    head = "".join(element("th", text(one), scope="col") for one in titles)
    rows = []
    for place in places:
        one = results[place]
        name = element("a", text(one.first), href=f"#pair-{place}")
        cells = [
            element("th", name, scope="row", title=one.first),
            element("td", text(one.second), title=one.second),
        ]
        cells += [_cell(measure, place) for measure in columns]
        if more:
            number = several.index(json.dumps(one.settings)) + 1
            cells.append(element("td", str(number), class_="number"))
        file = "" if one.path is None else one.path.name
        cells.append(element("td", text(file)))
        rows.append(f'<tr data-p="{place}">{"".join(cells)}</tr>')
    table = element(
        "table",
        element("thead", element("tr", head)),
        element("tbody", *rows),
        class_="board sortable",
        id="board-table",
    )
    return scrollable(table, "all fused pairs")


def ranked(results: Sequence[PairResult], quality: Measure | None) -> list[int]:
    """Return the places of the fused pairs, the best first."""
    places = [i for i, one in enumerate(results) if one.error is None]
    if quality is None:
        return places
    sign = -1 if quality.better == "high" else 1
    return sorted(places, key=lambda i: sign * quality.values.get(i, sign * math.inf))


def _cell(measure: Measure, place: int) -> str:
    value = measure.values.get(place)
    if value is None:
        return '<td class="number"></td>'
    shown = measure.show(value)
    exact = f' data-v="{value:g}"' if measure.show is compact else ""
    return f'<td class="number"{exact}>{text(shown)}</td>'


def models_table(results: Sequence[PairResult], measures: Sequence[Measure]) -> str:
    """Return the table of the models: what they are, and how good each is alone and in pairs."""
    names = list(dict.fromkeys(name for one in results for name in (one.first, one.second)))
    own = {one.key: one for one in measures if one.models}
    shown = [own[key] for key in ("accuracy", "loss", "agreement", "distance") if key in own]
    sizes = [own[key] for key in ("parameters", "operations") if key in own]
    titles = [
        "model",
        *(f"{one.title} alone" for one in shown),
        *(one.title for one in sizes),
        "fused in",
        "source",
        "SHA-256 of the weights",
    ]
    rows = []
    for name in names:
        pairs = [one for one in results if name in (one.first, one.second)]
        facts = next((one.models[name] for one in pairs if name in one.models), None)
        cells = [element("th", text(name), scope="row")]
        for measure in (*shown, *sizes):
            value = measure.models.get(name)
            told = "" if value is None else measure.show(value)
            exact = f"{value:g}" if value is not None and measure.show is compact else None
            cells.append(element("td", text(told), class_="number", data_v=exact))
        fused = sum(one.error is None for one in pairs)
        cells.append(element("td", f"{fused} of {len(pairs)}", class_="number"))
        cells.append(element("td", text(facts.source if facts else ""), class_="source"))
        digest = (facts.sha256 if facts else None) or ""
        cells.append(element("td", element("code", text(digest), class_="hash")))
        rows.append(element("tr", *cells))
    return sortable(titles, rows, "all models")


def stages(results: Sequence[PairResult]) -> str:
    """Return the time and the memory of each stage over all pairs; "" where nothing was timed."""
    seconds = total_seconds(results)
    if not seconds:
        return ""
    whole, most = math.fsum(seconds.values()), max(seconds.values())
    memory: dict[str, int] = {}
    for one in results:
        for stage, held in one.peak_memory.items():
            memory[stage] = max(memory.get(stage, 0), held)
    titles = ["stage", "seconds, all pairs", "", "share, %", "slowest pair", "memory, MB"]
    rows = [element("tr", *(element("th", text(one), scope="col") for one in titles))]
    for stage, value in seconds.items():
        slowest = max(results, key=lambda one: one.seconds.get(stage, -1.0))
        bar = element("div", class_="meter", style=f"width:{100 * value / (most or 1):.1f}%")
        told = f"{slowest.first} and {slowest.second}, {slowest.seconds[stage]:.2f} s"
        most_held = memory.get(stage)
        rows.append(
            element(
                "tr",
                element("th", text(stage), scope="row"),
                element("td", f"{value:.2f}", class_="number"),
                element("td", bar, class_="bars", aria_hidden="true"),
                element("td", f"{100 * value / (whole or 1):.1f}", class_="number"),
                element("td", text(told)),
                element(
                    "td", "" if most_held is None else f"{most_held / 1e6:,.0f}", class_="number"
                ),
            )
        )
    return scrollable(element("table", *rows, class_="stages"), "time and memory by stage")


def lines_to_load(results: Sequence[PairResult]) -> str:
    """Return a line of Python for each fused network."""
    lines = [
        f"# {one.first} and {one.second}\n{load_line(one)}" for one in results if one.error is None
    ]
    listing = element("pre", text("import clafusion\n\n" + "\n".join(lines)), tabindex=0)
    return element("details", element("summary", "A line to load each network"), listing)
