"""A picture of a reassembled network: where each block comes from, and what stitches them."""

from __future__ import annotations

from itertools import pairwise

from matplotlib.figure import Figure

from clafusion.reassembly.result import ReassemblyResult
from clafusion.reports.plots import INK, Picture, layer_box, short

__all__ = ["reassembly_figure"]

_WIDE, _HIGH = 2.6, 0.62  # inches of a model's column, and of a block
_TAKEN = "#cfe3f7"


def reassembly_figure(result: ReassemblyResult) -> Figure:
    """Draw every model's blocks in a column; those of the network are filled and joined."""
    names = list(result.parents)
    count = len(result.blocks)
    width, height = _WIDE * len(names) + 0.4, _HIGH * count + 1.3
    figure = Picture(figsize=(width, height))
    axes = figure.add_axes((0.0, 0.5 / height, 1.0, (height - 1.0) / height))
    column = 1 / len(names)
    places = {}
    for group in result.groups:
        for block in group:
            i = names.index(block.model)
            left = (i + 0.08) * column
            is_taken = block in result.blocks
            layer_box(
                axes,
                left,
                block.index,
                0.84 * column,
                short(block.text),
                size=8,
                dashed=not is_taken,
                face=_TAKEN,
            )
            places[block.model, block.index] = (i + 0.5) * column
    for i, name in enumerate(names):
        axes.text(
            (i + 0.5) * column,
            -0.75,
            short(name),
            ha="center",
            va="center",
            fontsize=10,
            color=INK,
            parse_math=False,
        )
    joins = zip(pairwise(result.blocks), result.tried[0].residuals, strict=True)
    for (one, other), residual in joins:
        start = places[one.model, one.index], one.index + 0.34
        end = places[other.model, other.index], other.index - 0.34
        axes.annotate(
            "",
            xy=end,
            xytext=start,
            arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1.4},
        )
        if residual is not None:
            axes.text(
                (start[0] + end[0]) / 2,
                (start[1] + end[1]) / 2,
                f"stitch, {1 - min(residual, 1):.0%} explained",
                ha="center",
                va="center",
                fontsize=7,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
    axes.set_xlim(0, 1)
    axes.set_ylim(count - 0.5, -1.1)
    axes.axis("off")
    figure.text(0.02, 0.2 / height, str(result.assessment.result), fontsize=8, color=INK)
    return figure
