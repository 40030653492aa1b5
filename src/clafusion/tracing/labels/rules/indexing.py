"""Operations whose indices may depend on the input: gathers, scatters, samplings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.ids import collapse, fixed_ids
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Call, Label, NotFollowed, rule
from clafusion.tracing.labels.rules.common import (
    collapse_within,
    combined,
    joined,
    moving,
    outgoing,
)

__all__ = ["indexed_by_values"]

_BY_CHANNELS = "it takes channels by indices that depend on the input"


def indexed_by_values(propagation: LabelPropagation, call: Call) -> Tensor:
    """Return the labels of an operation that reads elements by indices that are no constants.

    Which element it reads is another one for another input. So along the axes that are indexed all
    elements must belong to the same channels, and nothing is known of those that move with none.

    Raises
    ------
    NotFollowed
        Channels lie along an indexed axis, or the indices move with channels.
    """
    name, operand = call.tensors()[0]
    for _, node in call.tensors()[1:]:
        _check_indices(propagation, call, node)
    axes = _indexed_axes(call)
    label, value = call.label(name), call.value_of(operand)
    if propagation.is_parameter(label):
        if axes == [0] and value.dim() == 2:  # a table, whose rows stay
            columns = outgoing(propagation, label, "weight", 1)
            return moving(columns, call.node.name, call.output.shape)
        ids = propagation.element_ids(label)
        for axis in axes:
            propagation.unite(ids, ids.narrow(axis, 0, 1).expand(ids.shape))
        ids = propagation.roots(ids)
    else:
        ids = propagation.roots(propagation.activation(label, value))
    if bool((ids >= 0).any()):
        ids = _alike_along(propagation, ids, axes)
    target: Any = call.node.target
    arguments, keywords = fx.map_arg(
        (call.node.args, call.node.kwargs),
        lambda node: ids if node is operand else call.value_of(node),
    )
    return moving(target(*arguments, **keywords), call.node.name, call.output.shape)


def _alike_along(propagation: LabelPropagation, ids: Tensor, axes: Sequence[int]) -> Tensor:
    """Return labels that do not vary along some axes; unite those of several rows of channels.

    Raises
    ------
    NotFollowed
        They vary along one of these axes and no other: it is the axis of the channels.
    """
    for axis in axes:
        if collapse_within(ids.clamp(min=-1), [axis]).size(axis) == 1:
            continue
        (varying,) = collapse(propagation.roots(ids).clamp(min=-1))
        if sum(size > 1 for size in varying.shape) < 2:
            raise NotFollowed(_BY_CHANNELS)
        propagation.unite(ids, ids.narrow(axis, 0, 1).expand(ids.shape))
        ids = propagation.roots(ids)
    return ids


def _check_indices(propagation: LabelPropagation, call: Call, node: fx.Node) -> None:
    label = call.label_of(node)
    if isinstance(label, Tensor) and bool((propagation.roots(label) >= 0).any()):
        raise NotFollowed("its indices move with channels")


def _indexed_axes(call: Call) -> list[int]:
    """Return the axes of the first operand along which an operation takes elements by index."""
    dims = call.value_of(call.tensors()[0][1]).dim()
    if "indices" not in call.bound:
        return [call.value("dim") % max(dims, 1)]
    axes: list[int] = []
    axis = 0
    for one in call.bound["indices"]:
        index = call.concrete(one)
        span = index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1
        if index is not None:
            axes += range(axis, axis + span)
        axis += span
    return axes


@rule("index_put", "_unsafe_index_put")
def _index_put(propagation: LabelPropagation, call: Call) -> Label:
    """Put values in the places of others, which belong to the same channels."""
    indices = [one for one in call.bound["indices"] if isinstance(one, fx.Node)]
    if _is_choice(call):  # as ``x[x < 0] = 0``
        operands = [call.bound["self"], call.bound["values"], *indices]
        return combined(
            propagation,
            call.node.name,
            [(call.label_of(one), call.value_of(one)) for one in operands],
        )
    for node in indices:
        _check_indices(propagation, call, node)
    own, values = (propagation.activation(call.label(n), call.value(n)) for n in ("self", "values"))
    places = tuple(call.concrete(call.bound["indices"]))
    before = torch.ops.aten.index.Tensor(own, places)
    values = values.expand(before.shape)
    is_known = all(propagation.is_constant(call.label_of(node)) for node in indices)
    if is_known and not call.value("accumulate"):
        put: Tensor = torch.ops.aten.index_put.default(own, places, values)
        return put
    for axis in _indexed_axes(call):
        if bool((own >= 0).any()) and collapse_within(own, [axis]).size(axis) > 1:
            raise NotFollowed(_BY_CHANNELS)
    # Every place may hold what was there or what is put there: both move with the same channels.
    propagation.unite(before, values)
    result = torch.ops.aten.index_put.default(own, places, values.contiguous())
    return moving(_with_atoms_along(result, _indexed_axes(call)), call.node.name, own.shape)


def _is_choice(call: Call) -> bool:
    """Say whether a mask of the operand's shape says which elements become one value."""
    (first, *others) = (call.concrete(one) for one in call.bound["indices"])
    return (
        not others
        and isinstance(first, Tensor)
        and first.dtype == torch.bool
        and first.shape == call.output.shape
        and call.value("values").numel() == 1
        and not call.value("accumulate")
    )


