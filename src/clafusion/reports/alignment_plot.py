"""The picture of an alignment: the costs with the chosen path, and the matched layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from clafusion.alignment.dynamic_program import LayerAlignment
from clafusion.alignment.models import AlignedModels
from clafusion.reports.plots import (
    FORBIDDEN,
    INK,
    MOST_NUMBERS,
    Picture,
    layer_box,
    readable,
    short,
)

__all__ = ["aligned_figure"]

_PATH = "#d62728"
_HATCH: dict[str, Any] = {"facecolor": FORBIDDEN, "edgecolor": "#bdbdbd", "hatch": "////"}

# Inches
_LETTER = 0.07  # at the size of the names
_BAR, _GAP, _TOP = 0.95, 0.35, 0.95


def aligned_figure(*aligned: AlignedModels, counts: Sequence[int] | None = None) -> Figure:
    """Draw one panel for each model that is aligned with its reference, one below the other.

    With ``counts``, how many of each model's layers are in a shared trunk, a line shows its end.
    """
    panels = [
        _Panel(
            one.layer_names(pair.deep),
            one.layer_names(pair.shallow),
            pair.alignment,
            (one.names[pair.deep], one.names[pair.shallow]),
            merged=pair.shallow == one.reference,
            end=None if counts is None else counts[pair.deep],
        )
        for one in aligned
        for pair in one.pairs
    ]
    return _figure(panels)


@dataclass(frozen=True)
class _Panel:
    """What one alignment needs to be drawn, the deep network's first; sizes are in inches."""

    deep_layers: Sequence[str]
    shallow_layers: Sequence[str]
    alignment: LayerAlignment
    names: tuple[str, str]
    merged: bool
    end: int | None

    @property
    def deep(self) -> list[str]:
        return [short(one) for one in self.deep_layers]

    @property
    def shallow(self) -> list[str]:
        return [short(one) for one in self.shallow_layers]

    @property
    def longest(self) -> tuple[int, int]:
        """Letters of the longest names."""
        return max(map(len, self.deep)), max(map(len, self.shallow))

    @property
    def cell(self) -> float:
        m = len(self.deep_layers)
        return float(np.clip(0.34, 2.6 / m, 12 / m if m > 35 else 1.0))

    @property
    def margin(self) -> float:
        """Room for the names beside the matrix."""
        return _LETTER * self.longest[0] + 0.45

    @property
    def matrix(self) -> float:
        return max(self.cell * len(self.shallow_layers), 2.2)

    @property
    def box(self) -> float:
        return _LETTER * max(*self.longest, 10) + 0.3

    @property
    def body(self) -> float:
        return max(self.cell * len(self.alignment.steps), 2.2)

    @property
    def bottom(self) -> float:
        """Room for the names below the matrix."""
        return _LETTER * self.longest[1] + 0.85

    @property
    def width(self) -> float:
        """[names | matrix | colour bar] gap [boxes, lines, boxes]."""
        return self.margin + self.matrix + _BAR + _GAP + 2 * self.box + 1.6 + 0.2

    @property
    def height(self) -> float:
        return _TOP + self.body + self.bottom

    @property
    def norm(self) -> Normalize:
        finite = self.alignment.cost[np.isfinite(self.alignment.cost)]
        low, high = float(finite.min()), float(finite.max())
        return Normalize(low, max(high, low + 0.01))  # of one value, too, the bar can be read


def _figure(panels: Sequence[_Panel]) -> Figure:
    width, height = max(one.width for one in panels), sum(one.height for one in panels)
    figure = Picture(figsize=(width, height))
    top = height
    for panel in panels:
        top -= panel.height
        _draw_panel(figure, panel, top, width, height)
    return figure


def _draw_panel(figure: Figure, panel: _Panel, low: float, width: float, height: float) -> None:
    """Draw a panel whose lower edge is at ``low``, into a figure of this size."""
    bottom = low + panel.bottom

    def axes(left: float, wide: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, panel.body / height))

    _draw_costs(axes(panel.margin, panel.matrix), panel)
    bar = axes(panel.margin + panel.matrix + 0.12, 0.16)
    colours = ScalarMappable(panel.norm, "viridis_r")
    figure.colorbar(colours, cax=bar).set_label("cost (smaller is closer)", fontsize=8)
    bar.tick_params(labelsize=7)
    boxes = 2 * panel.box + 1.6
    _draw_layers(axes(panel.margin + panel.matrix + _BAR + _GAP, boxes), panel, panel.box / boxes)
    marks = [Patch(fill=False, edgecolor=_PATH, linewidth=1.5, label="matched")]
    if not np.isfinite(panel.alignment.cost).all():
        marks.append(Patch(label="forbidden", **_HATCH))
    figure.legend(
        handles=marks,
        loc="lower left",
        fontsize=8,
        ncols=2,
        frameon=False,
        bbox_to_anchor=(0, low / height),
    )
    forced = "forced by structure" if panel.alignment.forced else "chosen by cost"
    sizes = len(panel.deep_layers), len(panel.shallow_layers)
    shown = [f"{short(name)} ({n} layers)" for name, n in zip(panel.names, sizes, strict=True)]
    figure.text(
        0.5 * panel.width / width,
        (low + panel.height - 0.28) / height,
        f"{shown[0]} and {shown[1]}: {forced}, total cost {panel.alignment.matched_cost:.3f}",
        ha="center",
        va="center",
        fontsize=11,
        color=INK,
        parse_math=False,
    )


