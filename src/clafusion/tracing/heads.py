"""Heads of channels that change places as wholes: attention heads and convolution groups.

Within a head channels are exchangeable, and so are the heads of a layer; but no channel can leave
its head. So each head has channel groups of its own (:mod:`clafusion.tracing.groups`), perhaps one for
queries and keys and one for values, which move together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clafusion.execution.call import State
from clafusion.tracing.model import (
    ChannelGroup,
    GroupAxis,
    HeadPartition,
    ParameterUse,
    TracedModel,
)

__all__ = ["exchange_heads", "group_sources", "possible_heads"]

Family: TypeAlias = "list[ChannelGroup]"


def possible_heads(graph: TracedModel) -> list[tuple[tuple[HeadPartition, ...], ...]]:
    """Return what looks like heads that can change places; only a trial shows which can.

    Classes in the same places of the same parameters, but for the positions there, are a family,
    such as the values of all heads. Of the families of one layer with equally many groups some go
    together, as those of one attention. Returned are, for each layer and number, alternatives: each
    is a division of these families, the finest first.
    """
    families: dict[tuple[Any, ...], list[ChannelGroup]] = {}
    for one in graph.groups:
        places = tuple(
            (
                group_axis.use.parameter,
                group_axis.use.role,
                group_axis.use.size,
                group_axis.axis,
                group_axis.positions.size(1),
            )
            for group_axis in one.axes
        )
        families.setdefault((one.size, places), []).append(one)
    found: dict[tuple[int, int], list[list[ChannelGroup]]] = {}
    for family in families.values():
        parameters = {group_axis.use.parameter for group_axis in family[0].axes}
        layers = [one.index for one in graph.layers if parameters & set(one.parameters)]
        if len(family) > 1 and layers:
            family.sort(key=lambda one: _first_place(one.axes[0]))
            found.setdefault((layers[0], len(family)), []).append(family)
    return [
        tuple(
            tuple(
                HeadPartition(
                    layer, tuple(zip(*([one.index for one in f] for f in part), strict=True))
                )
                for part in parts
            )
            for parts in _divisions(families)
        )
        for (layer, _), families in sorted(found.items())
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


def _first_place(group_axis: GroupAxis) -> tuple[int, int]:
    return group_axis.use.index, int(group_axis.positions.min())


def group_sources(heads: HeadPartition, order: Sequence[int]) -> dict[int, int]:
    """Return for each group of some heads the one whose channels come there.

    ``order`` tells for every place which head comes there.
    """
    return {
        to: of
        for place, head in enumerate(order)
        for to, of in zip(heads.members[place], heads.members[head], strict=True)
    }


def exchange_heads(
    graph: TracedModel, state: State, sources: Mapping[int, int]
) -> dict[str, Tensor]:
    """Return a copy of a state in which groups have changed places.

    ``sources`` tells for every group that moves, or stays in its heads, which one comes there:
    see :func:`group_sources`.
    """
    exchanged = {name: tensor.detach().clone() for name, tensor in state.items()}
    by_use: dict[ParameterUse, list[tuple[GroupAxis, GroupAxis]]] = {}
    for to, of in sources.items():
        for group_axes in zip(graph.groups[to].axes, graph.groups[of].axes, strict=True):
            by_use.setdefault(group_axes[0].use, []).append(group_axes)
    for use, moves in by_use.items():
        # A group's rows are a use of their own, and come as a whole; heads lie along one axis.
        values = moves[0][1].use.view(state[use.parameter])
        for axis in {group_axis.axis for group_axis, _ in moves}:
            index = torch.arange(values.size(axis))
            for group_axis, origin in moves:
                if group_axis.axis == axis:
                    index[group_axis.positions.reshape(-1)] = origin.positions.reshape(-1)
            values = values.index_select(axis, index.to(values.device))
        use.view(exchanged[use.parameter]).copy_(values)
    return exchanged
