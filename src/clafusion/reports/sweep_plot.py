"""The figure of a sweep: quality over the weight or the width, or of each combination."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clafusion.assessment.evaluation import MEANS
from clafusion.batch.sweep import SweepResult
from clafusion.reports.plots import Picture, without_glyph_warnings

__all__ = ["sweep_figure"]

_ALONG = {
    "weight": "weight of the first model",
    "target.factor": "width, from the average (1) to both side by side (2)",
}
_NAMES = {
    "accuracy": "accuracy, %",
    "agreement": "agreement with the parents together, %",
    "loss": "loss",
    "distance": "distance from the parents together",
}


def sweep_figure(found: SweepResult) -> Figure:
    """Draw means over the seeds, with a band of one standard deviation.

    Over the weight, or else the width of a target "wider", there is a line for each combination of
    the other settings; without them a point for each combination. Dashed lines are the parents
    alone, and their mean.
    """
    quality = found.quality
    scale = 100.0 if quality in ("accuracy", "agreement") else 1.0
    figure = Picture(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    rows = found.summary.to_dicts()
    along = next((one for one in _ALONG if one in found.axes), None)
    others = [one for one in found.axes if one not in (along, "seed")]
    if along is not None:
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for row in rows:
            if row.get(quality) is not None:
                name = ", ".join(str(row[axis]) for axis in others if axis in row) or "fused"
                spread = row.get(f"{quality} sd") or 0.0
                point = (float(row[along]), scale * row[quality], scale * spread)
                lines.setdefault(name, []).append(point)
        for name, points in lines.items():
            _draw_line(axes, name, sorted(points))
        axes.set_xlabel(_ALONG[along])
    else:
        _draw_points(axes, rows, others, quality, scale)
    for name, level in _levels(found, quality).items():
        axes.axhline(scale * level, color="#888888", linewidth=0.8, linestyle="--")
        axes.annotate(
            name,
            (0.995, scale * level),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color="#666666",
            parse_math=False,
        )
    axes.set_ylabel(_NAMES[quality])
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=8)
    with without_glyph_warnings():
        figure.draw_without_rendering()
    return figure


def _draw_line(axes: Axes, name: str, points: Sequence[tuple[float, float, float]]) -> None:
    x, y, spread = (list(one) for one in zip(*points, strict=True))
    (line,) = axes.plot(x, y, marker="o", markersize=4, label=name)
    if any(spread):
        low = [value - one for value, one in zip(y, spread, strict=True)]
        high = [value + one for value, one in zip(y, spread, strict=True)]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _draw_points(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    others: Sequence[str],
    quality: str,
    scale: float,
) -> None:
    known = [row for row in rows if row.get(quality) is not None]
    named = [[str(row[axis]) for axis in others if axis in row] for row in known]
    names = ["\n".join(one) or "fused" for one in named]
    values = [scale * row[quality] for row in known]
    spread = [scale * (row.get(f"{quality} sd") or 0.0) for row in known]
    axes.errorbar(range(len(known)), values, yerr=spread, fmt="o", capsize=3)
    axes.set_xticks(range(len(known)), names, fontsize=8, parse_math=False)
    axes.margins(x=0.2)


def _levels(found: SweepResult, quality: str) -> dict[str, float]:
    """Return what does not depend on the settings: the parents alone and, with labels, the mean.

    Parents are as near to the parents together as weights say, so that only labels give levels.
    """
    scores = next((one.evaluation.scores for one in found.points if one.evaluation), None)
    if scores is None or quality not in ("accuracy", "loss"):
        return {}
    parents = [name for name in scores if name not in MEANS][1:]
    levels = {f"{name} alone": getattr(scores[name], quality) for name in parents}
    if "weight" not in found.axes and "weights" not in found.axes:
        levels |= {name: getattr(scores[name], quality) for name in MEANS if name in scores}
    return {name: value for name, value in levels.items() if value is not None}
