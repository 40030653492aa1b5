"""Scatter plots as SVG: one number of every pair against another one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clafusion.batch.results import PairResult
from clafusion.reports.page.markup import element, text
from clafusion.reports.page.measures import Measure

__all__ = ["rank_correlation", "scatter"]

_WIDTH, _HEIGHT = 560, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 50


def rank_correlation(x: Measure, y: Measure) -> tuple[float | None, int]:
    """Return Spearman's rank correlation of two measures, and over how many pairs.

    None below three pairs, and where one of them is the same for all.
    """
    from scipy.stats import rankdata

    both = [i for i in x.values if i in y.values]
    ranks = [rankdata([one.values[i] for i in both]) for one in (x, y)]
    if len(both) < 3 or any(one.std() == 0 for one in ranks):
        return None, len(both)
    first, second = (one - one.mean() for one in ranks)
    rho = float(first @ second) / math.sqrt(float(first @ first) * float(second @ second))
    return rho, len(both)


def scatter(results: Sequence[PairResult], x: Measure, y: Measure) -> str:
    """Return the plot with a caption that gives the rank correlation."""
    both = [i for i in x.values if i in y.values]
    x_ticks = _ticks([x.values[i] for i in both])
    y_ticks = _ticks([y.values[i] for i in both])

    def across(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line class="grid" x1="{across(one):.1f}" x2="{across(one):.1f}" y1="{_TOP}" '
        f'y2="{_HEIGHT - _BOTTOM}"/><text x="{across(one):.1f}" y="{_HEIGHT - _BOTTOM + 17}" '
        f'text-anchor="middle">{text(_shown(x, one))}</text>'
        for one in x_ticks
    ]
    parts += [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(one):.1f}" '
        f'y2="{down(one):.1f}"/><text x="{_LEFT - 7}" y="{down(one) + 4:.1f}" '
        f'text-anchor="end">{text(_shown(y, one))}</text>'
        for one in y_ticks
    ]
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts += [
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 10}" '
        f'text-anchor="middle">{text(x.title)}</text>',
        f'<text transform="translate(14 {middle}) rotate(-90)" '
        f'text-anchor="middle">{text(y.title)}</text>',
    ]
    size = 5 if len(both) <= 200 else 3
    parts += [_point(results[i], i, across(x.values[i]), down(y.values[i]), size) for i in both]
    caption = _caption(x, y)
    drawn = element(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=caption,
        class_="scatter",
    )
    return element("figure", drawn, element("figcaption", text(caption)))


def _point(result: PairResult, place: int, x: float, y: float, size: int) -> str:
    forced = result.alignment is not None and result.alignment.forced
    title = f"<title>{text(result.first)} and {text(result.second)}</title>"
    kind = ' class="forced"' if forced else ""
    return f'<circle{kind} data-p="{place}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{title}</circle>'


def _caption(x: Measure, y: Measure) -> str:
    rho, count = rank_correlation(x, y)
    names = f"{x.title.partition(',')[0]} and {y.title.partition(',')[0]}"
    told = "too few pairs to rank" if rho is None else f"rank correlation {rho:+.2f}"
    return f"{names[:1].upper() + names[1:]}: {told} ({count} pairs)."


def _shown(measure: Measure, value: float) -> str:
    return f"{100 * value:g}" if measure.title.endswith("%") else f"{value:g}"


def _ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers at even steps; the first and the last enclose the values."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= 0.999 * raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
