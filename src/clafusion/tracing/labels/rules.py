"""What each operation does with labels. Importing this module registers the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.ids import (
    collapse,
    combine,
    fixed_ids,
    sequence_ids,
    value_ids,
    varies_along,
)
from clafusion.tracing.labels.interpreter import (
    POINTWISE,
    Call,
    Label,
    LabelPropagation,
    ParameterView,
    rule,
)

# --- operations that move or copy elements ----------------------------------------------


@rule(
    *"""_reshape_alias _unsafe_view broadcast_to cat chunk concat concatenate
    constant_pad_nd diagonal expand expand_as flatten flip gather hstack im2col index
    index_select movedim narrow numpy_T pad permute pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d repeat repeat_interleave reshape roll rot90
    select slice split split_with_sizes squeeze stack swapaxes swapdims t tile transpose
    tril triu unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze vstack view
    view_as mT adjoint ravel tensor_split atleast_1d atleast_2d atleast_3d""".split()
)
def _structural(analysis: LabelPropagation, call: Call) -> Label:
    """Run the operation itself, on the labels."""
    tensors = call.tensors()
    sources = [node for _, node in tensors if not analysis.is_constant(call.label_of(node))]
    target: Any = call.node.target
    indices = {node for name, node in tensors if name in ("indices", "index", "repeats")}
    if any(node in indices for node in sources):
        raise analysis.unsupported(call.node, "it indexes by values that depend on the input")
    if len(sources) == 1 and isinstance(call.label_of(sources[0]), ParameterView):
        view = call.label_of(sources[0])
        assert isinstance(view, ParameterView)
        moved = target(
            *_with(call, {sources[0]: view.tensor}, call.node.args),
            **_with(call, {sources[0]: view.tensor}, call.node.kwargs),
        )
        if isinstance(moved, Tensor) and _same_memory(moved, view.tensor):
            return ParameterView(view.name, moved)
        if isinstance(moved, (list, tuple)) and all(_same_memory(m, view.tensor) for m in moved):
            return tuple(ParameterView(view.name, one) for one in moved)
    shape_only = {"expand_as": 1, "view_as": 1}.get(call.name)
    substitutes: dict[fx.Node, Tensor] = {}
    for i, (_, node) in enumerate(tensors):
        if node not in indices and i != shape_only:
            substitutes[node] = analysis.activation(call.label_of(node), call.value_of(node))
    # Labels may be laid out otherwise than the values, and some operations have no integer kernel;
    # ids are exact in float64.
    for change in (_as_is, Tensor.contiguous, Tensor.double):
        try:
            return _moved(call, {node: change(ids) for node, ids in substitutes.items()})
        except (RuntimeError, NotImplementedError):
            continue
    raise analysis.unsupported(call.node, "it cannot run on label tensors")


def _as_is(ids: Tensor) -> Tensor:
    return ids


_FILLING = frozenset("constant_pad_nd pad tril triu".split())


def _moved(call: Call, substitutes: Mapping[fx.Node, Tensor]) -> Label:
    shift = 0
    arguments, keywords = list(call.node.args), dict(call.node.kwargs)
    if call.name in _FILLING and call.bound.get("mode", "constant") == "constant":
        # The zeros that are filled in must become the id of the fill value, not atom 0: let the
        # ids run shifted by it.
        shift = int(value_ids(torch.tensor(float(call.bound.get("value") or 0.0))))
        substitutes = {node: ids - shift for node, ids in substitutes.items()}
        if "value" in call.bound:
            position = 2 if call.name == "constant_pad_nd" else 3
            arguments[position:] = []
            keywords.pop("value", None)
    target: Any = call.node.target
    result = target(*_with(call, substitutes, arguments), **_with(call, substitutes, keywords))
    if isinstance(result, (list, tuple)):
        return tuple(one.long() for one in result)
    moved: Tensor = result.long() + shift if shift else result.long()
    return moved


def _with(call: Call, substitutes: Mapping[fx.Node, Any], arguments: Any) -> Any:
    def substitute(node: fx.Node) -> Any:
        if node in substitutes:  # labels, or a view of a parameter, which a copy would not be
            return substitutes[node]
        value = call.value_of(node)
        return value.cpu() if isinstance(value, Tensor) else value

    return fx.map_arg(arguments, substitute)


def _same_memory(one: Any, other: Tensor) -> bool:
    return (
        isinstance(one, Tensor)
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


@rule(
    *"""_to_copy to type_as clone contiguous detach alias alias_copy dropout native_dropout
    feature_dropout alpha_dropout lift_fresh lift_fresh_copy float double half bfloat16
    _conj resolve_conj resolve_neg identity""".split()
)
def _unchanged(_analysis: LabelPropagation, call: Call) -> Label:
    """Keep the labels: another dtype, layout or copy, or a dropout that does nothing here."""
    label = call.label_of(call.tensors()[0][1])
    return (label, None) if isinstance(call.output, tuple) else label


# --- elementwise ------------------------------------------------------------------------


@rule(
    POINTWISE,
    *"""where masked_fill clamp clamp_min clamp_max hardtanh relu6 rrelu softplus hardswish
    hardsigmoid hardshrink softshrink threshold celu selu elu gelu silu mish log_sigmoid
    leaky_relu softsign __and__ __or__ __xor__""".split(),
)
def _elementwise(analysis: LabelPropagation, call: Call) -> Label:
    """Unite the labels of the operands element by element."""
    operands = [node for _, node in call.tensors()]
    return _combined(
        analysis,
        call.node.name,
        [(call.label_of(node), call.value_of(node)) for node in operands],
    )


def _combined(
    analysis: LabelPropagation, text: str, operands: Sequence[tuple[Label, Tensor]]
) -> Label:
    views = [label for label, _ in operands if analysis.is_trained(label)]
    if len(operands) == 1 and views:
        return views[0]  # a function of a parameter, element by element, moves as it does
    activations = [
        analysis.activation(label, value)
        for label, value in operands
        if not analysis.is_trained(label)
    ]
    shape = torch.broadcast_shapes(*(value.shape for _, value in operands))
    if not activations:
        activations = [analysis.element_ids(views[0])]
        for view in views[1:]:
            analysis.unite(activations[0], analysis.element_ids(view))
        return activations[0].expand(shape)
    for view in views:
        # The labels of all activations matter: a parameter may meet one only through another.
        for ids in activations:
            if bool((collapse(ids)[0] >= 0).any()):
                analysis.scale(view, ids.expand(shape))
                break
    elements = [analysis.element_ids(view) for view in views]
    if elements and not any(bool((collapse(ids)[0] >= 0).any()) for ids in activations):
        for ids in elements:  # a parameter that meets the model's input stays in its place
            analysis.pin(ids)
        elements = [-1 - ids for ids in elements]
    for one, other in combinations(activations, 2):
        analysis.unite(one.expand(shape), other)
    return _joined(text, [*activations, *elements], shape)


def _joined(text: str, operands: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the labels of an elementwise result: the atom where there is one, else a new id."""
    for ids in operands:
        if bool((collapse(ids)[0] >= 0).all()) and ids.expand(shape).shape == torch.Size(shape):
            return ids.expand(shape)
    reduced = collapse(*operands)
    result = combine(text, [ids.clamp(max=-1) for ids in reduced])
    for ids in reduced:
        result = torch.where(ids >= 0, ids, result)
    return result.expand(shape)


