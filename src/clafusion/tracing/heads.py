"""Heads: runs of channels that change places as wholes, in attentions and grouped convolutions.

Within a head channels are exchangeable, and so are the heads of a layer; but no channel can leave
its head. So each head has channel groups of its own (see :mod:`clafusion.tracing.groups`), for
example one for queries and keys and one for values, which move together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clafusion.execution.call import State
from clafusion.execution.lazy import LazyState
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import ChannelGroup, GroupAxis, HeadPartition, TracedModel
from clafusion.tracing.moves import (
    Moves,
    Place,
    joined,
    moved,
    moves_between,
    origin_of,
    replacements,
)

__all__ = [
    "HeadOrders",
    "channels_of_heads",
    "exchange_heads",
    "exchange_moves",
    "group_sources",
    "groups_with_sharing",
    "in_turn",
    "possible_heads",
    "possible_shared_heads",
    "restored_heads",
]

HeadOrders: TypeAlias = "Sequence[tuple[HeadPartition, Sequence[int]]]"
"""Heads, and for every place which of them comes there."""

_Family: TypeAlias = "list[ChannelGroup]"
"""Channel groups with the same axes of the same parameters, at other positions there."""


def possible_heads(model: TracedModel) -> list[tuple[tuple[HeadPartition, ...], ...]]:
    """Return what may be heads that can change places; only a trial shows which can.

    A family is a set of channel groups that lie on the same axes of the same parameters, at
    different positions: the values of all heads, for example. Of the families of one layer with
    equally many groups some may move together, such as queries with keys and values of one
    attention.

    Returns
    -------
    list
        For each layer and number of heads the alternatives, the finest first. Each alternative
        divides these families among partitions that move on their own.
    """
    by_layer: dict[tuple[int, int], list[_Family]] = {}
    singles: dict[int, list[_Family]] = {}
    for family in _families(model.groups):
        layer = _layer_of(family, model.layers)
        if layer is None:
            continue
        if family[0].size == 1:
            singles.setdefault(layer, []).append(family)
        elif len(family) > 1:
            by_layer.setdefault((layer, len(family)), []).append(family)
    found = []
    for (layer, count), families in sorted(by_layer.items()):
        of_layer = [one for key, several in by_layer.items() if key[0] == layer for one in several]
        own = [one for one in singles.get(layer, []) if _moves_with(one, families, of_layer)]
        found.append(
            tuple(
                tuple(_partition(layer, moving_together) for moving_together in division)
                for division in _alternatives(families, own, count)
            )
        )
    return found


def _moves_with(single: _Family, families: Sequence[_Family], others: Sequence[_Family]) -> bool:
    """Say whether lone channels may move with some families rather than with others."""
    if len(single) % len(families[0]):
        return False
    most = max(_common_path(single, one) for one in others if len(single) % len(one) == 0)
    return max(_common_path(single, one) for one in families) == most


def _alternatives(
    families: list[_Family], singles: Sequence[_Family], count: int
) -> Iterator[list[list[_Family]]]:
    """Yield divisions of families into those that may move together, the finest first.

    Lone channels, as those of rotary queries and keys or of a table of positions, move with the
    families whose parameters' names are most like theirs: those of the same attention.
    """
    clusters: dict[tuple[int, ...], list[_Family]] = {}
    for single in singles:
        likeness = [_common_path(single, one) for one in families]
        members = tuple(i for i, one in enumerate(likeness) if one == max(likeness))
        clusters.setdefault(members, []).append(single)
    rest = [one for i, one in enumerate(families) if not any(i in members for members in clusters)]
    for divided in (_side_by_side, _in_turns) if clusters else ():
        wholes = [
            [*(families[i] for i in members), *(r for one in own for r in divided(one, count))]
            for members, own in clusters.items()
        ]
        for division in _divisions(rest) if rest else ([],):
            yield wholes + division
        yield [[*families, *(one for whole in wholes for one in whole if one[0].size == 1)]]
    yield from _divisions(families)


def _common_path(one: _Family, other: _Family) -> int:
    """Return how many parts the names of two families' first parameters have in common."""
    names = (family[0].axes[0].use.parameter.split(".") for family in (one, other))
    same = [a == b for a, b in zip(*names, strict=False)]
    return same.index(False) if False in same else len(same)