def _with_atoms_along(ids: Tensor, axes: Sequence[int]) -> Tensor:
    """Return labels in which an atom that stands anywhere along some axes stands everywhere."""
    for axis in axes:
        ids = ids.amax(axis, keepdim=True).expand(ids.shape)
    return ids


@rule(*"scatter scatter_add scatter_reduce index_add index_copy index_reduce".split())
def _scattered(propagation: LabelPropagation, call: Call) -> Label:
    """Put or add rows to places along one axis, which holds no channels."""
    _check_indices(propagation, call, call.bound["index"])
    axis = call.value("dim") % max(call.output.dim(), 1)
    parts = [propagation.activation(call.label("self"), call.value("self"))]
    for name in ("src", "source"):
        if isinstance(call.bound.get(name), fx.Node):
            parts.append(propagation.activation(call.label(name), call.value(name)))
    rows = []
    for ids in parts:
        ids = propagation.roots(ids)
        one = collapse_within(ids.clamp(min=-1) if bool((ids >= 0).any()) else ids[:0], [axis])
        if one.numel() and one.size(axis) > 1:
            raise NotFollowed(_BY_CHANNELS)
        rows.append(ids.narrow(axis, 0, 1))
    if len(rows) > 1:
        rows[1] = rows[1][tuple(slice(size) for size in rows[0].shape)]
        propagation.unite(rows[0].expand(rows[1].shape), rows[1])
    shape = torch.broadcast_shapes(*(one.shape for one in rows))
    row = joined(call.node.name, [one.expand(shape) for one in rows], shape)
    return moving(row.expand(call.output.shape), call.node.name, call.output.shape)


@rule(*"grid_sampler grid_sampler_2d grid_sampler_3d".split())
def _sampled(propagation: LabelPropagation, call: Call) -> Label:
    """Take positions by a grid, which itself moves with no channel."""
    grid = propagation.activation(call.label("grid"), call.value("grid"))
    propagation.pin(grid)
    propagation.lose(grid, "they are coordinates")
    ids = propagation.activation(call.label("input"), call.value("input"))
    axes = list(range(2, ids.dim()))
    ids = collapse_within(ids, axes) if bool((ids >= 0).any()) else ids[:, :, :1]
    if any(ids.size(axis) > 1 for axis in axes) and bool((ids >= 0).any()):
        raise NotFollowed("channels lie along the axes that it samples")
    if bool((ids < 0).all()):
        return fixed_ids(call.node.name, call.output.shape)
    return moving(ids.expand(call.output.shape), call.node.name, call.output.shape)


@rule("col2im")
def _folded(propagation: LabelPropagation, call: Call) -> Label:
    """Add up patches: the values of all places of one channel's patch belong to one channel."""
    ids = propagation.activation(call.label("self"), call.value("self"))
    channels = call.output.size(-3)
    patches = ids.unflatten(-2, (channels, ids.size(-2) // channels))
    firsts = patches[..., :1, :1].expand(patches.shape)
    propagation.unite(firsts, patches)
    return moving(
        firsts[..., 0, 0, None, None].expand(call.output.shape), call.node.name, call.output.shape
    )
