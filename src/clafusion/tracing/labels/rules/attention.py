"""Matrix products, with a weight or of two activations, and attention."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.ids import collapse, fixed_ids, sequence_ids
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Call, Label, NotFollowed, rule
from clafusion.tracing.labels.rules.common import (
    CROSSED,
    collapse_within,
    combined,
    joined,
    reduced,
)
from clafusion.tracing.labels.rules.weighted import linear_labels

_SEVERAL = "its operands have channels along several axes"


@rule(*"matmul mm bmm addmm baddbmm".split())
def _matmul(propagation: LabelPropagation, call: Call) -> Label:
    """Multiply matrices: as a linear layer where a trained matrix takes part, else contract."""
    names = {
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "bmm": ("self", "mat2"),
        "mm": ("self", "mat2"),
    }.get(call.name, ("self", "other"))
    first, second = (call.label(name) for name in names)
    result: Tensor
    if propagation.is_trained(second) and second.tensor.dim() == 2:
        ids = propagation.activation(first, call.value(names[0]))
        result = linear_labels(propagation, call, ids, second, (1, 0))
    elif propagation.is_trained(first) and first.tensor.dim() == 2:
        ids = propagation.activation(second, call.value(names[1]))
        if ids.dim() < 2:
            raise NotFollowed("it multiplies a matrix of parameters with a vector")
        result = linear_labels(propagation, call, ids.mT, first, (0, 1)).mT
    else:
        left, right = (
            propagation.activation(label, call.value(name))
            for label, name in zip((first, second), names, strict=True)
        )
        left = left.unsqueeze(0) if left.dim() == 1 else left
        right = right.unsqueeze(1) if right.dim() == 1 else right
        result = _contracted(propagation, call.node.name, left, right).reshape(call.output.shape)
    if call.name in ("addmm", "baddbmm"):
        return combined(
            propagation,
            call.node.name + "_sum",
            [(call.label("self"), call.value("self")), (result, call.output)],
        )
    return result


@rule("scaled_dot_product_attention")
def _attention(propagation: LabelPropagation, call: Call) -> Label:
    """Contract queries with keys, add the mask, take the softmax, mix the values."""
    query, key, value = (
        propagation.activation(call.label(name), call.value(name))
        for name in ("query", "key", "value")
    )
    if call.value("enable_gqa"):
        key, value = (
            ids.repeat_interleave(query.size(-3) // ids.size(-3), -3) for ids in (key, value)
        )
    scores = _contracted(propagation, call.node.name + "_scores", query, key.mT)
    mask = call.bound.get("attn_mask")
    if isinstance(mask, fx.Node):
        ids = propagation.activation(call.label("attn_mask"), call.value("attn_mask"))
        propagation.unite(scores, ids.expand(scores.shape))
        scores = joined(call.node.name + "_mask", [scores, ids], scores.shape)
    reduced(propagation, call.node.name + "_softmax", scores, [-1])
    return _contracted(propagation, call.node.name, scores, value)


@rule("cdist", "_euclidean_dist")
def _distances(propagation: LabelPropagation, call: Call) -> Label:
    """Measure distances: as a matrix product of the first operand with the transposed second."""
    first, second = call.label("x1"), call.label("x2")
    if propagation.is_trained(second) and second.tensor.dim() == 2:
        ids = propagation.activation(first, call.value("x1"))
        propagation.count(ids)
        return linear_labels(propagation, call, ids, second, (0, 1))
    if propagation.is_trained(first) and first.tensor.dim() == 2:
        ids = propagation.activation(second, call.value("x2"))
        propagation.count(ids)
        return linear_labels(propagation, call, ids, first, (0, 1)).mT
    left, right = (
        propagation.activation(label, call.value(name))
        for label, name in ((first, "x1"), (second, "x2"))
    )
    return _contracted(propagation, call.node.name, left, right.mT).reshape(call.output.shape)


def _contracted(propagation: LabelPropagation, text: str, left: Tensor, right: Tensor) -> Tensor:
    """Return the labels of a product of two activations.

    Parameters
    ----------
    propagation
        The running propagation.
    text
        Names the product.
    left, right
        Labels ``(..., m, k)`` and ``(..., k, n)``; the leading axes broadcast.

    Returns
    -------
    Tensor
        Labels ``(..., m, n)``.
    """
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    m, k, n = left.size(-2), left.size(-1), right.size(-1)
    left, right = left.expand(*batch, m, k), right.expand(*batch, k, n)
    moving = [bool((collapse(ids)[0] >= 0).any()) for ids in (left, right)]
    places = fixed_ids(text, (*batch, 1))  # an id for each product in the batch
    if not any(moving):
        return fixed_ids(text, (*batch, m, n))
    if not moving[1]:
        return _contracted(propagation, text, right.mT, left.mT).mT
    if not moving[0]:
        if _constant_along(right, -2):
            # The left side mixes positions (attention): the channels of the right side stay.
            weights = sequence_ids(left.flatten(-2))
            propagation.meet(right[..., 0, :], weights.unsqueeze(-1).expand(*batch, n))
            return right[..., :1, :].expand(*batch, m, n)
        if _constant_along(right, -1):
            propagation.count(right[..., 0])
            propagation.meet(right[..., 0], sequence_ids(left.mT))
            return fixed_ids(text, (*batch, m, n))
        propagation.pin(right)
        propagation.lose(right, _SEVERAL)
        return fixed_ids(text, (*batch, m, n))
    if _constant_along(left, -2) and _constant_along(right, -1):
        # The product contracts channels (query with key): they move together, and the result
        # moves with none.
        propagation.unite(left[..., 0, :], right[..., :, 0])
        propagation.count(left[..., 0, :])
        propagation.meet(left[..., 0, :], places.expand(*batch, k))
        return fixed_ids(text, (*batch, m, n))
    if _constant_along(right, -2):
        # The left side mixes positions of the right side's channels: attention whose scores hold
        # trained biases, or keys that were multiplied with values first (linear attention). A label
        # names one channel, that of the right side. Those of the left side keep their places in it.
        propagation.outer.append(left)
        if not (_constant_along(left, -1) and _constant_along(left, -2)):  # else it is of heads
            propagation.lose(left, CROSSED)
        propagation.meet(left, fixed_ids(text + "_left", (*batch, m, k)))
        weights = sequence_ids(propagation.fixed(left).flatten(-2))
        propagation.meet(right[..., 0, :], weights.unsqueeze(-1).expand(*batch, n))
        return right[..., :1, :].expand(*batch, m, n)
    if _constant_along(left, -1):
        return _contracted(propagation, text, right.mT, left.mT).mT
    for ids in (left, right):
        propagation.pin(ids)
        propagation.lose(ids, _SEVERAL)
    return fixed_ids(text, (*batch, m, n))


def _constant_along(ids: Tensor, axis: int) -> bool:
    return collapse_within(ids, [axis % ids.dim()]).size(axis) == 1
