"""Exported graph -> channel groups, by running the graph on labels.

Which channels of which tensors must move together is found by abstract interpretation. Every
tensor of the graph gets a *label tensor* of its own shape that holds, per element,

- an *atom* (a number >= 0): the channel that the element belongs to; atoms live in a union-find;
- a *fixed id* (a number < 0): the element moves with no channel. It comes from the model's input,
  from a constant or from a reduction over channels. Equal ids mean equal values.

Weighted operations create atoms, operations of two activations unite them, and structural
operations (view, permute, cat, slice...) simply run on the label tensor. Where an atom meets a
fixed element (a mask, a rotary angle, an attention score), it takes on the sequence of fixed ids
that it meets as a *fingerprint*. Atoms are exchangeable, and so form one group, exactly if they
occupy the same axes of the same parameters and carry the same fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

import clafusion.tracing.labels.rules  # noqa: F401  (registers the rules)
from clafusion.errors import UnsupportedOpError
from clafusion.execution.call import State
from clafusion.tracing.labels.ids import collapse
from clafusion.tracing.labels.interpreter import Label, LabelPropagation
from clafusion.tracing.model import ChannelGroup, GroupAxis, ParameterUse

__all__ = ["Channels", "NodeChannels", "find_channels"]


@dataclass(frozen=True)
class NodeChannels:
    """Where the channels of a node's value lie.

    Attributes
    ----------
    axis
        The only axis along which the labels vary, or None where there is no such single axis.
    groups, members
        ``(num_channels,)``: the group of each channel (-1: fixed) and its position in it.
    moving
        Whether any element belongs to an atom.
    free
        Whether any element belongs to a channel group, so that it can be permuted.
    """

    axis: int | None
    groups: Tensor
    members: Tensor
    moving: bool
    free: bool


@dataclass(frozen=True)
class Channels:
    """What the analysis found: the groups, the parameter views, and the nodes' channels."""

    groups: tuple[ChannelGroup, ...]
    uses: tuple[ParameterUse, ...]
    nodes: Mapping[str, NodeChannels]
    shapes: Mapping[str, tuple[int, ...]]


def find_channels(
    module: fx.GraphModule,
    placeholders: Sequence[str | None],
    state: State,
    buffers: frozenset[str],
    inputs: Sequence[Tensor],
) -> Channels:
    """Find the channel groups of an exported graph.

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

    Raises
    ------
    UnsupportedOpError
        An operation has no rule; the message names it, where it stands and what to do.
    """
    labels = LabelPropagation(state, buffers)
    shapes = labels.run(module, placeholders, inputs)
    if labels.undecided:
        # A parameter met several atoms, which later operations may have united: look again,
        # knowing which.
        labels = LabelPropagation(state, buffers, labels.parents)
        shapes = labels.run(module, placeholders, inputs)
    return _compile(labels, shapes)