@rule("prelu")
def _prelu(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("self"), call.value("self"))
    _scale_channels(analysis, call, "weight", ids)
    return ids


@rule("glu")
def _glu(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("self"), call.value("self"))
    first, second = ids.chunk(2, dim=call.value("dim"))
    analysis.unite(first, second)
    return _joined(call.node.name, [first, second], first.shape)


def _scale_channels(
    analysis: LabelPropagation, call: Call, name: str, ids: Tensor, axis: int = 1
) -> None:
    """Let a parameter (num_channels,) act along an axis of an activation."""
    label = call.label(name)
    value = call.value(name)
    if not isinstance(value, Tensor):
        return
    if axis < 0:
        axis += ids.dim()
    shape = [-1 if i == axis and value.numel() > 1 else 1 for i in range(ids.dim())]
    if isinstance(label, ParameterView):
        analysis.scale(label, ids, shape)
    elif label is None:
        analysis.meet(ids, value_ids(value).reshape(shape))
    else:
        raise analysis.unsupported(call.node, f"its {name} is computed from other values")


# --- norms and reductions ---------------------------------------------------------------


def _reduced(
    analysis: LabelPropagation, text: str, ids: Tensor, axes: Sequence[int], counts: bool = False
) -> Tensor:
    """Return the labels of a reduction that ignores the order along ``axes`` (kept, size 1).

    ``counts`` tells whether twice as many values of the same kind give another result.

    Along positions the label stays. Over different channels the result is fixed, and the
    channels are marked by the results that they take part in: they may only change places
    within those.
    """
    axes = [axis % max(ids.dim(), 1) for axis in axes]
    kept = [axis for axis in range(ids.dim()) if axis not in axes]
    roots = analysis.roots(_collapse_within(ids, axes)) if ids.dim() else ids
    rows = roots.permute(*kept, *axes).flatten(len(kept)) if ids.dim() else ids.reshape(1)
    low, high = rows.amin(-1), rows.amax(-1)
    alike = low == high
    shape = [1 if axis in axes else ids.size(axis) for axis in range(ids.dim())]
    results = torch.where(alike, low, fixed_ids(text, low.shape))
    results = torch.where(alike & (low < 0), combine(text, [low.clamp(max=-1)]), results)
    results = results.reshape(shape)
    if not bool(alike.all()):
        mask = alike.reshape(shape).expand(ids.shape)
        analysis.meet(torch.where(mask, -1, ids), results.clamp(max=-1).expand(ids.shape))
        if counts:
            analysis.count(torch.where(mask, -1, ids))
    return results


