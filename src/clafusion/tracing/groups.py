"""Exported graph -> channel groups, by running the graph on labels.

Abstract interpretation finds which channels of which tensors must move together. Every tensor of
the graph gets a *label tensor* of its own shape. Each element of it is

- an *atom* (a number >= 0): the channel that the element belongs to; atoms live in a union-find;
- or a *fixed id* (a number < 0): the element moves with no channel. It comes from the model's
  input, from a constant or from a reduction over channels. Equal ids mean equal values.

Weighted operations create atoms, operations of two activations unite them, and structural
operations (view, permute, cat, slice...) run on the label tensor as they are. Where an atom meets
fixed elements (a mask, a rotary angle, an attention score), their sequence becomes a *fingerprint*
of the atom. Atoms are exchangeable, and so form one channel group, exactly if they occupy the same
axes of the same parameters and carry the same fingerprints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

import clafusion.tracing.labels.rules  # noqa: F401  (registers the rules)
from clafusion.execution.call import State
from clafusion.tracing.labels.drafts import DraftUse
from clafusion.tracing.labels.experts import settle_experts
from clafusion.tracing.labels.ids import collapse
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.positions import find_token_hidden_units
from clafusion.tracing.labels.rule import Label
from clafusion.tracing.labels.states import find_states
from clafusion.tracing.model import ChannelGroup, GroupAxis, ParameterUse

__all__ = ["Channels", "NodeChannels", "find_channels"]


@dataclass(frozen=True)
class NodeChannels:
    """Where the channels of a node's value lie.

    Attributes
    ----------
    axis
        The only axis along which the labels vary; None where they vary along none or several.
    groups, members
        ``(num_channels,)``: the group of each channel (-1: fixed) and its position in it.
    moving
        Whether any element belongs to an atom.
    free
        Whether any element belongs to a channel group, so that it can be permuted.
    is_crossed
        Whether the positions belong to channels of another group.
    """

    axis: int | None
    groups: Tensor
    members: Tensor
    moving: bool
    free: bool
    is_crossed: bool = False


@dataclass(frozen=True)
class Channels:
    """What the labels show of a graph.

    Attributes
    ----------
    groups
        The channel groups: those with more than one channel, and those that were asked for.
    alone
        The channels that are exchangeable with no other, as groups of one. In whole heads they may
        still change places.
    uses
        Every view of every parameter, in graph order.
    nodes
        The channels of each node that carries any, by the node's name.
    shapes
        The shape of each node's value, for the example inputs.
    labels
        The run on labels that showed all this.
    unreached
        Parameters with entries that no input reached and that keep their places; how many.
    """

    groups: tuple[ChannelGroup, ...]
    alone: tuple[ChannelGroup, ...]
    uses: tuple[ParameterUse, ...]
    nodes: Mapping[str, NodeChannels]
    shapes: Mapping[str, tuple[int, ...]]
    labels: LabelPropagation
    unreached: Mapping[str, int] = field(default_factory=dict)

    def with_singles(self, singles: frozenset[int]) -> Channels:
        """Return the channels with those atoms of ``alone`` as groups of one channel."""
        return replace(_channels(self.labels, self.shapes, singles), unreached=self.unreached)


def find_channels(
    module: fx.GraphModule,
    placeholders: Sequence[str | None],
    state: State,
    buffers: frozenset[str],
    inputs: Sequence[Tensor],
    layouts: Mapping[str, tuple[int, ...]] | None = None,
) -> Channels:
    """Return the channel groups of an exported graph.

    Parameters
    ----------
    module
        The graph; its inputs are the state entries and the model's inputs.
    placeholders
        For each of its inputs the state entry's name, or None for a model input.
    state
        Contiguous parameters, buffers and constants.
    buffers
        Which entries of ``state`` are not trained: outside of norms they count as constants.
    inputs
        A small example; the label tensors are as large as its activations.
    layouts
        See :attr:`TracedModel.layouts`.

    Raises
    ------
    UnsupportedOpError
        As for :meth:`clafusion.tracing.labels.interpreter.LabelPropagation.run`.
    """
    labels = LabelPropagation(state, buffers, None, layouts)
    shapes = labels.run(module, placeholders, inputs)
    if labels.undecided:
        # A parameter met several atoms. Later operations may have united them: run again with
        # the atoms united from the start.
        labels = LabelPropagation(state, buffers, labels.parents, layouts)
        shapes = labels.run(module, placeholders, inputs)
    settle_experts(labels)
    find_token_hidden_units(labels, module)
    find_states(labels, module, placeholders, inputs)
    overlapping = _pin_overlaps(labels)
    unreached = {
        name: count for name, count in labels.settle_unreached().items() if name not in overlapping
    }
    return replace(_channels(labels, shapes, frozenset()), unreached=unreached)


def _channels(
    labels: LabelPropagation, shapes: Mapping[str, tuple[int, ...]], singles: frozenset[int]
) -> Channels:
    uses = tuple(
        ParameterUse(use.name, use.role, use.size, use.stride, use.offset, i)
        for i, use in enumerate(labels.uses.values())
    )
    roots = labels.roots(torch.arange(len(labels.parents))).numpy()
    found = _groups(labels, uses, roots)
    kept = [one for one in found if one.size > 1 or int(one.atoms[0]) in singles]
    groups = tuple(replace(one, index=i) for i, one in enumerate(kept))
    group_of = np.full(len(roots) + 1, -1, dtype=np.int64)
    member_of = np.full(len(roots) + 1, -1, dtype=np.int64)
    for group in groups:
        group_of[group.atoms.numpy()] = group.index
        member_of[group.atoms.numpy()] = np.arange(group.size)
    nodes = {
        node.name: replace(
            _node_channels(labels, label, group_of, member_of), is_crossed=node in labels.crossed
        )
        for node, label in labels.labels.items()
        if isinstance(label, (Tensor, tuple))
    }
    alone = tuple(one for one in found if one.size == 1)
    return Channels(groups, alone, uses, nodes, shapes, labels)


def _groups(
    labels: LabelPropagation, uses: Sequence[ParameterUse], roots: NDArray[np.int64]
) -> tuple[ChannelGroup, ...]:
    """Put atoms into one group where they have the same axes and the same fingerprints."""
    pinned = np.zeros(len(roots), dtype=bool)
    pinned[roots[list(labels.pinned)]] = True
    counted, averaged = (
        {int(roots[atom]) for atom in atoms} for atoms in (labels.counted, labels.averaged)
    )
    fingerprints = labels.fingerprints(roots)
    places = _places(labels, roots)
    alike: dict[tuple[tuple[tuple[int, tuple[int, ...]], ...], int], list[int]] = {}
    for root, signature in _signatures(places, ~pinned):
        alike.setdefault((signature, int(fingerprints[root])), []).append(root)
    drafts = list(labels.uses.values())
    groups: list[ChannelGroup] = []
    for (signature, _), found in sorted(alike.items(), key=lambda item: (item[0][0], min(item[1]))):
        members = np.array(found)
        members = members[np.argsort(places[signature[0][0]].of(members)[:, 0], kind="stable")]
        group_axes = tuple(
            GroupAxis(
                uses[place.use],
                place.axis,
                drafts[place.use].directions[place.axis],
                torch.from_numpy(place.of(members)),
            )
            for place in (places[i] for i, _ in signature)
        )
        is_counted = not counted.isdisjoint(found)
        atoms = torch.from_numpy(members)
        groups.append(
            ChannelGroup(
                len(groups),
                len(members),
                atoms,
                group_axes,
                is_counted,
                is_averaged=not averaged.isdisjoint(found),
            )
        )
    return tuple(groups)


@dataclass(frozen=True)
class _Place:
    """Where roots occur on an axis of a use.

    Attributes
    ----------
    use, axis
        The number of the use, and the axis.
    roots
        ``(num_roots,)``: ascending.
    starts
        ``(num_roots + 1,)``: where in ``positions`` those of each root begin.
    positions
        The positions of the roots' atoms, ascending for each root.
    orders
        ``(num_roots,)``: which of ``known_orders`` the atoms of each root have there. Members of
        one group must have theirs in the same order, for their positions correspond one by one.
    known_orders
        Orders of atoms.
    """

    use: int
    axis: int
    roots: NDArray[np.int64]
    starts: NDArray[np.int64]
    positions: NDArray[np.int64]
    orders: NDArray[np.int64]
    known_orders: Sequence[tuple[int, ...]]

    def of(self, roots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions ``(len(roots), repeats)`` of roots that occur equally often."""
        rows = np.searchsorted(self.roots, roots)
        repeats = self.starts[rows[0] + 1] - self.starts[rows[0]]
        return self.positions[self.starts[rows][:, None] + np.arange(repeats)]


