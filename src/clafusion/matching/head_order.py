r"""Match heads of channels, such as attention heads, before the channels within them.

The cost of two heads is that of the best plans of their channels, and an assignment matches all
heads of a layer (as the heads of transformers in Imfeld et al., arXiv 2310.05719, section 4).
Matched heads are put in the other network's order in a copy of the model. That changes nothing
that it computes, and all that comes behind sees heads that correspond by their places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.hooks import HookPair
from clafusion.matching.activation_costs import pair_costs
from clafusion.profiling.moments import BatchMoments
from clafusion.profiling.profile import ModelProfile
from clafusion.profiling.spilled import with_columns
from clafusion.profiling.statistics import standardised
from clafusion.tracing.heads import (
    HeadOrders,
    exchange_heads,
    group_sources,
    in_turn,
    restored_heads,
)
from clafusion.tracing.layer import CalibrationPoint, HookPoint
from clafusion.tracing.model import HeadPartition, TracedModel
from clafusion.tracing.points import places_of
from clafusion.transport.solve import solve_compactly
from clafusion.weights.build import with_weights

__all__ = ["corresponding_heads", "exchanged_model", "order_heads", "restored_model"]


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

    Heads with a group among ``known`` stay where they are. So do modules of a list: see
    :func:`clafusion.matching.module_order.module_orders`.

    Returns
    -------
    (correspondence, source, orders)
        What was given, where no head moves. Else of a copy of the source; and ``orders``:
        index in ``source.traced.heads`` -> for every place the head that came there.
    """
    orders: dict[int, tuple[int, ...]] = {}
    for is_shared in (False, True):  # heads that share channels are matched where these are
        found = {
            index: order
            for index, to, of in corresponding_heads(correspondence)
            if to.is_shared == is_shared
            and not to.parameters
            and not any(group in known for head in to.members for group in head)
            and (order := _order(correspondence, (to, of), target, source, metric))
            != tuple(range(len(order)))
        }
        if found:
            heads = source.traced.heads
            source = _moved(source, [(heads[index], order) for index, order in found.items()])
            correspondence = replace(correspondence, source=source.traced)
            orders |= found
    return correspondence, source, orders


def corresponding_heads(
    correspondence: Correspondence,
) -> Iterator[tuple[int, HeadPartition, HeadPartition]]:
    """Yield the heads of both networks that correspond by their places.

    Where attentions of several layers share a table, a head lies in all of them. Of one network's
    only those count that the other has.
    """
    known = {
        tuple(map(frozenset, one.members)): i for i, one in enumerate(correspondence.source.heads)
    }
    taken = set(correspondence.groups)
    for one in correspondence.target.heads:
        places = [i for i, c in enumerate(one.members[0]) if correspondence.groups[c] >= 0]
        shown = tuple(tuple(head[i] for i in places) for head in one.members)
        members = tuple(tuple(correspondence.groups[c] for c in head) for head in shown)
        wanted = tuple(map(frozenset, members))
        index = next((i for sets, i in known.items() if _are_parts(sets, wanted, taken)), None)
        if index is not None and places:
            of_source = replace(correspondence.source.heads[index], members=members)
            yield index, replace(one, members=shown), of_source


def _are_parts(
    heads: Sequence[frozenset[int]], wanted: Sequence[frozenset[int]], taken: Collection[int]
) -> bool:
    """Return whether some heads, without groups that have no partner, are the wanted ones."""
    return [head.intersection(taken) for head in heads] == list(wanted)


def _order(
    correspondence: Correspondence,
    heads: tuple[HeadPartition, HeadPartition],
    target: ModelProfile,
    source: ModelProfile,
    metric: str,
) -> tuple[int, ...]:
    to, of = heads
    count = len(to.members)

    def hooks(pair: tuple[int, int], places: tuple[int, int] | None) -> tuple[HookPair, ...]:
        return tuple(_hooks(correspondence, (target, source), pair, places))

    # Most of a head's groups may show nowhere, as the entries of a table of positions.
    first_pairs = zip(to.members[0], of.members[0], strict=True)
    seen = [
        place
        for place, pair in enumerate(first_pairs)
        if hooks(pair, (0, 0) if to.is_shared else None)
    ]
    if not seen:
        return tuple(range(count))
    shown = [
        (*pair, hooks(pair, (i, j) if to.is_shared else None))
        for i, of_target in enumerate(to.members)
        for j, of_source in enumerate(of.members)
        for pair in [(of_target[place], of_source[place]) for place in seen]
    ]
    solutions = solve_compactly(pair_costs(correspondence, target, source, shown, metric=metric))
    costs = torch.stack([one.cost for one in solutions]).view(count, count, -1).sum(2)
    from scipy.optimize import linear_sum_assignment  # here, for it takes long to import

    _, order = linear_sum_assignment(costs.numpy())  # (target, source)
    return tuple(order.tolist())


