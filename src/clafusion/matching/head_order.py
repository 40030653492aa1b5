r"""Match heads of channels, such as attention heads, before the channels within them.

The cost of two heads is that of the best plans of their channels, and an assignment matches all
heads of a layer (as the heads of transformers in Imfeld et al., arXiv 2310.05719, section 4).
Matched heads are put in the other network's order in a copy of the model. That changes nothing
that it computes, and all that comes behind sees heads that correspond by their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence, point_pairs, with_state
from clafusion.matching.activation_costs import ActivationCost, pair_costs
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.heads import exchange_heads, group_sources
from clafusion.tracing.model import HeadPartition, HookPoint, TracedModel
from clafusion.transport.solve import solve_transport

__all__ = ["exchanged_model", "order_heads"]


def order_heads(
    lifting: Correspondence,
    deep: ModelProfile,
    shallow: ModelProfile,
    *,
    metric: ActivationCost = "correlation",
) -> tuple[Correspondence, ModelProfile, dict[int, tuple[int, ...]]]:
    r"""Put the shallow network's heads in the order of the deep one's that they match best.

    The cost of two heads is the sum over their groups of :math:`\min_T \langle T, M \rangle`
    with the costs ``M`` of :func:`clafusion.matching.activation_costs.activation_costs`.

    Returns
    -------
    (lifting, shallow, orders)
        What was given, where no head moves. Else of a copy of the shallow network; and ``orders``:
        index in ``shallow.graph.heads`` -> for every place the head that came there.
    """
    orders: dict[int, tuple[int, ...]] = {}
    sources: dict[int, int] = {}
    for index, target, source in _corresponding(lifting):
        order = _order(lifting, target, source, deep, shallow, metric)
        if order != tuple(range(len(order))):
            orders[index] = order
            sources |= group_sources(source, order)
    if orders:
        shallow = _moved(shallow, sources)
        lifting = replace(lifting, shallow=shallow.traced)
    return lifting, shallow, orders


def _corresponding(lifting: Correspondence) -> Iterator[tuple[int, HeadPartition, HeadPartition]]:
    """Yield the heads of both networks that correspond by their places."""
    known = {tuple(map(frozenset, one.members)): i for i, one in enumerate(lifting.shallow.heads)}
    for one in lifting.deep.heads:
        members = tuple(tuple(lifting.groups[c] for c in head) for head in one.members)
        index = known.get(tuple(map(frozenset, members)))
        if index is not None:
            layer = lifting.shallow.heads[index].layer
            yield index, one, HeadPartition(layer, members)


def _order(
    lifting: Correspondence,
    target: HeadPartition,
    source: HeadPartition,
    deep: ModelProfile,
    shallow: ModelProfile,
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


def _moved(profile: ModelProfile, sources: Mapping[int, int]) -> ModelProfile:
    """Return a profile of a copy of the network, with its groups exchanged."""
    graph = profile.traced

    rows = {}
    for (layer, place), values in profile.rows.items():
        points = graph.layers[layer].hook_points
        index = ~place if place < 0 else place
        if index < len(points):  # else the outputs of a classifier
            values = values[:, _columns(points[index], sources)]
        rows[layer, place] = values
    importance = tuple(
        profile.importance[sources.get(i, i)] for i in range(len(profile.importance))
    )
    return replace(
        profile,
        traced=exchanged_model(graph, sources),
        rows=rows,
        moments=None,  # measured anew, so that the bytes do not depend on who asked for them
        importance=importance,
    )


def exchanged_model(graph: TracedModel, sources: Mapping[int, int]) -> TracedModel:
    """Return the graph of a copy of a model in which groups have changed places."""
    state = exchange_heads(graph, graph.state(), sources)
    constants = {name: state[name] for name in graph.constants}
    return replace(graph, model=with_state(graph.model, state, graph), constants=constants)


def _columns(point: HookPoint, sources: Mapping[int, int]) -> Tensor:
    """Return for every channel which one comes into its place."""
    index = torch.arange(len(point.groups))

    def places(one: int) -> Tensor:
        found = torch.nonzero(point.groups == one).squeeze(1)
        return found[point.members[found].argsort(stable=True)]

    for to, of in sources.items():
        index[places(to)] = places(of)
    return index