def possible_shared_heads(model: TracedModel) -> list[HeadPartition]:
    """Return what may be heads that share channels; only a trial shows which can change places.

    Queries that share keys and values have no channel groups of their own: the channels of keys and
    values stand several times among the weights that make the queries and read the values.
    """
    found = []
    taken: set[int] = set()
    wholes = [(one.layer, set(head)) for one in model.heads for head in one.members]
    for layer, groups in wholes:
        taken |= groups
        found += _shared(model, layer, groups)
    by_layer: dict[int, set[int]] = {}
    for family in _families(model.groups):
        layer_index = _layer_of(family, model.layers)
        if layer_index is not None:
            by_layer.setdefault(layer_index, set()).update(
                one.index for one in family if one.index not in taken
            )
    for layer_index, groups in sorted(by_layer.items()):
        found += _shared(model, layer_index, groups)
    return found


def groups_with_sharing(model: TracedModel) -> tuple[ChannelGroup, ...]:
    """Return a model's channel groups, which then say how many of its heads share them."""
    counts = {
        index: len(heads.members)
        for heads in model.heads
        if heads.is_shared
        for index in heads.members[0]
    }
    if not counts:
        return model.groups
    return tuple(replace(one, sharing=counts.get(one.index, 1)) for one in model.groups)


def _shared(model: TracedModel, layer: int, groups: set[int]) -> list[HeadPartition]:
    """Return the heads that share some groups, of which all stand equally often."""
    counts: dict[int, list[int]] = {}
    for index in sorted(groups):
        counts.setdefault(_sharing(model.groups[index]), []).append(index)
    for index in counts.get(1, ()):  # queries and keys in one weight stand in one place more
        of = [count for count in counts if count > 1 and model.groups[index].is_fused(count)]
        if len(of) == 1:
            counts[of[0]].append(index)
    return [
        HeadPartition(layer, (tuple(sorted(members)),) * count, is_shared=True)
        for count, members in counts.items()
        if count > 1 and any(model.groups[index].is_counted for index in members)
    ]


def _sharing(group: ChannelGroup) -> int:
    """Return how many heads share a group's channels, if it is of heads at all."""
    return max(one.positions.size(1) for one in group.axes) // group.base_repeats


def channels_of_heads(
    groups: Sequence[ChannelGroup],
    alone: Sequence[ChannelGroup],
    layers: Sequence[Layer],
    lists: Iterable[tuple[int, int]] = (),
) -> frozenset[int]:
    """Return the atoms of those lone channels that may move with whole heads.

    ``lists`` has the layer and the number of modules of each list: of a router's channels each may
    move with one of them.

    Rotary positions turn each pair of a head's query and key channels by an angle of its own: no
    two are exchangeable within a head, but the head moves as a whole with its values.
    """
    counts: dict[int | None, set[int]] = {}
    shares: dict[int | None, set[int]] = {}  # how many heads share the channels of each
    for family in _families(groups):
        layer = _layer_of(family, layers)
        if len(family) > 1:
            counts.setdefault(layer, set()).add(len(family))
        shares.setdefault(layer, set()).add(_sharing(family[0]))
    for of, count in lists:
        counts.setdefault(of, set()).add(count)
    found: set[int] = set()
    for family in _families(alone):
        layer = _layer_of(family, layers)
        of_layer = counts.get(layer, set())
        share = _sharing(family[0])
        of_others = shares.get(layer, set())
        if any(len(family) % count == 0 for count in of_layer) or (
            family[0].is_counted
            and (
                (share > 1 and share in of_others)
                or any(family[0].is_fused(other) for other in of_others)
            )
        ):
            found.update(int(one.atoms[0]) for one in family)
    return frozenset(found)


def _families(groups: Sequence[ChannelGroup]) -> list[_Family]:
    """Collect groups with the same axes of the same parameters, in the order of their places."""
    families: dict[tuple[Any, ...], _Family] = {}
    for group in groups:
        places = tuple(
            (
                group_axis.use.parameter,
                group_axis.use.role,
                group_axis.use.size,
                group_axis.axis,
                group_axis.positions.size(1),
            )
            for group_axis in group.axes
        )
        families.setdefault((group.size, places), []).append(group)
    for family in families.values():
        family.sort(key=lambda group: _first_place(group.axes[0]))
    return list(families.values())


def _layer_of(family: _Family, layers: Sequence[Layer]) -> int | None:
    parameters = {group_axis.use.parameter for group_axis in family[0].axes}
    return next((one.lender for one in layers if parameters & set(one.parameters)), None)


def _side_by_side(family: _Family, count: int) -> list[_Family]:
    """Divide lone channels among heads that lie side by side: the first of each, the second..."""
    size = len(family) // count
    return [family[rank::size] for rank in range(size)]


