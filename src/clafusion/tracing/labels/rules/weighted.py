"""Operations with a weight: linear layers, convolutions, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.ids import fixed_ids
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import (
    Call,
    ComputedWeight,
    Label,
    NotFollowed,
    ParameterView,
    rule,
)
from clafusion.tracing.labels.rules.common import (
    moving,
    outgoing,
    rows_along,
    scale_channels,
    trained_weight,
)

__all__ = ["linear_labels"]


@rule("linear")
def _linear(propagation: LabelPropagation, call: Call) -> Label:
    """Read the channels of the last axis by the weight's columns, write them by its rows."""
    ids = propagation.activation(call.label("input"), call.value("input"))
    result = linear_labels(
        propagation, call, ids, trained_weight(propagation, call, "weight"), (0, 1)
    )
    scale_channels(propagation, call, "bias", result, axis=-1)
    return result


def linear_labels(
    propagation: LabelPropagation,
    call: Call,
    ids: Tensor,
    view: ParameterView | ComputedWeight,
    axes: tuple[int, int],
) -> Tensor:
    """Return the labels of a matrix product with a weight over the last axis of ``ids``.

    Parameters
    ----------
    propagation, call
        The running propagation and the operation.
    ids
        Labels ``(..., num_inputs)``.
    view
        The weight.
    axes
        The weight's axes of outgoing and of incoming channels.

    Returns
    -------
    Tensor
        Labels ``(..., num_outputs)``. If the last axis holds positions of one channel, the channel
        stays.
    """
    rows = rows_along(ids, -1)
    count = view.tensor.size(axes[0])
    if _mixes_positions(propagation, rows):
        return ids[..., :1].expand(*ids.shape[:-1], count)
    propagation.weigh(view, "weight", {axes[1]: propagation.common_row(rows)}, inward=[axes[1]])
    if count == 1:
        return fixed_ids(call.node.name, (*ids.shape[:-1], 1))
    return outgoing(propagation, view, "weight", axes[0]).expand(*ids.shape[:-1], count)