def _compile(labels: LabelPropagation, shapes: Mapping[str, tuple[int, ...]]) -> Channels:
    """Group the atoms that may change places."""
    roots = labels.roots(torch.arange(len(labels.parents))).numpy()
    fingerprints: dict[int, set[int]] = {}
    for atom, words in labels.fingerprints.items():
        fingerprints.setdefault(int(roots[atom]), set()).update(words)
    pinned = {int(roots[atom]) for atom in labels.pinned}
    counted = {int(roots[atom]) for atom in labels.counted}
    uses = tuple(
        ParameterUse(use.name, use.role, use.size, use.stride, use.offset, i)
        for i, use in enumerate(labels.uses.values())
    )
    _check_overlaps(uses, labels.state)

    # Where each atom occurs: root -> axis -> positions, in ascending order; and in which order
    # the labels that were united to it lie there, for repeats must correspond one by one.
    occurrences: dict[int, dict[tuple[int, int], list[int]]] = {}
    orders: dict[int, dict[tuple[int, int], list[int]]] = {}
    for i, use in enumerate(labels.uses.values()):
        for axis, ids in sorted(use.axes.items()):
            for position, atom in enumerate(ids.tolist()):
                if atom >= 0:
                    root = int(roots[atom])
                    occurrences.setdefault(root, {}).setdefault((i, axis), []).append(position)
                    orders.setdefault(root, {}).setdefault((i, axis), []).append(atom)
    by_places: dict[tuple[Any, ...], list[int]] = {}
    for root, group_axes in occurrences.items():
        if root not in pinned:
            places = tuple(
                (place, tuple(np.argsort(orders[root][place], kind="stable").tolist()))
                for place in sorted(group_axes)
            )
            mark = tuple(sorted(fingerprints.get(root, ())))
            by_places.setdefault((places, mark), []).append(root)

    raw = list(labels.uses.values())
    groups: list[ChannelGroup] = []
    for (places, _), members in sorted(
        by_places.items(), key=lambda item: (item[0][0], min(item[1]))
    ):
        if len(members) < 2:
            continue
        first = places[0][0]
        members.sort(key=lambda root: occurrences[root][first][0])
        axes_of_group = tuple(
            GroupAxis(
                uses[i],
                axis,
                raw[i].directions[axis],
                torch.tensor([occurrences[root][i, axis] for root in members]),
            )
            for (i, axis), _ in places
        )
        atoms = torch.tensor(members)
        is_counted = not counted.isdisjoint(members)
        groups.append(ChannelGroup(len(groups), len(members), atoms, axes_of_group, is_counted))

    group_of = np.full(len(roots) + 1, -1, dtype=np.int64)
    member_of = np.full(len(roots) + 1, -1, dtype=np.int64)
    for one in groups:
        group_of[one.atoms.numpy()] = one.index
        member_of[one.atoms.numpy()] = np.arange(one.size)
    nodes = {
        node.name: _node_channels(labels, label, group_of, member_of)
        for node, label in labels.labels.items()
        if isinstance(label, (Tensor, tuple))
    }
    return Channels(tuple(groups), uses, nodes, shapes)


def _node_channels(
    labels: LabelPropagation,
    label: Tensor | tuple[Label, ...],
    group_of: NDArray[np.int64],
    member_of: NDArray[np.int64],
) -> NodeChannels:
    if isinstance(label, tuple):
        parts = [
            _node_channels(labels, one, group_of, member_of)
            for one in label
            if isinstance(one, Tensor)
        ]
        nothing = torch.empty(0, dtype=torch.int64)
        moving = any(part.moving for part in parts)
        return NodeChannels(None, nothing, nothing, moving, any(part.free for part in parts))
    (reduced,) = collapse(labels.roots(collapse(label)[0]))
    axis = None
    varying = [one for one in range(reduced.dim()) if reduced.size(one) > 1]
    if len(varying) == 1:
        axis = varying[0]
    atoms = reduced.reshape(-1).clamp(min=-1).numpy()
    groups = torch.from_numpy(group_of[atoms])
    members = torch.from_numpy(member_of[atoms])
    moving, free = bool((reduced >= 0).any()), bool((groups >= 0).any())
    if axis is None:
        groups = members = torch.empty(0, dtype=torch.int64)
    return NodeChannels(axis, groups, members, moving, free)


def _check_overlaps(uses: Sequence[ParameterUse], state: State) -> None:
    by_name: dict[str, list[ParameterUse]] = {}
    for use in uses:
        by_name.setdefault(use.parameter, []).append(use)
    for name, several in by_name.items():
        if len(several) > 1:
            count = torch.zeros(state[name].shape, dtype=torch.int32)
            for use in several:
                use.view(count).add_(1)
            if int(count.max()) > 1:
                raise UnsupportedOpError(
                    f"parameter {name!r} is used through overlapping views "
                    f"({', '.join(sorted({use.role for use in several}))}), so that one "
                    "element would have to move in two ways. Use separate parameters, or "
                    "always the same view"
                )