_COUNTING = frozenset("sum nansum norm logsumexp prod linalg_vector_norm count_nonzero".split())


def _collapse_within(ids: Tensor, axes: Sequence[int]) -> Tensor:
    """Drop those of ``axes`` along which the labels do not vary."""
    for axis in axes:
        if ids.size(axis) > 1 and not varies_along(ids, axis):
            ids = ids.narrow(axis, 0, 1)
    return ids


@rule(
    *"""sum mean amax amin var std norm logsumexp prod any all nansum var_mean std_mean
    linalg_vector_norm max min median max_pool_all count_nonzero aminmax""".split()
)
def _reduction(analysis: LabelPropagation, call: Call) -> Label:
    operands = call.tensors()
    if len(operands) == 2:  # max(a, b) and min(a, b) are elementwise
        return _elementwise(analysis, call)
    ids = analysis.activation(call.label_of(operands[0][1]), call.value_of(operands[0][1]))
    axes = call.concrete(call.bound.get("dim"))
    axes = [axes] if isinstance(axes, int) else list(axes or range(ids.dim()))
    axes = [axis % max(ids.dim(), 1) for axis in axes]
    results = _reduced(analysis, call.node.name, ids, axes, call.name in _COUNTING)
    if call.name in ("max", "min", "median") and isinstance(call.output, tuple):
        wanted = {user.args[1] for user in call.node.users if user.users}
        if wanted - {0}:
            analysis.pin(torch.where(results < 0, ids, -1))  # the winner's place is a result, too
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    if outputs[0].dim() < ids.dim():
        results = results.flatten() if outputs[0].dim() == 0 else results.squeeze(tuple(axes))
        results = results.reshape(outputs[0].shape)
    return (results,) * len(outputs) if isinstance(call.output, tuple) else results


@rule(*"softmax _softmax log_softmax _log_softmax _safe_softmax softmin".split())
def _softmax(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("self"), call.value("self"))
    sums = _reduced(analysis, call.node.name, ids, [call.value("dim")], counts=True)
    return _joined(call.node.name, [ids, sums.clamp(max=-1)], ids.shape)


@rule(*"cumsum cumprod logcumsumexp cummax cummin sort argsort topk argmax argmin kthvalue".split())
def _ordered(analysis: LabelPropagation, call: Call) -> Label:
    """Depend on the order along an axis: channels there keep their places."""
    ids = analysis.activation(call.label("self"), call.value("self"))
    axis = call.concrete(call.bound.get("dim"))
    axes = list(range(ids.dim())) if axis is None else [axis % max(ids.dim(), 1)]
    if _collapse_within(ids, axes).numel() != ids.numel() and call.name.startswith("cum"):
        return ids
    analysis.pin(ids)
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    labels = tuple(fixed_ids(f"{call.node.name}{i}", one.shape) for i, one in enumerate(outputs))
    return labels if isinstance(call.output, tuple) else labels[0]


