"""Figures of many pairs and of one model, and what all figures share.

Drawn without pyplot: the caller's figures and settings stay as they are.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from clafusion.reports.tables import operations_text
from clafusion.tracing.model import TracedModel
from clafusion.weights.atomic import check_output, replacing

if TYPE_CHECKING:
    from clafusion.batch.results import PairResult

__all__ = [
    "ENDINGS",
    "FORBIDDEN",
    "INK",
    "MOST_NUMBERS",
    "Picture",
    "drawn",
    "layer_box",
    "model_figure",
    "pairs_figure",
    "readable",
    "short",
    "values_figure",
    "without_glyph_warnings",
]

ENDINGS = (".png", ".svg", ".pdf")

FORBIDDEN = "#e3e3e3"
INK = "#222222"
MOST_NUMBERS = 150  # in a heat map; more would not be legible

_LONGEST_NAME = 32
_LETTER = 0.07  # inches, at the size of the names


class Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        memory = io.BytesIO()
        with without_glyph_warnings():
            self.savefig(memory, format="png", dpi=100)
        return memory.getvalue()


def drawn(draw: Callable[[], Figure], path: str | os.PathLike[str] | None) -> Figure:
    """Draw a figure; with ``path`` also into a file, the old one staying until that is complete.

    Raises
    ------
    InputError
        The ending is unknown, or the file cannot be written.
    """
    target = None if path is None else check_output(path, ENDINGS, "plot")
    figure = draw()
    if target is not None:
        with replacing(target, "plot") as temporary, without_glyph_warnings():
            figure.savefig(temporary, format=target.suffix.lower()[1:], dpi=150)
    return figure


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw names in letters that the font lacks as boxes, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def layer_box(
    axes: Axes,
    left: float,
    y: float,
    wide: float,
    text: str,
    *,
    size: float,
    dashed: bool = False,
    face: str = "#f4f6fa",
) -> None:
    """Draw a layer as a box with its name; dashed for one that a network lacks."""
    axes.add_patch(
        FancyBboxPatch(
            (left + 0.005, y - 0.34),
            wide - 0.01,
            0.68,
            boxstyle="round,pad=0,rounding_size=0.02",
            mutation_aspect=14,
            facecolor="none" if dashed else face,
            edgecolor="#9a9a9a" if dashed else "#4c5a73",
            linewidth=0.9,
            linestyle=(0, (3, 2)) if dashed else "solid",
        )
    )
    axes.text(
        left + wide / 2,
        y,
        text,
        ha="center",
        va="center",
        fontsize=size,
        parse_math=False,
        color="#8a8a8a" if dashed else INK,
        style="italic" if dashed else "normal",
    )


def values_figure(
    names: Sequence[str], values: Mapping[tuple[str, str], float], label: str
) -> Figure:
    """Draw one number for each pair of models: rows the first, columns the second ones.

    Pairs without a number are left blank.
    """
    places = {name: i for i, name in enumerate(names)}
    grid = np.full((len(names), len(names)), np.nan)
    for (first, second), value in values.items():
        grid[places[first], places[second]] = value
    shown = list(map(short, names))
    cell = float(np.clip(0.42, 2.6 / len(names), max(12 / len(names), 0.02)))
    side, margin = max(cell * len(names), 2.2), 0.07 * max(map(len, shown)) + 0.6
    width, height = side + margin + 1.3, side + margin + 0.3
    figure = Picture(figsize=(width, height))
    axes = figure.add_axes(
        (margin / width, margin / height, side / width, side / height), facecolor=FORBIDDEN
    )
    finite = grid[np.isfinite(grid)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    norm = Normalize(low, max(high, low + 1e-9))
    axes.imshow(np.ma.masked_invalid(grid), cmap="viridis_r", norm=norm, aspect="auto")
    if finite.size <= MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(grid)):
            axes.text(
                column,
                row,
                f"{grid[row, column]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color=readable(colormaps["viridis_r"](norm(grid[row, column]))),
            )
    size = 8 if cell >= 0.16 else 4
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(shown)), shown, fontsize=size, parse_math=False)
    axes.set_xlabel("second model", fontsize=9)
    axes.set_ylabel("first model", fontsize=9)
    bar = figure.add_axes(
        ((margin + side + 0.12) / width, margin / height, 0.16 / width, side / height)
    )
    figure.colorbar(ScalarMappable(norm, "viridis_r"), cax=bar).set_label(
        label, fontsize=8, parse_math=False
    )
    bar.tick_params(labelsize=7)
    return figure


def pairs_figure(results: Sequence[PairResult]) -> Figure:
    """Draw how good every pair's result is: agreements, else distances, else alignment costs."""
    names = list(dict.fromkeys(name for one in results for name in (one.first, one.second)))
    fused = {(one.first, one.second): one for one in results if one.error is None}
    agreements = {pair: one.agreement for pair, one in fused.items()}
    if fused and all(one is not None for one in agreements.values()):
        found = {pair: 100 * value for pair, value in agreements.items() if value is not None}
        return values_figure(names, found, "agreement, %")
    distances = {pair: one.distance for pair, one in fused.items()}
    if any(map(math.isfinite, distances.values())):
        return values_figure(names, distances, "distance")
    costs = {
        pair: one.alignment.total_cost for pair, one in fused.items() if one.alignment is not None
    }
    return values_figure(names, costs, "alignment cost")


