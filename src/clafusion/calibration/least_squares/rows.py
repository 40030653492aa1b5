"""The rows of a layer's regression: at which positions, and what the layer multiplies there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from clafusion.execution.walk import Walk
from clafusion.tracing.layer import CalibrationPoint
from clafusion.tracing.operations import affine_operands, convolution_geometry

__all__ = [
    "Positions",
    "by_position",
    "channels_last",
    "chosen_positions",
    "chosen_rows",
    "features",
    "incoming_node",
    "num_positions",
    "rows_for",
]

_ENTRIES = 1 << 27  # a regression's inputs at the most: half a gigabyte
_LEAST_ROWS = 4  # for each column, however large that makes them


def channels_last(walk: Walk, node: str, point: CalibrationPoint) -> Tensor:
    """Return a layer's output, or a sum that it is part of, channels last."""
    value: Tensor = walk.reach(node)
    return value.movedim(point.axis, -1)


def incoming_node(affine: fx.Node) -> str:
    """Return the name of the node that feeds a layer."""
    return str(affine_operands(affine)["input"].name)


@dataclass(frozen=True)
class Positions:
    """The positions of a layer's output from which rows are made: ``count`` of each input.

    Batches take turns through all of them, in the random ``order``: rows of a few positions would
    say little of the others, nor of the edges of an image.
    """

    order: Tensor
    count: int

    def of(self, batch: int) -> Tensor:
        """Return the positions of a batch's inputs, in order."""
        turns = torch.arange(batch * self.count, (batch + 1) * self.count)
        return self.order[turns % len(self.order)].sort().values


def chosen_positions(
    positions: int, num_rows: int, num_inputs: int, generator: torch.Generator
) -> Positions:
    """Choose the positions of a layer's output from which rows are made."""
    count = min(positions, max(1, -(-num_rows // num_inputs)))
    return Positions(torch.randperm(positions, generator=generator), count)


def rows_for(num_columns: int, a_column: int, least: int) -> int:
    """Return how many rows a regression with so many columns takes."""
    most = max(_ENTRIES // num_columns, _LEAST_ROWS * num_columns)
    return min(max(a_column * num_columns, least), most)


def by_position(value: Tensor, kernel: Sequence[int], num_inputs: int) -> Tensor:
    """Return ``(num_inputs, num_positions, num_channels)`` of a value, channels last.

    What a layer that is no convolution computes may hold an input's positions as rows of their own,
    or its positions before its inputs, as ``nn.MultiheadAttention`` has them.
    With 0 inputs, as of a graph, each row stands alone: it is of a node, an edge or a graph.
    """
    is_folded = not kernel and num_inputs > 0 and value.size(0) % num_inputs == 0
    if not kernel and not is_folded and value.dim() > 2 and value.size(1) == num_inputs:
        value, is_folded = value.transpose(0, 1), True
    return value.reshape(num_inputs if is_folded else value.size(0), -1, value.size(-1))


def chosen_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """Return ``(num_rows, num_channels)``: see :func:`by_position`; position by position."""
    return values.transpose(0, 1)[chosen.to(values.device)].flatten(0, 1)


def num_positions(affine: fx.Node, x: Tensor, kernel: Sequence[int], num_inputs: int) -> int:
    """Return at how many positions a layer computes its outputs."""
    if not kernel:
        return by_position(x, kernel, num_inputs).size(1)
    return math.prod(_geometry(affine, x, kernel).outputs)


def features(
    affine: fx.Node,
    x: Tensor,
    kernel: Sequence[int],
    chosen: Tensor,
    num_inputs: int,
    *,
    has_bias: bool,
    room: int = 0,
) -> Tensor:
    """Return what a layer multiplies at some positions, ``(num_features (+ 1), num_rows)``.

    Of a convolution these are its patches, of which no others are made. The last feature is 1,
    where the layer has a bias. Rows come input by input within a position. ``room`` rows of the
    matrix are left to be filled. ``num_inputs`` is the size of the batch.
    """
    # Sums of products in half precision are too coarse to be positive definite.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count, every = len(x), len(chosen)
    if not kernel:
        values = by_position(x, kernel, num_inputs)
        count = len(values)
        if every < values.size(1):
            values = values[:, chosen.to(x.device)]
        size = x.size(-1)
        made = x.new_empty(size + has_bias + room, every * count)
        made[:size].view(-1, every, count).copy_(values.permute(2, 1, 0))
    else:
        geometry = _geometry(affine, x, kernel)
        if len(kernel) == 1:  # an image of one row
            x = x.unsqueeze(2)
        height, width = geometry.padding
        x = F.pad(x, (width, width, height, height))
        index = geometry.index(chosen, x.size(3)).to(x.device)
        channels, size = x.size(1), x.size(1) * len(index)
        made = x.new_empty(size + has_bias + room, every * count)
        # What is picked lies in one piece.
        places = x.permute(1, 2, 3, 0).reshape(channels, -1, count)
        picked = made[:size].view(channels, len(index) * every, count)
        torch.index_select(places, 1, index.flatten(), out=picked)
    if has_bias:
        made[size] = 1.0
    return made


@dataclass(frozen=True)
class _Geometry:
    """A convolution over images, as two numbers each: height and width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    outputs: tuple[int, int]

    def index(self, chosen: Tensor, width: int) -> Tensor:
        """Return ``(kernel's size, num_positions)``: where patches lie in a padded image."""
        row, column = chosen // self.outputs[1], chosen % self.outputs[1]
        first = row * self.stride[0] * width + column * self.stride[1]
        down, right = (
            torch.arange(size) * step for size, step in zip(self.kernel, self.dilation, strict=True)
        )
        return (down[:, None] * width + right).reshape(-1, 1) + first


def _geometry(affine: fx.Node, x: Tensor, kernel: Sequence[int]) -> _Geometry:
    stride, padding, dilation = convolution_geometry(affine, kernel)
    sizes, kernel = tuple(x.shape[2:]), tuple(kernel)
    if len(kernel) == 1:
        sizes, kernel, stride, dilation = (1, *sizes), (1, *kernel), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    outputs = (
        (size + 2 * pad - step * (k - 1) - 1) // by + 1
        for size, pad, step, k, by in zip(sizes, padding, dilation, kernel, stride, strict=True)
    )
    pairs = [(one[0], one[1]) for one in (kernel, stride, padding, dilation, tuple(outputs))]
    return _Geometry(*pairs)