def _draw_costs(axes: Axes, panel: _Panel) -> None:
    """Draw the matrix: forbidden pairs hatched, chosen pairs joined by a path."""
    cost, norm = panel.alignment.cost, panel.norm
    colours = colormaps["viridis_r"]
    forbidden = ~np.isfinite(cost)
    axes.set_facecolor(FORBIDDEN)
    if forbidden.any():
        corner = (-0.5, -0.5)
        axes.add_patch(
            Rectangle(corner, cost.shape[1], cost.shape[0], linewidth=0, zorder=0, **_HATCH)
        )
    axes.imshow(
        np.ma.masked_array(cost, forbidden), cmap=colours, norm=norm, aspect="auto", zorder=1
    )
    if np.isfinite(cost).sum() <= MOST_NUMBERS:
        for row, k in np.argwhere(~forbidden):
            axes.text(
                k,
                row,
                f"{cost[row, k]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color=readable(colours(norm(cost[row, k]))),
                zorder=4,
            )
    pairs = np.array(panel.alignment.pairs)
    axes.plot(pairs[:, 1], pairs[:, 0], color=_PATH, linewidth=1.2, alpha=0.8, zorder=2)
    line = 1.8 if panel.cell > 0.2 else 1.2
    for row, k in pairs:
        corner = (k - 0.46, row - 0.46)
        axes.add_patch(
            Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=_PATH, linewidth=line, zorder=3)
        )
    _name_axes(axes, panel)


def _name_axes(axes: Axes, panel: _Panel) -> None:
    size = 8 if panel.cell >= 0.16 else 6
    m, n = len(panel.deep), len(panel.shallow)
    axes.set_xticks(range(n), panel.shallow, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(m), panel.deep, fontsize=size, parse_math=False)
    axes.tick_params(length=2)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(m - 0.5, -0.5)
    deep, shallow = map(short, panel.names)
    axes.set_xlabel(f"layers of {shallow}", fontsize=9, parse_math=False)
    axes.set_ylabel(f"layers of {deep}", fontsize=9, parse_math=False)
    axes.set_title("Cost of matching two layers", fontsize=10, pad=8)


def _draw_end(axes: Axes, row: int) -> None:
    """Draw where the shared trunk ends: before a row."""
    axes.axhline(row - 0.5, color=_PATH, linewidth=1, linestyle="--")
    axes.text(
        0.5,
        row - 0.5,
        "the trunk ends" if row else "nothing is shared",
        ha="center",
        va="center",
        fontsize=7,
        color=_PATH,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _draw_layers(axes: Axes, panel: _Panel, box: float) -> None:
    """Draw both networks from top to bottom, each layer beside its partner."""
    alignment, norm = panel.alignment, panel.norm
    colours = colormaps["viridis_r"]
    heights: dict[int, list[int]] = {}
    for row, (one, k) in enumerate(alignment.steps):
        if one >= 0:
            heights.setdefault(k, []).append(row)
    size = 8 if len(alignment.steps) <= 40 else 7
    for row, (one, k) in enumerate(alignment.steps):
        own = panel.deep[one] if one >= 0 else "inserted"
        layer_box(axes, 0.0, row, box, own, size=size, dashed=one < 0)
        if one == panel.end:
            _draw_end(axes, row)
        if k < 0 and panel.end is not None and one >= panel.end:
            continue  # a branch's own
        if one < 0 or k < 0:
            other = panel.shallow[k] if k >= 0 else "merged" if panel.merged else "inserted"
            layer_box(axes, 1 - box, row, box, other, size=size, dashed=k < 0)
            axes.plot(
                [box, 1 - box], [row, row], color="#b0b0b0", linewidth=1, linestyle=(0, (3, 2))
            )
            continue
        y = float(np.mean(heights[k]))
        cost = float(alignment.cost[one, k])
        axes.plot([box, 1 - box], [row, y], color=colours(norm(cost)), linewidth=2.2)
        axes.text(
            0.5,
            (row + y) / 2,
            f"{cost:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    for k, places in heights.items():
        if k >= 0:
            layer_box(axes, 1 - box, float(np.mean(places)), box, panel.shallow[k], size=size)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(alignment.steps) - 0.5, -0.5)
    axes.axis("off")
    axes.set_title("Matched layers and their cost", fontsize=10, pad=22)
    for x, name in zip((box / 2, 1 - box / 2), panel.names, strict=True):
        axes.annotate(
            short(name),
            (x, 1),
            xycoords="axes fraction",
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
            parse_math=False,
        )
