"""The outcome of many pairs as one HTML file that needs nothing else, and no network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from clafusion.batch.results import PairResult
from clafusion.errors import InputError
from clafusion.reports.alignment_plot import alignment_figure
from clafusion.reports.plots import stages_figure, values_figure, without_glyph_warnings
from clafusion.reports.tables import ASSESSED, assessed_cells, cost_text, total_seconds
from clafusion.weights.atomic import check_output, replacing

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
h1, h2 { font-weight: 600; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.failed { color: #b3261e; }
"""

_ASSESSED = (
    "<p>agreement and distance: how near the fused network comes to what both models put out "
    "together, on inputs that were kept out of the fusion; beside it the distance of the nearest "
    "model alone. A distance is a Kullback-Leibler divergence, or of values a relative squared "
    "error: less is better.</p>"
)


def write_report(
    results: Sequence[PairResult],
    path: str | os.PathLike[str],
    *,
    chosen: tuple[str, str] | None = None,
    values: Mapping[tuple[str, str], float] | None = None,
    label: str = "alignment cost",
) -> None:
    """Write a page: a heat map of all pairs, one pair's alignment, seconds by stage, a table.

    Parameters
    ----------
    results
        What :func:`clafusion.fuse_pairs` gave.
    path
        A ``.html`` file. An old one stays as it is until the new one is complete.
    chosen
        The pair whose alignment is drawn; default the one of the lowest cost for which there was
        a choice, else the one of the lowest cost.
    values
        What the heat map shows for each pair, for example its accuracy; default the total cost
        of its alignment.
    label
        What these numbers are.

    Raises
    ------
    InputError
        ``chosen`` or a pair in ``values`` is none of the results or was not fused, or the file
        cannot be written.
    """
    path = check_output(path, (".html",), "report")
    fused = {(one.first, one.second): one for one in results if one.alignment is not None}
    for pair in (*([] if chosen is None else [chosen]), *(values or ())):
        if tuple(pair) not in fused:
            raise InputError(f"the report has no fused pair {pair!r}; check the names' order")
    if values is None:
        values = {
            pair: one.alignment.total_cost
            for pair, one in fused.items()
            if one.alignment is not None
        }
    names = list(dict.fromkeys(name for one in results for name in (one.first, one.second)))
    parts = _heading(results, len(names))
    if values:
        parts += [
            f"<h2>{html.escape(label[:1].upper() + label[1:])} of every pair</h2>",
            _picture(values_figure(names, values, label), label),
        ]
    shown = fused[chosen] if chosen is not None else _most_telling(list(fused.values()))
    if shown is not None:
        parts += _alignment(shown)
    seconds = total_seconds(results)
    if seconds:
        parts += ["<h2>Time by stage</h2>", _picture(stages_figure(seconds), "seconds by stage")]
    parts += ["<h2>All pairs</h2>", _ASSESSED, _table(results)]
    with replacing(path, "report") as temporary:
        temporary.write_text(_page(f"clafusion: {len(results)} pairs", parts), encoding="utf-8")


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _heading(results: Sequence[PairResult], models: int) -> list[str]:
    failed = sum(one.error is not None for one in results)
    return [
        f"<h1>{len(results)} pairs of {models} models</h1>",
        f"<p>{len(results) - failed} fused, {failed} failed, "
        f"{sum(one.resumed for one in results)} taken over from an earlier run.</p>",
    ]


def _alignment(result: PairResult) -> list[str]:
    """Return the heading and the picture of a fused pair's alignment."""
    assert result.alignment is not None, "a fused pair has an alignment"
    assert result.deep is not None
    deep_is_first = result.deep == result.first
    names = (result.deep, result.second if deep_is_first else result.first)
    drawn = alignment_figure(
        result.deep_layers,
        result.shallow_layers,
        result.alignment,
        names,
        merged=result.structure != result.deep,
    )
    title = f"{result.first} and {result.second}"
    return [f"<h2>Alignment of {html.escape(title)}</h2>", _picture(drawn, title)]


def _most_telling(fused: Sequence[PairResult]) -> PairResult | None:
    def rank(one: PairResult) -> tuple[bool, float]:
        assert one.alignment is not None, "a fused pair has an alignment"
        return one.alignment.forced, one.alignment.total_cost

    return min(fused, key=rank, default=None)


def _picture(figure: Figure, text: str) -> str:
    """Return a figure as an SVG inside an ``img`` tag, where its names meet no other figure's."""
    buffer = io.BytesIO()
    # Without a date and with fixed names the same results give the same page.
    with matplotlib.rc_context({"svg.hashsalt": "clafusion"}), without_glyph_warnings():
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    packed = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{packed}">'


def _table(results: Sequence[PairResult]) -> str:
    titles = ["first", "second", "cost", *ASSESSED, "seconds", "outcome"]
    rows = [f"<tr>{''.join(f'<th>{one}</th>' for one in titles)}</tr>"]
    for one in results:
        outcome = "fused" if one.error is None else one.error
        assessed = "".join(f'<td class="number">{cell}</td>' for cell in assessed_cells(one))
        rows.append(
            f"<tr><td>{html.escape(one.first)}</td><td>{html.escape(one.second)}</td>"
            f'<td class="number">{cost_text(one)}</td>{assessed}'
            f'<td class="number">{sum(one.seconds.values()):.2f}</td>'
            f'<td class="{"fused" if one.error is None else "failed"}">'
            f"{html.escape(outcome)}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"
