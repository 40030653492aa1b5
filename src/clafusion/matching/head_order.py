r"""Match heads of channels, such as attention heads, before the channels within them.

The cost of two heads is that of the best plans of their channels, and an assignment matches all
heads of a layer (as the heads of transformers in Imfeld et al., arXiv 2310.05719, section 4).
Matched heads are put in the other network's order in a copy of the model. That changes nothing
that it computes, and all that comes behind sees heads that correspond by their places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.hooks import hook_pairs
from clafusion.matching.activation_costs import pair_costs
from clafusion.profiling.moments import BatchMoments
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.heads import exchange_heads, group_sources
from clafusion.tracing.model import CalibrationPoint, HeadPartition, HookPoint, TracedModel
from clafusion.transport.solve import solve_transport
from clafusion.weights.build import with_state

__all__ = ["exchanged_model", "order_heads"]


def order_heads(
    correspondence: Correspondence,
    target: ModelProfile,
    source: ModelProfile,
    *,
    metric: str = "correlation",
    known: Collection[int] = (),
) -> tuple[Correspondence, ModelProfile, dict[int, tuple[int, ...]]]:
    r"""Put the source's heads in the order of the target's that they match best.

    The cost of two heads is the sum over their groups of :math:`\min_T \langle T, M \rangle`
    with the costs ``M`` of :func:`clafusion.matching.activation_costs.activation_costs`.

    Heads with a group among ``known`` stay where they are.

    Returns
    -------
    (correspondence, source, orders)
        What was given, where no head moves. Else of a copy of the source; and ``orders``:
        index in ``source.traced.heads`` -> for every place the head that came there.
    """
    orders: dict[int, tuple[int, ...]] = {}
    sources: dict[int, int] = {}
    for index, to, of in _corresponding(correspondence):
        if any(group in known for head in to.members for group in head):
            continue
        order = _order(correspondence, (to, of), target, source, metric)
        if order != tuple(range(len(order))):
            orders[index] = order
            sources |= group_sources(of, order)
    if orders:
        source = _moved(source, sources)
        correspondence = replace(correspondence, source=source.traced)
    return correspondence, source, orders


def _corresponding(
    correspondence: Correspondence,
) -> Iterator[tuple[int, HeadPartition, HeadPartition]]:
    """Yield the heads of both networks that correspond by their places."""
    known = {
        tuple(map(frozenset, one.members)): i for i, one in enumerate(correspondence.source.heads)
    }
    for one in correspondence.target.heads:
        members = tuple(tuple(correspondence.groups[c] for c in head) for head in one.members)
        index = known.get(tuple(map(frozenset, members)))
        if index is not None:
            layer = correspondence.source.heads[index].layer
            yield index, one, HeadPartition(layer, members)


def _order(
    correspondence: Correspondence,
    heads: tuple[HeadPartition, HeadPartition],
    target: ModelProfile,
    source: ModelProfile,
    metric: str,
) -> tuple[int, ...]:
    pairs = [
        pair
        for of_target in heads[0].members
        for of_source in heads[1].members
        for pair in zip(of_target, of_source, strict=True)
    ]
    shown = [
        (
            *pair,
            tuple(
                hook_pairs(
                    correspondence.target, correspondence.source, correspondence.layer_map, *pair
                )
            ),
        )
        for pair in pairs
    ]
    solutions = solve_transport(pair_costs(correspondence, target, source, shown, metric=metric))
    count = len(heads[0].members)
    costs = torch.stack([one.cost for one in solutions]).view(count, count, -1).sum(2)
    from scipy.optimize import linear_sum_assignment  # here, for it takes long to import

    _, order = linear_sum_assignment(costs.numpy())  # (target, source)
    return tuple(order.tolist())


def _moved(profile: ModelProfile, sources: Mapping[int, int]) -> ModelProfile:
    """Return a profile of a copy of the network, with its groups exchanged."""
    model = profile.traced

    rows = {}
    for (layer, place), values in profile.rows.items():
        points = model.layers[layer].hook_points
        index = ~place if place < 0 else place
        if index < len(points):  # else the outputs of a classifier
            values = values[:, _columns(points[index], sources)]
        rows[layer, place] = values
    importance = tuple(
        profile.importance[sources.get(i, i)] for i in range(len(profile.importance))
    )
    return replace(
        profile,
        traced=exchanged_model(model, sources),
        rows=rows,
        moments=_moved_moments(profile, sources),
        importance=importance,
    )


def _moved_moments(
    profile: ModelProfile, sources: Mapping[int, int]
) -> tuple[BatchMoments, ...] | None:
    """Return the moments of a copy of the network, with its groups exchanged."""
    if profile.moments is None:
        return None
    columns = {}
    for layer in profile.traced.layers:
        columns.update({one.post: _columns(one, sources) for one in layer.hook_points})
        columns.update({one.node: _columns(one, sources) for one in layer.calibration_points})
    return tuple(
        {
            node: (mean[columns[node]], deviation[columns[node]])
            for node, (mean, deviation) in batch.items()
        }
        for batch in profile.moments
    )


def exchanged_model(model: TracedModel, sources: Mapping[int, int]) -> TracedModel:
    """Return a copy of a model in which groups have changed places."""
    state = exchange_heads(model, model.state(), sources)
    constants = {name: state[name] for name in model.constants}
    return replace(model, model=with_state(model.model, state, model.aliases), constants=constants)


def _columns(point: HookPoint | CalibrationPoint, sources: Mapping[int, int]) -> Tensor:
    """Return for every channel which one comes into its place."""
    index = torch.arange(len(point.groups))

    def places(one: int) -> Tensor:
        found = torch.nonzero(point.groups == one).squeeze(1)
        return found[point.members[found].argsort(stable=True)]

    for to, of in sources.items():
        index[places(to)] = places(of)
    return index
