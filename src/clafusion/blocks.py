"""Blocks of channels that change places as wholes: attention heads and convolution groups.

Within a head channels are exchangeable, and so are the heads of a layer; but no channel can leave
its head. So each head has channel classes of its own (:mod:`clafusion.channels`), perhaps one for
queries and keys and one for values, which move together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clafusion.graph import ChannelBlocks, ChannelClass, ModelGraph, ParameterUse, Slot, State

__all__ = ["class_sources", "exchange_blocks", "possible_blocks"]

Family: TypeAlias = "list[ChannelClass]"


def possible_blocks(graph: ModelGraph) -> list[tuple[tuple[ChannelBlocks, ...], ...]]:
    """Return what looks like blocks that can change places; only a trial shows which can.

    Classes in the same places of the same parameters, but for the positions there, are a family,
    such as the values of all heads. Of the families of one unit with equally many classes some go
    together, as those of one attention. Returned are, for each unit and number, alternatives: each
    is a division of these families, the finest first.
    """
    families: dict[tuple[Any, ...], list[ChannelClass]] = {}
    for one in graph.classes:
        places = tuple(
            (slot.use.parameter, slot.use.role, slot.use.size, slot.axis, slot.positions.size(1))
            for slot in one.slots
        )
        families.setdefault((one.size, places), []).append(one)
    found: dict[tuple[int, int], list[list[ChannelClass]]] = {}
    for family in families.values():
        parameters = {slot.use.parameter for slot in family[0].slots}
        units = [one.index for one in graph.units if parameters & set(one.parameters)]
        if len(family) > 1 and units:
            family.sort(key=lambda one: _first_place(one.slots[0]))
            found.setdefault((units[0], len(family)), []).append(family)
    return [
        tuple(
            tuple(
                ChannelBlocks(
                    unit, tuple(zip(*([one.index for one in f] for f in part), strict=True))
                )
                for part in parts
            )
            for parts in _divisions(families)
        )
        for (unit, _), families in sorted(found.items())
    ]


def _divisions(families: list[Family]) -> Iterator[list[list[Family]]]:
    """Yield divisions of families into those that may go together, the finest first.

    An attention has two, of queries with keys and of values. Of several attentions they come one
    after the other, or side by side.
    """
    half = len(families) // 2
    if len(families) > 2 and len(families) % 2 == 0:
        yield [families[i : i + 2] for i in range(0, len(families), 2)]
        yield [families[i::half] for i in range(half)]
    yield [families]


def _first_place(slot: Slot) -> tuple[int, int]:
    return slot.use.index, int(slot.positions.min())


def class_sources(blocks: ChannelBlocks, order: Sequence[int]) -> dict[int, int]:
    """Return for each class of some blocks the one whose channels come there.

    ``order`` tells for every place which block comes there.
    """
    return {
        to: of
        for place, block in enumerate(order)
        for to, of in zip(blocks.members[place], blocks.members[block], strict=True)
    }


def exchange_blocks(
    graph: ModelGraph, state: State, sources: Mapping[int, int]
) -> dict[str, Tensor]:
    """Return a copy of a state in which classes have changed places.

    ``sources`` tells for every class that moves, or stays in its blocks, which one comes there:
    see :func:`class_sources`.
    """
    exchanged = {name: tensor.detach().clone() for name, tensor in state.items()}
    by_use: dict[ParameterUse, list[tuple[Slot, Slot]]] = {}
    for to, of in sources.items():
        for slots in zip(graph.classes[to].slots, graph.classes[of].slots, strict=True):
            by_use.setdefault(slots[0].use, []).append(slots)
    for use, moves in by_use.items():
        # A group's rows are a use of their own, and come as a whole; heads lie along one axis.
        values = moves[0][1].use.view(state[use.parameter])
        for axis in {slot.axis for slot, _ in moves}:
            index = torch.arange(values.size(axis))
            for slot, origin in moves:
                if slot.axis == axis:
                    index[slot.positions.reshape(-1)] = origin.positions.reshape(-1)
            values = values.index_select(axis, index.to(values.device))
        use.view(exchanged[use.parameter]).copy_(values)
    return exchanged