def _places(labels: LabelPropagation, roots: NDArray[np.int64]) -> list[_Place]:
    """Return every axis of every use that carries atoms, in order."""
    places = []
    for i, use in enumerate(labels.uses.values()):
        for axis, ids in sorted(use.axes.items()):
            array = ids.numpy()
            positions = np.flatnonzero(array >= 0)
            if len(positions) == 0:
                continue
            atoms = array[positions]
            by_root = np.argsort(roots[atoms], kind="stable")
            positions, atoms = positions[by_root], atoms[by_root]
            found, starts = np.unique(roots[atoms], return_index=True)
            starts = np.append(starts, len(positions))
            orders, known = _orders(atoms, starts)
            places.append(_Place(i, axis, found, starts, positions, orders, known))
    return places


def _orders(
    atoms: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[tuple[int, ...]]]:
    """Return in which order the atoms of each root come, as numbers in a list of orders."""
    counts = np.diff(starts)
    orders = np.zeros(len(counts), dtype=np.int64)
    known: list[tuple[int, ...]] = []
    for count in np.unique(counts):
        if count == 1:
            known.append((0,))
            orders[counts == 1] = len(known) - 1
            continue
        rows = np.flatnonzero(counts == count)
        of_rows = np.argsort(atoms[starts[rows][:, None] + np.arange(count)], 1, kind="stable")
        distinct, inverse = np.unique(of_rows, axis=0, return_inverse=True)
        orders[rows] = inverse.reshape(-1) + len(known)
        known.extend(tuple(row) for row in distinct.tolist())
    return orders, known


