"""The picture of an alignment. Draws without pyplot: the caller's figures stay as they are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from clafusion.weights.atomic import check_output, replacing

if TYPE_CHECKING:
    from clafusion.alignment.dynamic_program import LayerAlignment
    from clafusion.fusion import AlignedPair

__all__ = [
    "ENDINGS",
    "alignment_figure",
    "plot_alignment",
    "stages_figure",
    "values_figure",
    "without_glyph_warnings",
]

ENDINGS = (".png", ".svg", ".pdf")

_LONGEST_NAME = 32
_FORBIDDEN = "#e3e3e3"
_INK = "#222222"
_PATH = "#d62728"
_MOST_NUMBERS = 150  # in the heat map; more would not be legible


def plot_alignment(pair: AlignedPair, path: str | os.PathLike[str]) -> None:
    """Draw the cost matrix with the chosen path, and the matched layers side by side.

    Parameters
    ----------
    pair
        The aligned models.
    path
        Its ending (``.png``, ``.svg``, ``.pdf``) chooses the format. An old file stays as it is
        until the new one is complete.

    Raises
    ------
    InputError
        The ending is unknown, or the file cannot be written.
    """
    path = check_output(path, ENDINGS, "plot")
    figure = _figure(pair)
    with replacing(path, "plot") as temporary, without_glyph_warnings():
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150)


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw names in letters that the font lacks as boxes, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _figure(pair: AlignedPair) -> Figure:
    return alignment_figure(
        [layer.name for layer in pair.deep.traced.layers],
        [layer.name for layer in pair.shallow.traced.layers],
        pair.alignment,
        deep_is_first=pair.deep_is_first,
    )


def alignment_figure(
    deep_layers: Sequence[str],
    shallow_layers: Sequence[str],
    alignment: LayerAlignment,
    *,
    deep_is_first: bool,
) -> Figure:
    """Draw what :func:`plot_alignment` draws, from the layers' names."""
    deep, shallow = (list(map(_shortened, names)) for names in (deep_layers, shallow_layers))
    m, n = len(deep), len(shallow)
    letter = 0.07  # inches, at the size of the names
    longest = max(map(len, deep)), max(map(len, shallow))
    cell = float(np.clip(0.34, 2.6 / m, 12 / m if m > 35 else 1.0))
    # Inches: [names | matrix | colour bar] gap [boxes, lines, boxes]
    names, bar, gap = letter * longest[0] + 0.45, 0.95, 0.35
    matrix = max(cell * n, 2.2)
    box = letter * max(*longest, 10) + 0.3
    boxes = 2 * box + 1.6
    top, bottom = 0.95, letter * longest[1] + 0.85
    body = max(cell * len(alignment.steps), 2.2)
    width, height = names + matrix + bar + gap + boxes + 0.2, top + body + bottom
    figure = Figure(figsize=(width, height))

    def axes(left: float, wide: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, body / height))

    norm = _norm(alignment)
    _draw_costs(axes(names, matrix), alignment, deep_is_first, deep, shallow, norm, cell)
    colours = ScalarMappable(norm, "viridis_r")
    bar_axes = axes(names + matrix + 0.12, 0.16)
    figure.colorbar(colours, cax=bar_axes).set_label("cost (smaller is closer)", fontsize=8)
    bar_axes.tick_params(labelsize=7)
    layers = axes(names + matrix + bar + gap, boxes)
    _draw_layers(layers, alignment, deep_is_first, deep, shallow, norm, box / boxes)
    forced = "forced by structure" if alignment.forced else "chosen by cost"
    figure.text(
        0.5,
        1 - 0.28 / height,
        f"Alignment of {m} and {n} layers ({forced}), total cost {alignment.matched_cost:.3f}",
        ha="center",
        va="center",
        fontsize=11,
        color=_INK,
    )
    return figure


def _norm(alignment: LayerAlignment) -> Normalize:
    cost = alignment.cost
    finite = cost[np.isfinite(cost)]
    low, high = float(finite.min()), float(finite.max())
    return Normalize(low, max(high, low + 0.01))  # of one value, too, the bar can be read


