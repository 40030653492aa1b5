"""Operations that move or copy elements: views, permutations, joins, splits, paddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.ids import value_ids
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Call, Label, NotFollowed, ParameterView, rule
from clafusion.tracing.labels.rules.common import joined
from clafusion.tracing.labels.rules.indexing import indexed_by_values

_FILLING = frozenset("constant_pad_nd pad tril triu im2col".split())


@rule(
    *"""_reshape_alias _unsafe_view broadcast_to cat chunk concat concatenate
    constant_pad_nd diagonal expand expand_as flatten flip gather hstack im2col index
    index_select movedim narrow numpy_T pad permute pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d repeat repeat_interleave reshape roll rot90
    select slice split split_with_sizes squeeze stack swapaxes swapdims t tile transpose
    tril triu unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze vstack view
    view_as mT adjoint ravel tensor_split atleast_1d atleast_2d atleast_3d reshape_as
    broadcast_tensors take_along_dim slice_scatter select_scatter diagonal_scatter
    fft_fftshift fft_ifftshift""".split(),
    rearranges=True,
)
def _structural(propagation: LabelPropagation, call: Call) -> Label:
    """Run the operation itself on the labels."""
    tensors = call.tensors()
    sources = [node for _, node in tensors if not propagation.is_constant(call.label_of(node))]
    indices = {node for name, node in tensors if name in ("indices", "index", "repeats")}
    if any(node in indices for node in sources):
        return indexed_by_values(propagation, call)
    if len(sources) == 1 and isinstance(call.label_of(sources[0]), ParameterView):
        view = call.label_of(sources[0])
        assert isinstance(view, ParameterView)
        moved = _on_parameter(call, sources[0], view.tensor)
        if isinstance(moved, Tensor) and _same_memory(moved, view.tensor):
            return ParameterView(view.name, moved)
        if isinstance(moved, (list, tuple)) and all(_same_memory(m, view.tensor) for m in moved):
            return tuple(ParameterView(view.name, part) for part in moved)
    shape_only = {"expand_as": 1, "view_as": 1, "reshape_as": 1}.get(call.name)
    substitutes: dict[fx.Node, Tensor] = {}
    for i, (_, node) in enumerate(tensors):
        if node not in indices and i != shape_only:
            substitutes[node] = _elements(propagation, call, node)
    # Labels may have another memory layout than the values, and some operations have no integer
    # kernel. Ids are exact in float64.
    for change in (_as_is, Tensor.contiguous, Tensor.double):
        try:
            return _moved(call, {node: change(ids) for node, ids in substitutes.items()})
        except (RuntimeError, NotImplementedError):
            continue
    raise NotFollowed("it cannot run on labels")


def _on_parameter(call: Call, node: fx.Node, tensor: Tensor) -> Any:
    """Return an operation's result on a parameter; None where that lies in memory otherwise."""
    target: Any = call.node.target
    try:
        return target(
            *_with(call, {node: tensor}, call.node.args),
            **_with(call, {node: tensor}, call.node.kwargs),
        )
    except RuntimeError:
        return None


def _elements(propagation: LabelPropagation, call: Call, node: fx.Node) -> Tensor:
    """Return an operand's labels; of a parameter this operation may leave some elements out."""
    label = call.label_of(node)
    if propagation.is_parameter(label):
        return propagation.element_ids(label, are_reached=False)
    return propagation.activation(label, call.value_of(node))


def _as_is(ids: Tensor) -> Tensor:
    return ids


def _moved(call: Call, substitutes: Mapping[fx.Node, Tensor]) -> Label:
    """Return the operation's result on labels in place of its operands."""
    shift = 0
    arguments, keywords = list(call.node.args), dict(call.node.kwargs)
    if call.name in _FILLING and call.bound.get("mode", "constant") == "constant":
        # The operation fills in zeros. They must become the id of the fill value, not atom 0, so
        # the ids are shifted by that id while it runs.
        shift = int(value_ids(torch.tensor(float(call.bound.get("value") or 0.0))))
        substitutes = {node: ids - shift for node, ids in substitutes.items()}
        if "value" in call.bound:
            position = 2 if call.name == "constant_pad_nd" else 3
            arguments[position:] = []
            keywords.pop("value", None)
    target: Any = call.node.target
    result = target(*_with(call, substitutes, arguments), **_with(call, substitutes, keywords))
    if isinstance(result, (list, tuple)):
        return tuple(part.long() for part in result)
    moved: Tensor = result.long() + shift if shift else result.long()
    return moved


def _with(call: Call, substitutes: Mapping[fx.Node, Any], arguments: Any) -> Any:
    """Return arguments with labels for some nodes and concrete values for the others."""

    def substitute(node: fx.Node) -> Any:
        if node in substitutes:  # not moved to the CPU: a copy would be no view of the parameter
            return substitutes[node]
        value = call.value_of(node)
        return value.cpu() if isinstance(value, Tensor) else value

    return fx.map_arg(arguments, substitute)


def _same_memory(result: Any, source: Tensor) -> bool:
    return (
        isinstance(result, Tensor)
        and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    )


@rule("copy")
def _copied(propagation: LabelPropagation, call: Call) -> Label:
    """Return the labels of what is copied, in the shape of what it replaces."""
    ids = propagation.activation(call.label("src"), call.value("src"))
    return ids.expand(call.output.shape)


@rule("fill", "zero")
def _filled(propagation: LabelPropagation, call: Call) -> Label:
    """Return the labels of the value that takes the places of all others."""
    value = call.bound.get("value", 0)
    if isinstance(value, fx.Node):
        ids = propagation.activation(call.label_of(value), call.value_of(value))
    else:
        ids = value_ids(torch.tensor(float(value)))
    return ids.expand(call.output.shape)


@rule("view_as_real", "view_as_complex")
def _as_other_numbers(propagation: LabelPropagation, call: Call) -> Label:
    """Take pairs of numbers for complex ones, or the other way: both parts are of one channel."""
    ids = propagation.activation(call.label("self"), call.value("self"))
    if call.name == "view_as_real":
        return ids.unsqueeze(-1).expand(call.output.shape)
    first, second = ids.unbind(-1)
    propagation.unite(first, second)
    return joined(call.node.name, [first, second], first.shape)


@rule(
    *"""_to_copy to real imag type_as clone contiguous detach alias alias_copy dropout
    native_dropout feature_dropout alpha_dropout lift_fresh lift_fresh_copy float double half
    bfloat16 _conj resolve_conj resolve_neg identity""".split(),
    rearranges=True,
)
def _unchanged(_propagation: LabelPropagation, call: Call) -> Label:
    """Keep the labels: the values change at most their type, layout or memory.

    Dropout belongs here, for the model runs in eval mode.
    """
    label = call.label_of(call.tensors()[0][1])
    return (label, None) if isinstance(call.output, tuple) else label