def _signatures(
    places: Sequence[_Place], wanted: NDArray[np.bool_]
) -> Iterator[tuple[int, tuple[tuple[int, tuple[int, ...]], ...]]]:
    """Yield each wanted root with the places where it occurs, and its atoms' orders there.

    ``wanted`` says of each atom whether it is one: a vocabulary's entries, which stay, are many.
    """
    if not places or not wanted.any():
        return
    roots = np.concatenate([place.roots for place in places])
    which = np.concatenate([np.full(len(one.roots), i) for i, one in enumerate(places)])
    orders = np.concatenate([place.orders for place in places])
    kept = wanted[roots]
    roots, which, orders = roots[kept], which[kept], orders[kept]
    by_root = np.argsort(roots, kind="stable")
    found, starts = np.unique(roots[by_root], return_index=True)
    pairs = list(zip(which[by_root].tolist(), orders[by_root].tolist(), strict=True))
    ends = [*starts, len(pairs)][1:]
    for root, start, end in zip(found.tolist(), starts.tolist(), ends, strict=True):
        yield root, tuple((i, places[i].known_orders[one]) for i, one in pairs[start:end])


def _node_channels(
    labels: LabelPropagation,
    label: Tensor | tuple[Label, ...],
    group_of: NDArray[np.int64],
    member_of: NDArray[np.int64],
) -> NodeChannels:
    nothing = torch.empty(0, dtype=torch.int64)
    if isinstance(label, tuple):
        parts = [
            _node_channels(labels, part, group_of, member_of)
            for part in label
            if isinstance(part, Tensor)
        ]
        moving = any(part.moving for part in parts)
        return NodeChannels(None, nothing, nothing, moving, any(part.free for part in parts))
    (collapsed,) = collapse(labels.roots(collapse(label)[0]))
    varying = [axis for axis in range(collapsed.dim()) if collapsed.size(axis) > 1]
    atoms = collapsed.reshape(-1).clamp(min=-1).numpy()
    groups = torch.from_numpy(group_of[atoms])
    members = torch.from_numpy(member_of[atoms])
    moving, free = bool((collapsed >= 0).any()), bool((groups >= 0).any())
    if len(varying) != 1:
        return NodeChannels(None, nothing, nothing, moving, free)
    return NodeChannels(varying[0], groups, members, moving, free)


def _pin_overlaps(labels: LabelPropagation) -> set[str]:
    """Pin the channels of a parameter whose views share elements, as these would move twice.

    Returns the names of such parameters.
    """
    found = set()
    by_name: dict[str, list[DraftUse]] = {}
    for use in labels.uses.values():
        by_name.setdefault(use.name, []).append(use)
    for name, views in by_name.items():
        if len(views) == 1:
            continue
        tensor = labels.state[name]
        count = torch.zeros(tensor.numel(), dtype=torch.int32)
        for use in views:
            count.as_strided(use.size, use.stride, use.offset).add_(1)
        if int(count.max()) > 1:
            found.add(name)
            for use in views:
                for ids in use.axes.values():
                    labels.pin(ids)
                    labels.lose(ids, f"it reads {name!r} in another way, too", node=use.node)
    return found
