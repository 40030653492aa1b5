r"""Match blocks of channels, such as attention heads, before the channels within them.

The cost of two blocks is that of the best plans of their channels, and an assignment matches all
blocks of a layer (as the heads of transformers in Imfeld et al., arXiv 2310.05719, section 4).
Matched blocks are put in the other network's order in a copy of the model. That changes nothing
that it computes, and all that comes behind sees blocks that correspond by their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clafusion.blocks import class_sources, exchange_blocks
from clafusion.depth import Lifting, point_pairs, with_state
from clafusion.graph import ChannelBlocks, ModelGraph, ReadPoint
from clafusion.neuron_costs import ActivationCost, pair_costs
from clafusion.signatures import Signature
from clafusion.transport import solve_transport

__all__ = ["exchanged_graph", "match_blocks"]


def match_blocks(
    lifting: Lifting, deep: Signature, shallow: Signature, *, metric: ActivationCost = "correlation"
) -> tuple[Lifting, Signature, dict[int, tuple[int, ...]]]:
    r"""Put the shallow network's blocks in the order of the deep one's that they match best.

    The cost of two blocks is the sum over their classes of :math:`\min_T \langle T, M \rangle`
    with the costs ``M`` of :func:`clafusion.neuron_costs.neuron_costs`.

    Returns
    -------
    (lifting, shallow, orders)
        What was given, where no block moves. Else of a copy of the shallow network; and ``orders``:
        index in ``shallow.graph.blocks`` -> for every place the block that came there.
    """
    orders: dict[int, tuple[int, ...]] = {}
    sources: dict[int, int] = {}
    for index, target, source in _corresponding(lifting):
        order = _order(lifting, target, source, deep, shallow, metric)
        if order != tuple(range(len(order))):
            orders[index] = order
            sources |= class_sources(source, order)
    if orders:
        shallow = _moved(shallow, sources)
        lifting = replace(lifting, shallow=shallow.graph)
    return lifting, shallow, orders


def _corresponding(lifting: Lifting) -> Iterator[tuple[int, ChannelBlocks, ChannelBlocks]]:
    """Yield the blocks of both networks that correspond by their places."""
    known = {tuple(map(frozenset, one.members)): i for i, one in enumerate(lifting.shallow.blocks)}
    for one in lifting.deep.blocks:
        members = tuple(tuple(lifting.classes[c] for c in block) for block in one.members)
        index = known.get(tuple(map(frozenset, members)))
        if index is not None:
            unit = lifting.shallow.blocks[index].unit
            yield index, one, ChannelBlocks(unit, members)


def _order(
    lifting: Lifting,
    target: ChannelBlocks,
    source: ChannelBlocks,
    deep: Signature,
    shallow: Signature,
    metric: ActivationCost,
) -> tuple[int, ...]:
    pairs = [
        pair
        for of_target in target.members
        for of_source in source.members
        for pair in zip(of_target, of_source, strict=True)
    ]
    shown = [
        (*pair, tuple(point_pairs(lifting.deep, lifting.shallow, lifting.partner, *pair)))
        for pair in pairs
    ]
    solutions = solve_transport(pair_costs(lifting, deep, shallow, shown, metric=metric))
    count = len(target.members)
    costs = torch.stack([one.cost for one in solutions]).view(count, count, -1).sum(2)
    _, order = linear_sum_assignment(costs.numpy())  # (target, source)
    return tuple(order.tolist())


def _moved(signature: Signature, sources: Mapping[int, int]) -> Signature:
    """Return a signature of a copy of the network, with its classes exchanged."""
    graph = signature.graph

    rows = {}
    for (unit, place), values in signature.rows.items():
        points = graph.units[unit].read_points
        index = ~place if place < 0 else place
        if index < len(points):  # else the outputs of a classifier
            values = values[:, _columns(points[index], sources)]
        rows[unit, place] = values
    importance = tuple(
        signature.importance[sources.get(i, i)] for i in range(len(signature.importance))
    )
    return replace(
        signature,
        graph=exchanged_graph(graph, sources),
        rows=rows,
        moments=None,  # measured anew, so that the bytes do not depend on who asked for them
        importance=importance,
    )


def exchanged_graph(graph: ModelGraph, sources: Mapping[int, int]) -> ModelGraph:
    """Return the graph of a copy of a model in which classes have changed places."""
    state = exchange_blocks(graph, graph.state(), sources)
    constants = {name: state[name] for name in graph.constants}
    return replace(graph, model=with_state(graph.model, state, graph), constants=constants)


def _columns(point: ReadPoint, sources: Mapping[int, int]) -> Tensor:
    """Return for every channel which one comes into its place."""
    index = torch.arange(len(point.classes))

    def places(one: int) -> Tensor:
        found = torch.nonzero(point.classes == one).squeeze(1)
        return found[point.members[found].argsort(stable=True)]

    for to, of in sources.items():
        index[places(to)] = places(of)
    return index
