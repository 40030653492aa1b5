"""Parents that are one network: the same twice counts as once with both weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
from clafusion.tracing.model import TracedModel
from clafusion.transport.plan import TransportPlan

__all__ = ["without_copies"]

_ROUNDING = 1e-12


def without_copies(problem: FusionProblem) -> FusionProblem:
    """Return a problem in which parents that are copies of each other are one.

    Copies compute the same by equal weights, and equal plans bring them to the target. One of them,
    with the sum of their weights, then stands for all. Sums over the parents do not change by that;
    but what looks at the parents' channels side by side would see each channel several times.
    """
    sets: list[list[int]] = []
    for i, parent in enumerate(problem.parents):
        known = next((one for one in sets if _are_copies(problem.parents[one[0]], parent)), None)
        if known is None:
            sets.append([i])
        else:
            known.append(i)
    if len(sets) == len(problem.parents):
        return problem
    # The reference stands for its copies: nothing of it has to be moved.
    chosen = [problem.reference if problem.reference in one else one[0] for one in sets]
    if len(sets) == 1:
        weights = [MergeWeights(1.0)]
    else:
        weights = [_sum([problem.parents[i].weights for i in one]) for one in sets]
    parents = tuple(
        replace(problem.parents[i], weights=one) for i, one in zip(chosen, weights, strict=True)
    )
    return replace(problem, parents=parents, reference=chosen.index(problem.reference))


def _sum(weights: Sequence[MergeWeights]) -> MergeWeights:
    names = dict.fromkeys(name for one in weights for name in one.own)
    return MergeWeights(
        sum(one.overall for one in weights),
        {name: sum(one.of(name) for one in weights) for name in names},
    )


def _are_copies(one: Parent, other: Parent) -> bool:
    """Say whether two parents are equal in all but their weights and profiles."""
    ours, theirs = one.correspondence, other.correspondence
    return (
        ours.layer_map == theirs.layer_map
        and ours.origins == theirs.origins
        and _is_same_network(one.traced, other.traced)
        and all(
            _moves_alike(plan, their_plan)
            for plan, their_plan in zip(
                (*one.plans, one.output_plan), (*other.plans, other.output_plan), strict=True
            )
        )
    )


def _is_same_network(one: TracedModel, other: TracedModel) -> bool:
    if one is other:
        return True
    if one.module.code != other.module.code:
        return False
    state, others = one.state(), other.state()
    return state.keys() == others.keys() and all(
        value.dtype == others[name].dtype and torch.equal(value, others[name])
        for name, value in state.items()
    )


def _moves_alike(plan: TransportPlan | None, other: TransportPlan | None) -> bool:
    """Say whether two plans are the same once they are normalised, whatever their masses."""
    if plan is None or other is None:
        return plan is other
    if plan.shape != other.shape:
        return False
    return all(
        one.distance(two, averages=True) <= _ROUNDING * max(plan.shape)
        for one, two in ((plan, other), (plan.transposed(), other.transposed()))
    )