@rule(*"conv1d conv2d conv3d convolution _convolution".split())
def _conv(propagation: LabelPropagation, call: Call) -> Label:
    """Read the channels of axis 1 and write new ones, in each of the convolution's groups."""
    if call.bound.get("transposed"):
        return _transposed_conv(propagation, call)
    ids = propagation.activation(call.label("input"), call.value("input"))
    view = trained_weight(propagation, call, "weight")
    weight = view.tensor
    groups = call.value("groups")
    rows = rows_along(ids, 1)
    outputs, per_group = weight.size(0), weight.size(1)
    shape = call.output.shape
    if groups == 1 and weight[0, 0].numel() == 1 and _mixes_positions(propagation, rows):
        result = ids[:, :1].expand(shape)
    else:
        row = propagation.common_row(rows)
        if per_group == 1 and groups > 1:  # depthwise: every output belongs to its input
            out = row.repeat_interleave(outputs // groups)
            out = propagation.weigh(view, "weight", {0: out})[0]
        else:
            parts = []
            for group in range(groups):
                part = _part(view, groups, group)
                incoming = row.chunk(groups)[group]
                propagation.weigh(part, "weight", {1: incoming}, inward=[1])
                parts.append(outgoing(propagation, part, "weight", 0))
            out = torch.cat(parts)
        result = _channels_labels(call, out, shape)
    scale_channels(propagation, call, "bias", result)
    return result


def _part(
    view: ParameterView | ComputedWeight, groups: int, group: int
) -> ParameterView | ComputedWeight:
    """Return the rows of a convolution's weight that belong to one of its groups."""
    return view.changed(lambda one: one.chunk(groups, 0)[group])


@rule(*["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
def _transposed_conv(propagation: LabelPropagation, call: Call) -> Label:
    """Do as for a convolution, with a weight ``(num_inputs, num_outputs / groups, ...)``."""
    ids = propagation.activation(call.label("input"), call.value("input"))
    view = trained_weight(propagation, call, "weight")
    groups = call.value("groups")
    row = propagation.common_row(rows_along(ids, 1))
    weight = view.tensor
    if weight.size(1) == 1 and weight.size(0) == groups and groups > 1:
        out = propagation.weigh(view, "weight", {0: row})[0]
    else:
        parts = []
        for group in range(groups):
            part = _part(view, groups, group)
            propagation.weigh(part, "weight", {0: row.chunk(groups)[group]}, inward=[0])
            parts.append(outgoing(propagation, part, "weight", 1))
        out = torch.cat(parts)
    result = _channels_labels(call, out, call.output.shape)
    scale_channels(propagation, call, "bias", result)
    return result


@rule("grouped_mm_fallback", "_grouped_mm", "grouped_mm")
def _grouped_product(propagation: LabelPropagation, call: Call) -> Label:
    """Multiply groups of rows, each with a matrix of its own, as experts do."""
    rows, weight, ends = call.node.args[:3]
    if not all(isinstance(one, fx.Node) for one in (rows, weight, ends)) or len(call.tensors()) > 3:
        raise NotFollowed("it has other operands than rows, matrices and their ends")
    view = call.label_of(weight)
    if not propagation.is_trained(view) or view.tensor.dim() != 3:
        raise NotFollowed("its matrices are no parameter")
    ids = propagation.activation(call.label_of(rows), call.value_of(rows))
    bounds = [0, *call.value_of(ends).tolist()]
    matrices = [_matrix(view, i) for i in range(len(bounds) - 1)]
    if bounds[-1] != len(ids) or not isinstance(view, ParameterView):
        raise NotFollowed("it leaves out some rows, or computes its matrices")
    reached = [end > start for start, end in pairwise(bounds)]
    propagation.experts.append((call.node, matrices, reached))
    parts = [
        linear_labels(propagation, call, ids[start:end], part, (1, 0))
        for part, (start, end) in zip(matrices, pairwise(bounds), strict=True)
        if end > start
    ]
    return torch.cat(parts)


def _matrix(view: ParameterView | ComputedWeight, index: int) -> ParameterView | ComputedWeight:
    """Return one of several matrices."""
    return view.changed(lambda one: one[index])


@rule("bilinear")
def _bilinear(propagation: LabelPropagation, call: Call) -> Label:
    """Read the channels of two operands by a weight, a product of each pair; write new ones."""
    view = trained_weight(propagation, call, "weight")
    first, second = (
        propagation.common_row(
            rows_along(propagation.activation(call.label(name), call.value(name)), -1)
        )
        for name in ("input1", "input2")
    )
    propagation.weigh(view, "weight", {1: first, 2: second}, inward=[1, 2])
    result = moving(outgoing(propagation, view, "weight", 0), call.node.name, call.output.shape)
    scale_channels(propagation, call, "bias", result, axis=-1)
    return result


@rule("embedding")
def _embedding(propagation: LabelPropagation, call: Call) -> Label:
    """Write the channels of the table's columns; its rows stay."""
    view = trained_weight(propagation, call, "weight")
    return moving(outgoing(propagation, view, "weight", 1), call.node.name, call.output.shape)


@rule("embedding_bag", "_embedding_bag")
def _embedding_bag(propagation: LabelPropagation, call: Call) -> Label:
    """Do as for an embedding; only the first output carries channels."""
    out = outgoing(propagation, trained_weight(propagation, call, "weight"), "weight", 1)
    return (moving(out, call.node.name, call.output[0].shape), None, None, None)


def _mixes_positions(propagation: LabelPropagation, rows: Tensor) -> bool:
    """Return whether an axis holds positions: each row is one channel, and the rows differ."""
    rows = propagation.roots(rows)
    return rows.size(0) > 1 and bool((rows == rows[:, :1]).all()) and bool((rows >= 0).all())


def _channels_labels(call: Call, out: Tensor, shape: Sequence[int]) -> Tensor:
    """Spread channel labels over an output; fixed channels get an id for each element."""
    labels = out.reshape(1, -1, *[1] * (len(shape) - 2)).expand(tuple(shape))
    if bool((out < 0).any()):
        labels = torch.where(labels >= 0, labels, fixed_ids(call.node.name, shape))
    return labels