def _draw_costs(
    axes: Axes,
    alignment: LayerAlignment,
    deep_is_first: bool,
    deep: list[str],
    shallow: list[str],
    norm: Normalize,
    cell: float,
) -> None:
    """Draw the matrix: forbidden pairs hatched, chosen pairs joined by a path."""
    cost = alignment.cost
    colours = colormaps["viridis_r"]
    forbidden = ~np.isfinite(cost)
    axes.set_facecolor(_FORBIDDEN)
    if forbidden.any():
        axes.add_patch(
            Rectangle(
                (-0.5, -0.5),
                cost.shape[1],
                cost.shape[0],
                facecolor=_FORBIDDEN,
                edgecolor="#bdbdbd",
                hatch="////",
                linewidth=0,
                zorder=0,
            )
        )
    axes.imshow(
        np.ma.masked_array(cost, forbidden), cmap=colours, norm=norm, aspect="auto", zorder=1
    )
    if np.isfinite(cost).sum() <= _MOST_NUMBERS:
        for row, k in np.argwhere(~forbidden):
            axes.text(
                k,
                row,
                f"{cost[row, k]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color=_readable(colours(norm(cost[row, k]))),
                zorder=4,
            )
    pairs = np.array(alignment.pairs)
    axes.plot(pairs[:, 1], pairs[:, 0], color=_PATH, linewidth=1.2, alpha=0.8, zorder=2)
    for row, k in pairs:
        axes.add_patch(
            Rectangle(
                (k - 0.46, row - 0.46),
                0.92,
                0.92,
                fill=False,
                edgecolor=_PATH,
                linewidth=1.8 if cell > 0.2 else 1.2,
                zorder=3,
            )
        )
    size = 8 if cell >= 0.16 else 6
    axes.set_xticks(range(len(shallow)), shallow, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(deep)), deep, fontsize=size, parse_math=False)
    axes.tick_params(length=2)
    axes.set_xlim(-0.5, len(shallow) - 0.5)
    axes.set_ylim(len(deep) - 0.5, -0.5)
    axes.set_xlabel(
        f"layers of the shallow model ({_which(deep_is_first, deep=False)})", fontsize=9
    )
    axes.set_ylabel(f"layers of the deep model ({_which(deep_is_first, deep=True)})", fontsize=9)
    axes.set_title("Cost of matching two layers", fontsize=10, pad=8)
    marks = [Patch(fill=False, edgecolor=_PATH, linewidth=1.5, label="matched")]
    if forbidden.any():
        marks.append(
            Patch(facecolor=_FORBIDDEN, edgecolor="#bdbdbd", hatch="////", label="forbidden")
        )
    axes.figure.legend(
        handles=marks, loc="lower left", fontsize=8, ncols=2, frameon=False, bbox_to_anchor=(0, 0)
    )


def _draw_layers(
    axes: Axes,
    alignment: LayerAlignment,
    deep_is_first: bool,
    deep: list[str],
    shallow: list[str],
    norm: Normalize,
    box: float,
) -> None:
    """Draw both networks from top to bottom, each layer beside its partner."""
    colours = colormaps["viridis_r"]
    heights: dict[int, list[int]] = {}
    for row, (one, k) in enumerate(alignment.steps):
        if one >= 0:
            heights.setdefault(k, []).append(row)
    size = 8 if len(alignment.steps) <= 40 else 7

    def draw_box(right: bool, y: float, text: str, dashed: bool = False) -> None:
        x = 1 - box if right else 0.0
        axes.add_patch(
            FancyBboxPatch(
                (x + 0.005, y - 0.34),
                box - 0.01,
                0.68,
                boxstyle="round,pad=0,rounding_size=0.02",
                mutation_aspect=14,
                facecolor="none" if dashed else "#f4f6fa",
                edgecolor="#9a9a9a" if dashed else "#4c5a73",
                linewidth=0.9,
                linestyle=(0, (3, 2)) if dashed else "solid",
            )
        )
        axes.text(
            x + box / 2,
            y,
            text,
            ha="center",
            va="center",
            fontsize=size,
            parse_math=False,
            color="#8a8a8a" if dashed else _INK,
            style="italic" if dashed else "normal",
        )

    for row, (one, k) in enumerate(alignment.steps):
        draw_box(False, row, deep[one] if one >= 0 else "inserted", dashed=one < 0)
        if one < 0 or k < 0:
            draw_box(True, row, shallow[k] if k >= 0 else "inserted", dashed=k < 0)
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
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    for k, places in heights.items():
        if k >= 0:
            draw_box(True, float(np.mean(places)), shallow[k])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(alignment.steps) - 0.5, -0.5)
    axes.axis("off")
    axes.set_title("Matched layers and their cost", fontsize=10, pad=22)
    for x, which in ((box / 2, True), (1 - box / 2, False)):
        axes.annotate(
            f"{'deep' if which else 'shallow'} ({_which(deep_is_first, deep=which)})",
            (x, 1),
            xycoords="axes fraction",
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_INK,
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
    shown = list(map(_shortened, names))
    cell = float(np.clip(0.42, 2.6 / len(names), max(12 / len(names), 0.02)))
    side, margin = max(cell * len(names), 2.2), 0.07 * max(map(len, shown)) + 0.6
    width, height = side + margin + 1.3, side + margin + 0.3
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (margin / width, margin / height, side / width, side / height), facecolor=_FORBIDDEN
    )
    finite = grid[np.isfinite(grid)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    norm = Normalize(low, max(high, low + 1e-9))
    axes.imshow(np.ma.masked_invalid(grid), cmap="viridis_r", norm=norm, aspect="auto")
    if finite.size <= _MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(grid)):
            axes.text(
                column,
                row,
                f"{grid[row, column]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color=_readable(colormaps["viridis_r"](norm(grid[row, column]))),
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


def stages_figure(seconds: Mapping[str, float]) -> Figure:
    """Draw how long each stage took in all."""
    height = 0.32 * len(seconds) + 0.9
    figure = Figure(figsize=(6.5, height), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(seconds), list(seconds.values()), color="#4c5a73")
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds, all pairs", fontsize=9)
    axes.tick_params(labelsize=8)
    return figure


def _which(deep_is_first: bool, *, deep: bool) -> str:
    return "first" if deep_is_first == deep else "second"


def _readable(colour: tuple[float, float, float, float]) -> str:
    red, green, blue, _ = colour
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"


def _shortened(name: str) -> str:
    """Keep both ends of a long name: the stage at the front, the layer at the back."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 3) // 2
    return f"{name[:half]}...{name[-half:]}"
