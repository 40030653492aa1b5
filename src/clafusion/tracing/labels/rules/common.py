"""What the rules of several families share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

import torch
from torch import Tensor

from clafusion.tracing.labels.atoms import atoms_in
from clafusion.tracing.labels.ids import collapse, combine, fixed_ids, value_ids, varies_along
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import (
    Call,
    ComputedWeight,
    Label,
    NotFollowed,
    ParameterView,
)

__all__ = [
    "CROSSED",
    "collapse_within",
    "combined",
    "joined",
    "moving",
    "outgoing",
    "reduced",
    "rows_along",
    "scale_by_computed",
    "scale_channels",
    "trained_weight",
]

CROSSED = "its result belongs to pairs of channels"
"""Why the channels of an outer product keep their places."""


def combined(
    propagation: LabelPropagation, text: str, operands: Sequence[tuple[Label, Tensor]]
) -> Label:
    """Return the label of an elementwise function of several operands; unite what it joins.

    Parameters
    ----------
    propagation
        The running propagation.
    text
        Names the function: equal fixed ids under equal names give equal results.
    operands
        The label and the value of each operand. The values' shapes broadcast.

    Returns
    -------
    Label
        Labels of the broadcast shape; the parameter view itself for a function of one trained
        parameter alone.
    """
    views = [label for label, _ in operands if propagation.is_parameter(label)]
    if len(operands) == 1 and views:
        return views[0]  # an elementwise function of a parameter moves as the parameter does
    activations = [
        propagation.activation(label, value)
        for label, value in operands
        if not propagation.is_parameter(label)
    ]
    shape = torch.broadcast_shapes(*(value.shape for _, value in operands))
    if not activations:
        activations = [propagation.element_ids(views[0])]
        for view in views[1:]:
            propagation.unite(activations[0], propagation.element_ids(view))
        return activations[0].expand(shape)
    if len(activations) > 1:
        activations = _without_outer(propagation, text, activations, len(shape))
    for view in views:
        # Any of the activations may be the one whose channels the parameter meets.
        for ids in activations:
            if bool((collapse(ids)[0] >= 0).any()):
                propagation.scale(view, ids.expand(shape))
                break
    elements = [propagation.element_ids(view) for view in views]
    if elements and not any(bool((collapse(ids)[0] >= 0).any()) for ids in activations):
        # A parameter that meets only fixed elements keeps its place, unless it moves with heads.
        elements = [
            ids if _may_be_of_heads(ids, activations[0]) else _kept(propagation, ids)
            for ids in elements
        ]
        for ids in elements:
            propagation.meet(ids.expand(shape), activations[0].expand(shape))
    for first, second in combinations(activations, 2):
        propagation.unite(first.expand(shape), second)
    return joined(text, [*activations, *elements], shape)


def _may_be_of_heads(ids: Tensor, scores: Tensor) -> bool:
    """Say whether a parameter may have a part for each head of scores.

    Those are ``(batch, head, query, key)``. A head's temperature, or its biases, go with it.
    """
    heads = ids.size(-3) if ids.dim() >= 3 else 1
    return (
        scores.dim() == 4
        and heads > 1
        and scores.size(1) == heads
        and all(size == 1 for size in ids.shape[:-3])
    )


def _kept(propagation: LabelPropagation, ids: Tensor) -> Tensor:
    propagation.pin(ids)
    return -1 - ids


def _without_outer(
    propagation: LabelPropagation, text: str, operands: Sequence[Tensor], dim: int
) -> list[Tensor]:
    """Return labels of operands in which none has channels along another axis than the others.

    An outer product belongs to two channels, but a label names one. The operand with most channels
    keeps them, and those of the others keep their places; so does a single channel that meets all.
    """
    kept = list(operands)
    spread = [_spread(propagation, ids, dim) for ids in operands]
    for (axes, _), (others, _) in permutations(spread, 2):
        if len(axes) == 1 and axes < others:
            for ids in operands:  # each layer of a stack has a channel of its own to meet
                propagation.unite_stacked(ids, min(axes) - dim)
    spread = [_spread(propagation, ids, dim) for ids in operands]
    most = max(range(len(kept)), key=lambda i: spread[i][1])
    for i, (axes, count) in enumerate(spread):
        if i != most and count and spread[most][1] > 1 and axes.isdisjoint(spread[most][0]):
            propagation.outer.append(kept[i])
            # They may change places with what they multiply, as a router's channels with experts.
            propagation.meet(kept[i], fixed_ids(f"{text}_outer{i}", kept[i].shape))
            propagation.lose(kept[i], CROSSED)
            kept[i] = propagation.fixed(kept[i])
    return kept


def _spread(propagation: LabelPropagation, ids: Tensor, dim: int) -> tuple[frozenset[int], int]:
    """Return along which of ``dim`` axes atoms vary, and how many there are."""
    (roots,) = collapse(propagation.roots(collapse(ids)[0]))
    atoms = roots[roots >= 0].unique()
    first = dim - roots.dim()
    return frozenset(first + i for i in range(roots.dim()) if roots.size(i) > 1), len(atoms)


def joined(text: str, operands: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the labels of an elementwise result: an operand's atom where there is one.

    Where every operand is fixed, the result is a new fixed id, made of theirs and ``text``.
    """
    for ids in operands:
        if bool((collapse(ids)[0] >= 0).all()) and ids.expand(shape).shape == torch.Size(shape):
            return ids.expand(shape)
    collapsed = collapse(*operands)
    result = combine(text, [ids.clamp(max=-1) for ids in collapsed])
    for ids in collapsed:
        result = torch.where(ids >= 0, ids, result)
    return result.expand(shape)


