"""Matrix products, with a weight or of two activations, and attention."""

from __future__ import annotations

from torch import Tensor, fx

from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Call, Label, NotFollowed, rule
from clafusion.tracing.labels.rules.common import combined, joined, reduced
from clafusion.tracing.labels.rules.einsum import product_labels
from clafusion.tracing.labels.rules.products import contracted
from clafusion.tracing.labels.rules.weighted import linear_labels


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
    elif _is_batch_of_weights(propagation, first, second):
        result = _batch(propagation, call, *names)
    else:
        left, right = (
            propagation.activation(label, call.value(name))
            for label, name in zip((first, second), names, strict=True)
        )
        left = left.unsqueeze(0) if left.dim() == 1 else left
        right = right.unsqueeze(1) if right.dim() == 1 else right
        result = contracted(propagation, call.node.name, left, right).reshape(call.output.shape)
    if call.name in ("addmm", "baddbmm"):
        return combined(
            propagation,
            call.node.name + "_sum",
            [(call.label("self"), call.value("self")), (result, call.output)],
        )
    return result


def _is_batch_of_weights(propagation: LabelPropagation, first: Label, second: Label) -> bool:
    """Say whether one operand is a parameter that holds several matrices."""
    weights = [one for one in (first, second) if propagation.is_trained(one)]
    return len(weights) == 1 and weights[0].tensor.dim() > 2


def _batch(propagation: LabelPropagation, call: Call, *names: str) -> Tensor:
    """Multiply batches of matrices, of which one holds parameters."""
    values = [call.value(name) for name in names]
    count = call.output.dim() - 2
    letters = "abcdefgh"[:count]
    first, second = (
        (call.label(name), value, letters[count - value.dim() + 2 :] + ends)
        for name, value, ends in zip(names, values, ("mk", "kn"), strict=True)
    )
    return product_labels(propagation, call, first, second, letters + "mn")


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
    scores = contracted(propagation, call.node.name + "_scores", query, key.mT)
    mask = call.bound.get("attn_mask")
    if isinstance(mask, fx.Node):
        ids = propagation.activation(call.label("attn_mask"), call.value("attn_mask"))
        propagation.unite(scores, ids.expand(scores.shape))
        scores = joined(call.node.name + "_mask", [scores, ids], scores.shape)
    reduced(propagation, call.node.name + "_softmax", scores, [-1])
    return contracted(propagation, call.node.name, scores, value)


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
    return contracted(propagation, call.node.name, left, right.mT).reshape(call.output.shape)