@rule(*["batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"])
def _batch_norm(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    for name in ("weight", "bias", "running_mean", "running_var"):
        _scale_channels(analysis, call, name, ids)
    return (ids, None, None) if isinstance(call.output, tuple) else ids


@rule("instance_norm")
def _instance_norm(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    _reduced(analysis, call.node.name, ids, range(2, ids.dim()))
    for name in ("weight", "bias", "running_mean", "running_var"):
        _scale_channels(analysis, call, name, ids)
    return ids


@rule(*"layer_norm native_layer_norm rms_norm _fused_rms_norm".split())
def _layer_norm(analysis: LabelPropagation, call: Call) -> Label:
    name = "input" if "input" in call.bound else "self"
    ids = analysis.activation(call.label(name), call.value(name))
    count = len(call.value("normalized_shape"))
    _reduced(analysis, call.node.name, ids, range(ids.dim() - count, ids.dim()))
    for parameter in ("weight", "bias"):
        label = call.label(parameter)
        if isinstance(label, ParameterView):
            analysis.scale(label, ids)
        elif isinstance(label, Tensor):
            raise analysis.unsupported(call.node, f"its {parameter} is computed from other values")
    return (ids, None, None) if isinstance(call.output, tuple) else ids


@rule(*["group_norm", "native_group_norm"])
def _group_norm(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    groups = call.value("num_groups" if "num_groups" in call.bound else "group")
    _reduced(
        analysis,
        call.node.name,
        ids.unflatten(1, (groups, ids.size(1) // groups)),
        range(2, ids.dim() + 1),
    )
    for name in ("weight", "bias"):
        _scale_channels(analysis, call, name, ids)
    return (ids, None, None) if isinstance(call.output, tuple) else ids


# --- pooling ----------------------------------------------------------------------------


@rule(
    *"""max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa lp_pool2d _upsample_nearest_exact1d _upsample_nearest_exact2d""".split()
)
def _pooling(analysis: LabelPropagation, call: Call) -> Label:
    """Mix positions: the label stays where all positions have the same one."""
    node = call.tensors()[0][1]
    ids = analysis.activation(call.label_of(node), call.value_of(node))
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    spatial = _spatial_axes(call.name, ids.dim())
    label = _collapse_within(ids, spatial)
    if all(label.size(axis) == 1 for axis in spatial):
        if bool((label < 0).any()):
            label = torch.where(label >= 0, label, combine(call.node.name, [label.clamp(max=-1)]))
        label = label.expand(outputs[0].shape)
    else:
        analysis.pin(ids)  # channels along a pooled axis keep their places
        label = fixed_ids(call.node.name, outputs[0].shape)
    return (label,) * len(outputs) if isinstance(call.output, tuple) else label


def _spatial_axes(name: str, dims: int) -> list[int]:
    count = next(int(digit) for digit in name if digit.isdigit())
    return list(range(dims - count, dims))


# --- weighted operations ----------------------------------------------------------------


def _weight(analysis: LabelPropagation, call: Call, name: str) -> ParameterView:
    label = call.label(name)
    if not analysis.is_trained(label):
        raise analysis.unsupported(
            call.node,
            f"its {name} is {'a constant' if label is None else 'computed from other values'}, "
            "not a parameter (remove parametrizations such as weight_norm first)",
        )
    return label


def _rows(ids: Tensor, axis: int) -> Tensor:
    """Return the different rows ``(num_rows, num_channels)`` of labels along ``axis``."""
    moved = ids.movedim(axis, -1)
    (reduced,) = collapse(moved)
    return reduced.expand(*reduced.shape[:-1], moved.size(-1)).reshape(-1, moved.size(-1))


def _mixes_positions(analysis: LabelPropagation, rows: Tensor) -> bool:
    """Tell whether an axis holds positions: each row is one channel, and the rows differ."""
    rows = analysis.roots(rows)
    return rows.size(0) > 1 and bool((rows == rows[:, :1]).all()) and bool((rows >= 0).all())


def _outgoing(analysis: LabelPropagation, view: ParameterView, role: str, axis: int) -> Tensor:
    """Return the labels of a weight's outgoing channels: new atoms, or those of its first use."""
    count = view.tensor.size(axis)
    if count == 1:
        return fixed_ids(f"{view.name}{role}single", (1,))
    return analysis.weigh(view, role, {axis: analysis.fresh(count)})[axis]


def _linear_labels(
    analysis: LabelPropagation, call: Call, ids: Tensor, view: ParameterView, axes: tuple[int, int]
) -> Tensor:
    """Return the labels of ``ids @ weight`` over the last axis; ``axes`` = (out, in)."""
    rows = _rows(ids, -1)
    count = view.tensor.size(axes[0])
    if _mixes_positions(analysis, rows):
        return ids[..., :1].expand(*ids.shape[:-1], count)
    analysis.weigh(view, "weight", {axes[1]: analysis.common_row(rows)}, inward=[axes[1]])
    if count == 1:
        return fixed_ids(call.node.name, (*ids.shape[:-1], 1))
    return _outgoing(analysis, view, "weight", axes[0]).expand(*ids.shape[:-1], count)


@rule("linear")
def _linear(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    result = _linear_labels(analysis, call, ids, _weight(analysis, call, "weight"), (0, 1))
    _scale_channels(analysis, call, "bias", result, axis=-1)
    return result


@rule(*"conv1d conv2d conv3d convolution _convolution".split())
def _conv(analysis: LabelPropagation, call: Call) -> Label:
    if call.bound.get("transposed"):
        return _transposed_conv(analysis, call)
    ids = analysis.activation(call.label("input"), call.value("input"))
    view = _weight(analysis, call, "weight")
    weight = view.tensor
    groups = call.value("groups")
    rows = _rows(ids, 1)
    outputs, per_group = weight.size(0), weight.size(1)
    shape = call.output.shape
    if groups == 1 and weight[0, 0].numel() == 1 and _mixes_positions(analysis, rows):
        result = ids[:, :1].expand(shape)
    else:
        row = analysis.common_row(rows)
        if per_group == 1 and groups > 1:  # depthwise: every output belongs to its input
            out = row.repeat_interleave(outputs // groups)
            out = analysis.weigh(view, "weight", {0: out})[0]
        else:
            parts = []
            for group in range(groups):
                part = ParameterView(view.name, weight.chunk(groups, 0)[group])
                incoming = row.chunk(groups)[group]
                analysis.weigh(part, "weight", {1: incoming}, inward=[1])
                parts.append(_outgoing(analysis, part, "weight", 0))
            out = torch.cat(parts)
        result = _channels_labels(call, out, shape)
    _scale_channels(analysis, call, "bias", result)
    return result


def _channels_labels(call: Call, out: Tensor, shape: Sequence[int]) -> Tensor:
    """Spread channel labels over an output; fixed channels get an id for each element."""
    labels = out.reshape(1, -1, *[1] * (len(shape) - 2)).expand(tuple(shape))
    if bool((out < 0).any()):
        labels = torch.where(labels >= 0, labels, fixed_ids(call.node.name, shape))
    return labels


@rule(*["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
def _transposed_conv(analysis: LabelPropagation, call: Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    view = _weight(analysis, call, "weight")
    groups = call.value("groups")
    row = analysis.common_row(_rows(ids, 1))
    weight = view.tensor
    if weight.size(1) == 1 and weight.size(0) == groups and groups > 1:
        out = analysis.weigh(view, "weight", {0: row})[0]
    else:
        parts = []
        for group in range(groups):
            part = ParameterView(view.name, weight.chunk(groups, 0)[group])
            analysis.weigh(part, "weight", {0: row.chunk(groups)[group]}, inward=[0])
            parts.append(_outgoing(analysis, part, "weight", 1))
        out = torch.cat(parts)
    result = _channels_labels(call, out, call.output.shape)
    _scale_channels(analysis, call, "bias", result)
    return result


@rule("embedding")
def _embedding(analysis: LabelPropagation, call: Call) -> Label:
    view = _weight(analysis, call, "weight")
    return _outgoing(analysis, view, "weight", 1).expand(call.output.shape)


@rule("embedding_bag", "_embedding_bag")
def _embedding_bag(analysis: LabelPropagation, call: Call) -> Label:
    out = _outgoing(analysis, _weight(analysis, call, "weight"), "weight", 1)
    return (out.expand(call.output[0].shape), None, None, None)


@rule(*"matmul mm bmm addmm baddbmm".split())
def _matmul(analysis: LabelPropagation, call: Call) -> Label:
    names = {
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "bmm": ("self", "mat2"),
        "mm": ("self", "mat2"),
    }.get(call.name, ("self", "other"))
    first, second = (call.label(name) for name in names)
    result: Tensor
    if analysis.is_trained(second) and second.tensor.dim() == 2:
        ids = analysis.activation(first, call.value(names[0]))
        result = _linear_labels(analysis, call, ids, second, (1, 0))
    elif analysis.is_trained(first) and first.tensor.dim() == 2:
        ids = analysis.activation(second, call.value(names[1]))
        if ids.dim() < 2:
            raise analysis.unsupported(call.node, "a matrix parameter times a vector")
        result = _linear_labels(analysis, call, ids.mT, first, (0, 1)).mT
    else:
        left, right = (
            analysis.activation(label, call.value(name))
            for label, name in zip((first, second), names, strict=True)
        )
        left = left.unsqueeze(0) if left.dim() == 1 else left
        right = right.unsqueeze(1) if right.dim() == 1 else right
        result = _contracted(analysis, call.node.name, left, right).reshape(call.output.shape)
    if call.name in ("addmm", "baddbmm"):
        return _combined(
            analysis,
            call.node.name + "_sum",
            [(call.label("self"), call.value("self")), (result, call.output)],
        )
    return result


def _contracted(analysis: LabelPropagation, text: str, left: Tensor, right: Tensor) -> Tensor:
    """Return the labels of a product of two activations ``(..., m, k) @ (..., k, n)``."""
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    m, k, n = left.size(-2), left.size(-1), right.size(-1)
    left, right = left.expand(*batch, m, k), right.expand(*batch, k, n)
    moving = [bool((collapse(ids)[0] >= 0).any()) for ids in (left, right)]
    places = fixed_ids(text, (*batch, 1))  # one id for each product in the batch
    if not any(moving):
        return fixed_ids(text, (*batch, m, n))
    if not moving[1]:
        return _contracted(analysis, text, right.mT, left.mT).mT
    if not moving[0]:
        if _constant_along(right, -2):
            # A fixed mixture of positions (attention): the channels of the right side stay.
            weights = sequence_ids(left.flatten(-2))
            analysis.meet(right[..., 0, :], weights.unsqueeze(-1).expand(*batch, n))
            return right[..., :1, :].expand(*batch, m, n)
        if _constant_along(right, -1):
            analysis.count(right[..., 0])
            analysis.meet(right[..., 0], sequence_ids(left.mT))
            return fixed_ids(text, (*batch, m, n))
        analysis.pin(right)
        return fixed_ids(text, (*batch, m, n))
    if _constant_along(left, -2) and _constant_along(right, -1):
        # Contracted channels (query with key): they move together, the result with none.
        analysis.unite(left[..., 0, :], right[..., :, 0])
        analysis.count(left[..., 0, :])
        analysis.meet(left[..., 0, :], places.expand(*batch, k))
        return fixed_ids(text, (*batch, m, n))
    analysis.pin(left)
    if _constant_along(left, -1) and _constant_along(right, -2):
        # Contracted positions (key with value in linear attention): two channels remain, of which
        # a label tensor holds one, so the left side's keep their places.
        analysis.meet(right[..., 0, :], places.expand(*batch, n))
        return right[..., :1, :].expand(*batch, m, n)
    analysis.pin(right)
    return fixed_ids(text, (*batch, m, n))


def _constant_along(ids: Tensor, axis: int) -> bool:
    return _collapse_within(ids, [axis % ids.dim()]).size(axis) == 1


@rule("scaled_dot_product_attention")
def _attention(analysis: LabelPropagation, call: Call) -> Label:
    query, key, value = (
        analysis.activation(call.label(name), call.value(name))
        for name in ("query", "key", "value")
    )
    if call.value("enable_gqa"):
        key, value = (
            ids.repeat_interleave(query.size(-3) // ids.size(-3), -3) for ids in (key, value)
        )
    scores = _contracted(analysis, call.node.name + "_scores", query, key.mT)
    mask = call.bound.get("attn_mask")
    if isinstance(mask, fx.Node):
        ids = analysis.activation(call.label("attn_mask"), call.value("attn_mask"))
        analysis.unite(scores, ids.expand(scores.shape))
        scores = _joined(call.node.name + "_mask", [scores, ids], scores.shape)
    _reduced(analysis, call.node.name + "_softmax", scores, [-1])
    return _contracted(analysis, call.node.name, scores, value)


@rule(*"lstm gru rnn_tanh rnn_relu".split())
def _recurrent(analysis: LabelPropagation, call: Call) -> Label:
    """Tie a layer's hidden channels: the rows of all gates and the columns of the recurrence."""
    if "input" not in call.bound or "hx" not in call.bound or "data" in call.bound:
        raise analysis.unsupported(call.node, "packed sequences")
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    ids = analysis.activation(call.label("input"), call.value("input"))
    weights = list(call.bound["params"])
    directions = 2 if call.value("bidirectional") else 1
    layers = call.value("num_layers")
    each = 4 if call.value("has_biases") else 2
    if len(weights) != each * directions * layers:
        raise analysis.unsupported(call.node, "projected hidden states (proj_size)")
    hidden: list[Tensor] = []
    for layer in range(layers):
        row = analysis.common_row(_rows(ids, -1))
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            atoms = _recurrence(analysis, call, row, weights[start : start + each], gates)
            outputs.append(atoms)
            hidden.append(atoms)
        channels = torch.cat(outputs)
        ids = channels.expand(*ids.shape[:-1], len(channels))
    _tie_initial_states(analysis, call, hidden)
    states = torch.stack([atoms.expand(call.output[1].size(1), -1) for atoms in hidden])
    return (ids, *[states] * (len(call.output) - 1))


def _recurrence(
    analysis: LabelPropagation, call: Call, row: Tensor, weights: Sequence[fx.Node], gates: int
) -> Tensor:
    """Tie one recurrent layer's hidden channels; return their atoms."""
    views = [label for label in map(call.label_of, weights) if isinstance(label, ParameterView)]
    if len(views) != len(weights):
        raise analysis.unsupported(call.node, "its weights are computed from other values")
    atoms = analysis.fresh(views[1].tensor.size(1))
    analysis.weigh(views[0], "weight", {0: atoms.repeat(gates), 1: row}, inward=[1])
    analysis.weigh(views[1], "weight", {0: atoms.repeat(gates), 1: atoms}, inward=[1])
    for bias in views[2:]:
        analysis.scale(bias, atoms.repeat(gates))
    return atoms


@rule(*"lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
def _recurrent_cell(analysis: LabelPropagation, call: Call) -> Label:
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(call.name, 1)
    ids = analysis.activation(call.label("input"), call.value("input"))
    weights = [call.bound[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    present = [node for node in weights if isinstance(node, fx.Node)]
    atoms = _recurrence(analysis, call, analysis.common_row(_rows(ids, -1)), present, gates)
    states = call.bound["hx"]
    for node in states if isinstance(states, (list, tuple)) else [states]:
        state = analysis.activation(call.label_of(node), call.value_of(node))
        analysis.unite(state, atoms.expand(state.shape))
    result = atoms.expand(*ids.shape[:-1], len(atoms))
    return (result, result) if isinstance(call.output, tuple) else result


def _tie_initial_states(analysis: LabelPropagation, call: Call, hidden: Sequence[Tensor]) -> None:
    initial = call.bound["hx"]
    for node in initial if isinstance(initial, (list, tuple)) else [initial]:
        ids = analysis.activation(call.label_of(node), call.value_of(node))
        for atoms, layer in zip(hidden, ids, strict=True):
            analysis.unite(layer, atoms.expand(layer.shape))