def readable(colour: tuple[float, float, float, float]) -> str:
    """Return the colour of text that can be read on a colour."""
    red, green, blue, _ = colour
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"


def short(name: str) -> str:
    """Keep both ends of a long name: the stage at the front, the layer at the back."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 3) // 2
    return f"{name[:half]}...{name[-half:]}"


# --- one model ----------------------------------------------------------------------------------

_FACES = {
    "identity": ("#dcefe0", "can be inserted as an identity"),
    "zero": ("#dbe7f6", "can be inserted with a zero residual"),
    None: ("#f4f6fa", "cannot be inserted"),
}


def model_figure(model: TracedModel) -> Figure:
    """Draw a model's layers from top to bottom, and beside each what it computes."""
    names = [short(layer.name) for layer in model.layers]
    notes = [
        operations_text(layer.structure)
        + (f"  ->  {'x'.join(map(str, layer.output_shape))}" if layer.output_shape else "")
        for layer in model.layers
    ]
    box = _LETTER * max(10, *map(len, names)) + 0.3
    wide = box + _LETTER * max(40, *map(len, notes)) + 0.5
    cell = float(np.clip(0.34, 0.0, 40 / len(names)))
    height = cell * len(names) + 1.1
    figure = Picture(figsize=(wide, height))
    axes = figure.add_axes((0.0, 0.55 / height, 1.0, cell * len(names) / height))
    size = 8 if cell > 0.25 else 6
    for row, (layer, name, note) in enumerate(zip(model.layers, names, notes, strict=True)):
        face, _ = _FACES[layer.insertable]
        layer_box(axes, 0.2 / wide, row, box / wide, name, size=size, face=face)
        axes.text(
            (box + 0.4) / wide, row, note, va="center", fontsize=size, color=INK, parse_math=False
        )
        if row:
            middle = (0.2 + box / 2) / wide
            axes.plot([middle, middle], [row - 0.66, row - 0.34], color="#4c5a73", linewidth=0.9)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axis("off")
    figure.text(
        0.2 / wide,
        1 - 0.28 / height,
        f"{len(names)} layers, {len(model.groups)} channel groups",
        va="center",
        fontsize=11,
        color=INK,
    )
    kinds = dict.fromkeys(layer.insertable for layer in model.layers)
    marks = [
        Patch(facecolor=_FACES[kind][0], edgecolor="#4c5a73", label=_FACES[kind][1])
        for kind in kinds
    ]
    figure.legend(handles=marks, loc="lower left", fontsize=8, frameon=False, ncols=len(marks))
    return figure