def scale_channels(
    propagation: LabelPropagation, call: Call, name: str, ids: Tensor, axis: int = 1
) -> None:
    """Let the operand ``name`` ``(num_channels,)`` act along an axis of an activation.

    A missing operand does nothing. A constant gives the channels a fingerprint. What is computed
    from other values, as a bias that is joined from parts, has channels of its own.
    """
    label = call.label(name)
    value = call.value(name)
    if not isinstance(value, Tensor):
        return
    if axis < 0:
        axis += ids.dim()
    shape = [-1 if i == axis and value.numel() > 1 else 1 for i in range(ids.dim())]
    if isinstance(label, ParameterView):
        propagation.scale(label, ids, shape)
    elif label is None:
        propagation.meet(ids, value_ids(value).reshape(shape))
    else:
        scale_by_computed(propagation, propagation.activation(label, value).reshape(shape), ids)


def scale_by_computed(propagation: LabelPropagation, own: Tensor, ids: Tensor) -> None:
    """Let computed values act on an activation; those that meet no channel keep their places."""
    own, met = collapse(own.expand(ids.shape), propagation.roots(ids))
    propagation.pin(own[(own >= 0) & (met < 0)])
    propagation.unite(own, met)


def reduced(
    propagation: LabelPropagation, text: str, ids: Tensor, axes: Sequence[int], counts: bool = False
) -> Tensor:
    """Return the labels of a reduction that ignores the order along ``axes``.

    Where the labels do not vary along ``axes`` (positions of one channel), the label stays. A
    reduction over different channels gives a fixed result. Its fixed id becomes a fingerprint of
    the channels, so that they change places only within the reduction.

    Parameters
    ----------
    propagation
        The running propagation.
    text
        Names the reduction.
    ids
        The labels that are reduced.
    axes
        The axes that are reduced; negative ones count from the end.
    counts
        Whether a copy of a channel would change the result, as in a sum.

    Returns
    -------
    Tensor
        Labels in which the reduced axes have size 1.
    """
    axes = [axis % max(ids.dim(), 1) for axis in axes]
    kept = [axis for axis in range(ids.dim()) if axis not in axes]
    roots = propagation.roots(collapse_within(ids, axes)) if ids.dim() else ids
    rows = roots.permute(*kept, *axes).flatten(len(kept)) if ids.dim() else ids.reshape(1)
    low, high = rows.amin(-1), rows.amax(-1)
    alike = low == high
    shape = [1 if axis in axes else ids.size(axis) for axis in range(ids.dim())]
    results = torch.where(alike, low, fixed_ids(text, low.shape))
    results = torch.where(alike & (low < 0), combine(text, [low.clamp(max=-1)]), results)
    results = results.reshape(shape)
    if not bool(alike.all()):
        mask = alike.reshape(shape).expand(ids.shape)
        propagation.meet(torch.where(mask, -1, ids), results.clamp(max=-1).expand(ids.shape))
        propagation.averaged.update(atoms_in(torch.where(mask, -1, ids)).tolist())
        if counts:
            propagation.count(torch.where(mask, -1, ids))
    return results


def collapse_within(ids: Tensor, axes: Sequence[int]) -> Tensor:
    """Shrink to size 1 each of ``axes`` along which the labels do not vary."""
    for axis in axes:
        if ids.size(axis) > 1 and not varies_along(ids, axis):
            ids = ids.narrow(axis, 0, 1)
    return ids


def trained_weight(
    propagation: LabelPropagation, call: Call, name: str
) -> ParameterView | ComputedWeight:
    """Return the operand ``name``: a trained parameter, a view of one, or computed from such.

    Raises
    ------
    NotFollowed
        The operand is a constant or depends on the input.
    """
    label = call.label(name)
    if not propagation.is_trained(label):
        is_constant = label is None or isinstance(label, ParameterView)
        raise NotFollowed(
            f"its {name} is {'a constant' if is_constant else 'computed from other values'}"
        )
    return label


def moving(ids: Tensor, text: str, shape: Sequence[int]) -> Tensor:
    """Return labels of a shape: the atoms in ``ids``, and new fixed ids for other elements."""
    if bool((ids >= 0).all()):
        return ids.expand(tuple(shape))
    return torch.where(ids >= 0, ids, fixed_ids(text, shape))


def outgoing(
    propagation: LabelPropagation, view: ParameterView | ComputedWeight, role: str, axis: int
) -> Tensor:
    """Return the labels of a weight's outgoing channels: new atoms, or those of its first use.

    A single channel has nothing to change places with, so it gets a fixed id; of several values of
    it each needs its own: see :func:`moving`.
    """
    count = view.tensor.size(axis)
    if count == 1:
        return fixed_ids(f"{view.name}{role}single", (1,))
    return propagation.weigh(view, role, {axis: propagation.fresh(count)})[axis]


def rows_along(ids: Tensor, axis: int) -> Tensor:
    """Return the different rows ``(num_rows, num_channels)`` of labels along ``axis``."""
    moved = ids.movedim(axis, -1)
    (distinct,) = collapse(moved)
    return distinct.expand(*distinct.shape[:-1], moved.size(-1)).reshape(-1, moved.size(-1))
