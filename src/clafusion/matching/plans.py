"""A target's sources -> the transport plans of their channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from clafusion.config import Auto, FusionConfig, Orthogonal, Solver, Zip
from clafusion.errors import StructureError
from clafusion.matching.activation_costs import (
    activation_costs,
    group_costs,
    measures,
    output_costs,
    says_nothing,
)
from clafusion.matching.head_order import order_heads
from clafusion.matching.head_plans import head_plans
from clafusion.matching.masses import marginals
from clafusion.matching.weight_costs import match_by_weights
from clafusion.matching.zipping import zip_plans
from clafusion.targets.sources import Source, TargetSources
from clafusion.transport.plan import TransportPlan
from clafusion.transport.solve import solve_compactly

__all__ = ["Matched", "channel_plans", "cost_by_values", "match_sources", "with_heads_in_order"]

_AT_ONCE = 1 << 24  # entries of costs that are solved together


@dataclass(frozen=True)
class Matched:
    """A source and the plans that bring its channels to the target.

    Attributes
    ----------
    source
        How the network maps to the target, its heads in the target's order.
    plans
        For each channel group of the target its plan, or None.
    output_plan
        A plan for the outputs, where they are matched, too.
    head_orders
        See :attr:`clafusion.merging.problem.Parent.head_orders`.
    """

    source: Source
    plans: tuple[TransportPlan | None, ...]
    output_plan: TransportPlan | None
    head_orders: Mapping[int, tuple[int, ...]]


def match_sources(sources: TargetSources, config: FusionConfig) -> tuple[Matched, ...]:
    """Match every source's channels with the target's.

    Parameters
    ----------
    sources
        The target and its sources.
    config
        ``config.matching`` says how.

    Raises
    ------
    InputError
        The profiles are not of the same inputs, or lack something that matching needs.
    StructureError
        The solver is not for these networks.
    """
    metric = cost_by_values(config)
    ordered = [
        (one, {}) if i == sources.reference else with_heads_in_order(one, metric)
        for i, one in enumerate(sources.sources)
    ]
    solver = config.matching.solver
    if isinstance(solver, Orthogonal):  # what is left when streams are rotated
        solver = Auto()
        config = replace(config, matching=replace(config.matching, solver=solver))
    if isinstance(solver, Zip):
        _check_zip(sources)
        plans = zip_plans([one for one, _ in ordered], solver.budget)
    else:
        plans = [channel_plans(one, config) for one, _ in ordered]
    matched = []
    for i, ((source, orders), of) in enumerate(zip(ordered, plans, strict=True)):
        output_plan = None
        if config.matching.outputs and i != sources.reference:
            cost = output_costs(source.target, source.profile, metric=metric)
            (solution,) = solve_compactly([cost], solver=solver)
            output_plan = solution.plan
        matched.append(Matched(source, tuple(of), output_plan, {**source.orders, **orders}))
    return tuple(matched)


def cost_by_values(config: FusionConfig) -> str:
    """Return the cost by which heads and outputs are matched: one of channels' values."""
    return config.matching.cost if config.matching.cost in measures() else "correlation"


def with_heads_in_order(source: Source, metric: str) -> tuple[Source, dict[int, tuple[int, ...]]]:
    """Return a source with its heads in the target's order, and that order."""
    correspondence, profile, orders = order_heads(
        source.correspondence, source.target, source.profile, metric=metric, known=source.plans
    )
    return replace(source, correspondence=correspondence, profile=profile), orders


def _check_zip(sources: TargetSources) -> None:
    for one in sources.sources:
        target, source = one.correspondence.target, one.correspondence.source
        if target.united_heads:
            to, of = target.united_heads[0], source.united_heads[0]
            raise StructureError(
                "solver 'zip' needs equally many attention heads; "
                f"{target.layers[to.layer].name!r} has {to.count} and "
                f"{source.layers[of.layer].name!r} {of.count}: use solver='auto'"
            )


def channel_plans(source: Source, config: FusionConfig) -> list[TransportPlan | None]:
    """Match the channels of every group; None where the source has no such channels."""
    correspondence, target, profile = source.correspondence, source.target, source.profile
    groups = range(len(correspondence.groups))
    if all(correspondence.groups[i] < 0 or i in source.plans for i in groups):
        return [source.plans.get(i) for i in groups]
    solver, cost = config.matching.solver, config.matching.cost
    masses = None
    if config.matching.importance != "uniform":
        masses = marginals(correspondence, target.importance, profile.importance)
    by_weights = partial(match_by_weights, correspondence, masses=masses, solver=solver)
    if cost == "weights":
        return by_weights(known=source.plans)
    metric = "correlation" if cost == "both" else cost
    if cost == "both":
        costs = activation_costs(correspondence, target, profile, metric=metric)
        return by_weights(activation_costs=costs, known=source.plans)
    in_heads = {index for one in correspondence.target.united_heads for index in one.groups}
    # Channels that no layer reads, as those between the layers of an LSTM, and channels that are
    # the same for all inputs, as of a learned query, show by their weights.
    solved, unseen = _solved(source, metric, masses, solver, {*in_heads, *source.plans})
    unseen -= source.plans.keys()
    known, pairs_of_heads = head_plans(
        correspondence, target, profile, metric=metric, solver=solver
    )
    known |= {**source.plans, **solved}
    if unseen:
        return by_weights(known=known, head_pairs=pairs_of_heads)
    return [known.get(i) for i in groups]


def _solved(
    source: Source,
    metric: str,
    masses: Sequence[tuple[Tensor, Tensor] | None] | None,
    solver: Solver | str,
    others: Collection[int],
) -> tuple[dict[int, TransportPlan], set[int]]:
    """Return plans of the groups with informative costs, except ``others``, and the groups without.

    Costs are solved as they come, many at a time but few enough to be held.
    """
    plans: dict[int, TransportPlan] = {}
    unseen: set[int] = set()
    waiting: dict[int, Tensor] = {}

    def solve() -> None:
        pairs = None if masses is None else [pair for i in waiting if (pair := masses[i])]
        solutions = solve_compactly(
            list(waiting.values()),
            None if pairs is None else [of_source for of_source, _ in pairs],
            None if pairs is None else [of_target for _, of_target in pairs],
            solver=solver,
        )
        plans.update((i, one.plan) for i, one in zip(waiting, solutions, strict=True))
        waiting.clear()

    costs = group_costs(source.correspondence, source.target, source.profile, metric=metric)
    for i, cost in costs:
        if says_nothing(cost):
            unseen.add(i)
        elif i not in others:
            waiting[i] = cost
        del cost  # so that what is solved is gone before the next costs are made
        if sum(one.numel() for one in waiting.values()) >= _AT_ONCE:
            solve()
    solve()
    return plans, unseen