def _hooks(
    correspondence: Correspondence,
    profiles: tuple[ModelProfile, ModelProfile],
    groups: tuple[int, int],
    heads: tuple[int, int] | None,
) -> Iterator[HookPair]:
    """Yield the hook points that show two groups, where channels are shared those of two heads.

    Without ``heads``, groups whose channels several heads share show by those two heads that are
    most alike in how large their values are, which does not depend on the channels' order.
    """
    models = correspondence.target, correspondence.source
    for pair in correspondence.shared_hooks.pairs(*groups):
        places = [
            _places_of_heads(model, index, model.layers[layer].hook_points[hook])
            for model, index, (layer, hook) in zip(
                models, groups, (pair.target, pair.source), strict=True
            )
        ]
        if len(places[0]) != len(places[1]) or len(places[0]) == 1:
            if heads is None:
                yield pair
            continue
        chosen = heads
        if chosen is None:
            rows = [
                profile.rows.get(key)
                for profile, key in zip(profiles, (pair.target, pair.source), strict=True)
            ]
            chosen = (0, 0)
            if rows[0] is not None and rows[1] is not None and len(rows[0]) == len(rows[1]):
                sizes = [
                    standardised(torch.stack([x[:, one].square().sum(1) for one in of], 1).double())
                    for x, of in zip(rows, places, strict=True)
                    if x is not None
                ]
                alike = sizes[0].T @ sizes[1]
                chosen = divmod(int(alike.argmax()), alike.size(1))
        yield replace(
            pair,
            target_columns=places[0][chosen[0]],
            source_columns=places[1][chosen[1]],
        )


def _places_of_heads(model: TracedModel, group: int, hook: HookPoint) -> list[Tensor]:
    """Return where a group's channels lie in a hook point, for each head that shares them."""
    size, base = model.groups[group].size, model.groups[group].base_repeats
    places = places_of(hook, group)
    count = len(places) // (size * base)
    if count < 1 or len(places) % (size * base):
        return [places[:size]]
    # Where queries and keys come from one weight, its last place is that of the keys.
    kept = model.groups[group].sharing if count == model.groups[group].sharing + 1 > 2 else count
    return list(places.view(size, count, base)[:, :kept, 0].unbind(1))


def _moved(profile: ModelProfile, orders: HeadOrders) -> ModelProfile:
    """Return a profile of a copy of the network, with its heads in other places."""
    model = profile.traced
    columns: dict[tuple[int, int], Tensor | None] = {}
    for layer, place in profile.rows:
        points = model.layers[layer].hook_points
        index = ~place if place < 0 else place
        if index >= len(points):  # the outputs of a classifier
            columns[layer, place] = None
        elif not _has_heads_as_positions(model, points[index], orders):
            moved = _columns(model, points[index], orders)
            stay = torch.equal(moved, torch.arange(len(moved)))
            columns[layer, place] = None if stay else moved
        # Else positions would change places, but only some were kept.
    sources: dict[int, int] = {}
    for heads, order in in_turn(orders)[0]:
        sources |= group_sources(heads, order)
    importance = tuple(
        profile.importance[sources.get(i, i)] for i in range(len(profile.importance))
    )
    return replace(
        profile,
        traced=exchanged_model(model, orders),
        rows=with_columns(profile.rows, columns),
        moments=_moved_moments(profile, orders),
        importance=importance,
    )


def _has_heads_as_positions(model: TracedModel, point: HookPoint, orders: HeadOrders) -> bool:
    """Say whether a hook point shows channels that moved heads share, one head behind another."""
    return any(
        heads.is_shared
        and len(order) in point.positions
        and int((point.groups == one).sum())
        == model.groups[one].size * model.groups[one].base_repeats
        for heads, order in orders
        for one in heads.members[0]
    )


def _moved_moments(profile: ModelProfile, orders: HeadOrders) -> tuple[BatchMoments, ...] | None:
    """Return the moments of a copy of the network, with its heads in other places."""
    if profile.moments is None:
        return None
    columns = {}
    for layer in profile.traced.layers:
        for one in layer.hook_points:
            columns[one.post] = _columns(profile.traced, one, orders)
        for point in layer.calibration_points:
            columns[point.node] = _columns(profile.traced, point, orders)
    return tuple(
        {
            node: (mean[columns[node]], deviation[columns[node]])
            for node, (mean, deviation) in batch.items()
        }
        for batch in profile.moments
    )


def exchanged_model(model: TracedModel, orders: HeadOrders) -> TracedModel:
    """Return a copy of a model in which heads have changed places."""
    return with_weights(model, exchange_heads(model, model.state(), orders))


def restored_model(model: TracedModel, orders: HeadOrders) -> TracedModel:
    """Return a copy of a model whose heads are back where they were before these orders."""
    return with_weights(model, restored_heads(model, model.state(), orders))


def _columns(model: TracedModel, point: HookPoint | CalibrationPoint, orders: HeadOrders) -> Tensor:
    """Return for every channel which one comes into its place."""
    index = torch.arange(len(point.groups))
    shown = set(point.groups.tolist())
    first, last = in_turn(orders)
    for heads, order in first:
        for to, of in group_sources(heads, order).items():
            if to in shown:
                index[places_of(point, to)] = places_of(point, of)
    for heads, order in last:
        for one in heads.members[0]:
            if one not in shown:
                continue
            group, found = model.groups[one], places_of(point, one)
            count = len(order) + group.is_fused(len(order))
            if len(found) == group.size * group.base_repeats * count:
                of_heads = found.view(group.size, count, -1)
                moving = [*order, *range(len(order), count)]  # keys stay behind their queries
                index[of_heads.flatten()] = index[of_heads[:, moving].flatten()]
    return index