def _in_turns(family: _Family, count: int) -> list[_Family]:
    """Divide lone channels among heads that take turns, as in a table with a column for each."""
    return [family[first : first + count] for first in range(0, len(family), count)]


def _partition(layer: int, families: Sequence[_Family]) -> HeadPartition:
    indices = ([group.index for group in family] for family in families)
    return HeadPartition(layer, tuple(zip(*indices, strict=True)))


def _divisions(families: list[_Family]) -> Iterator[list[list[_Family]]]:
    """Yield divisions of families into those that may move together, the finest first.

    An attention has two families: queries with keys, and values. Those of several attentions come
    one attention after the other, or first all of one sort and then all of the other.
    """
    half = len(families) // 2
    if len(families) > 2 and len(families) % 2 == 0:
        yield [families[i : i + 2] for i in range(0, len(families), 2)]
        yield [families[i::half] for i in range(half)]
    yield [families]


def _first_place(group_axis: GroupAxis) -> tuple[int, int]:
    return group_axis.use.index, int(group_axis.positions.min())


def group_sources(heads: HeadPartition, order: Sequence[int]) -> dict[int, int]:
    """Return for each channel group of some heads the group whose channels come there.

    Parameters
    ----------
    heads
        The heads.
    order
        For every place, which head comes there.
    """
    return {
        target: source
        for place, head in enumerate(order)
        for target, source in zip(heads.members[place], heads.members[head], strict=True)
    }


def in_turn(orders: HeadOrders) -> tuple[HeadOrders, HeadOrders]:
    """Return the orders that are made first and those that are made last.

    Heads that share channels move after all others, which may take these channels along.
    """
    return (
        [one for one in orders if not one[0].is_shared],
        [one for one in orders if one[0].is_shared],
    )


def exchange_moves(model: TracedModel, orders: HeadOrders) -> Moves:
    """Return the moves of parameters by which heads change places.

    Parameters
    ----------
    model
        The traced model.
    orders
        Heads and where they go, in any order: see :func:`in_turn`.
    """
    first, last = in_turn(orders)
    sources: dict[int, int] = {}
    for heads, order in first:
        sources |= group_sources(heads, order)
    others = {
        name: other
        for heads, order in first
        for names, place in zip(heads.parameters, order if heads.parameters else (), strict=True)
        for name, other in zip(names, heads.parameters[place], strict=True)
    }
    wholes = moves_between(
        ((to.use, to.axis, to.positions), (of.use, of.axis, of.positions))
        for target, source in sources.items()
        for to, of in zip(model.groups[target].axes, model.groups[source].axes, strict=True)
        if to.use.parameter not in others
    )
    changed = {name: other for name, other in others.items() if name != other}
    shapes = {name: tuple(model.state()[name].shape) for name in changed}
    shared = moves_between(_shared_places(model, last))
    return joined({**wholes, **replacements(changed, shapes)}, shared)


def exchange_heads(model: TracedModel, state: State, orders: HeadOrders) -> LazyState[str]:
    """Return a state in which heads have changed places; its tensors are made when they are read.

    Parameters
    ----------
    model, orders
        As for :func:`exchange_moves`.
    state
        The model's parameters and buffers by name.
    """
    moves = exchange_moves(model, orders)

    def make(name: str) -> Tensor:
        steps = moves.get(name, ())
        tensor = state[origin_of(name, steps)].detach()
        return moved(tensor, steps) if steps else tensor

    return LazyState(state, make)


def restored_heads(model: TracedModel, state: State, orders: HeadOrders) -> LazyState[str]:
    """Return a state with heads where they were before :func:`exchange_heads`.

    Parameters
    ----------
    model, orders
        As they were given there.
    state
        What that returned.
    """
    back = [(heads, torch.tensor(order).argsort().tolist()) for heads, order in orders]
    first, last = in_turn(back)
    return exchange_heads(model, exchange_heads(model, state, last), first)


def _shared_places(model: TracedModel, orders: HeadOrders) -> Iterator[tuple[Place, Place]]:
    """Yield where heads that share channels go, and where they come from."""
    for heads, order in orders:
        for index in heads.members[0]:
            group = model.groups[index]
            for axis in group.axes:
                base = group.repeats_of_head(len(order))
                count = len(order) + group.is_fused(len(order))
                if axis.positions.size(1) != base * count:
                    continue  # of the keys or values themselves
                places = axis.positions.unflatten(1, (count, base))
                moving = [*order, *range(len(order), places.size(1))]  # keys stand behind queries
                yield (axis.use, axis.axis, places), (axis.use, axis.axis, places[:, moving])
