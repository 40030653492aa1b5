"""Targets and their sources -> fusion problems, once or until the plans are at rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clafusion.alignment.models import AlignedModels, label
from clafusion.calibration.methods import calibrate
from clafusion.config import FusionConfig, LeastSquares, Orthogonal, Repair
from clafusion.errors import ConvergenceWarning, InputError, warn
from clafusion.matching.head_order import exchanged_model
from clafusion.matching.module_order import module_orders
from clafusion.matching.orthogonal import rotate_sources
from clafusion.matching.own_places import match_with_own_places
from clafusion.matching.plans import Matched, cost_by_values, match_sources
from clafusion.merging.problem import FusionProblem, MergeWeights, Parent, plans_are_at_rest
from clafusion.profiling.batches import Data
from clafusion.stages import needs_moments, profile_traced
from clafusion.targets.sources import TargetSources, source_of

__all__ = [
    "matched_with_mean",
    "prepared_sources",
    "problem_of",
    "with_merge_weights",
]


def problem_of(
    names: Sequence[str],
    sources: TargetSources,
    weights: Sequence[float],
    config: FusionConfig,
) -> FusionProblem:
    """Match all sources with the target; return the problem with the parents' weights."""
    target = sources.profile.traced
    if config.has_own_places:
        target, matched = match_with_own_places(sources, names, config)
    else:
        matched = match_sources(sources, config)
    parents = [
        _parent(name, one, weight)
        for name, one, weight in zip(names, matched, weights, strict=True)
    ]
    return FusionProblem(target, tuple(parents), sources.reference, config.merging.normalisation)


def with_merge_weights(problem: FusionProblem, weights: Sequence[float]) -> FusionProblem:
    """Return a problem with other merge weights, the same in every layer; plans stay."""
    parents = [
        replace(one, weights=MergeWeights(weight))
        for one, weight in zip(problem.parents, weights, strict=True)
    ]
    return replace(problem, parents=tuple(parents))


def _parent(name: str, matched: Matched, weight: float) -> Parent:
    source = matched.source
    return Parent(
        name,
        source.profile,
        source.correspondence,
        matched.plans,
        MergeWeights(weight),
        matched.output_plan,
        matched.head_orders,
        source.rotations,
    )


def prepared_sources(
    names: Sequence[str], sources: TargetSources, data: Data, config: FusionConfig
) -> TargetSources:
    """Bring the sources nearer to the target before their channels are matched.

    Modules of lists come into the target's order, and streams are rotated where the solver asks for
    that.

    Raises
    ------
    InputError
        The norms of a model are not folded, as it was profiled for another solver.
    """
    return _with_rotations(names, _with_modules_in_order(sources, data, config), data, config)


def _with_modules_in_order(
    sources: TargetSources, data: Data, config: FusionConfig
) -> TargetSources:
    """Put the modules of lists, as experts, of the sources in the target's order.

    A source whose modules change places is observed again.
    """
    metric = cost_by_values(config)
    found = []
    for i, one in enumerate(sources.sources):
        orders = {}
        if i != sources.reference:
            orders = module_orders(
                one.correspondence, one.target, one.profile, metric=metric, known=one.plans
            )
        if orders:
            heads = [(one.profile.traced.heads[index], order) for index, order in orders.items()]
            model = exchanged_model(one.profile.traced, heads)
            (profile,) = profile_traced([model], data, config)
            correspondence = replace(one.correspondence, source=model)
            one = replace(one, correspondence=correspondence, profile=profile, orders=orders)
        found.append(one)
    return replace(sources, sources=tuple(found))


def _with_rotations(
    names: Sequence[str], sources: TargetSources, data: Data, config: FusionConfig
) -> TargetSources:
    """Rotate the sources' streams into the target's, where the solver asks for that.

    Of rotated channels no statistics are known: they are observed again, where they are needed.

    Raises
    ------
    InputError
        The norms of a model are not folded, as it was profiled for another solver.
    """
    if not isinstance(config.matching.solver, Orthogonal):
        return sources
    for name, one in zip(names, sources.sources, strict=True):
        if one.profile.traced.rotatable is None or one.target.traced.rotatable is None:
            raise InputError(
                f"{label(name)} was profiled for another solver, or its target was traced for one: "
                "give matching.solver='orthogonal' to clafusion.align or clafusion.profile, too"
            )
    rotated = rotate_sources(sources, names)
    if not needs_moments(config):
        return rotated
    found = []
    for one in rotated.sources:
        if one.rotations:
            (again,) = profile_traced([one.profile.traced], data, config)
            one = replace(one, profile=replace(one.profile, moments=again.moments))
        found.append(one)
    return replace(rotated, sources=tuple(found))


def matched_with_mean(
    problem: FusionProblem,
    aligned: AlignedModels,
    sources: TargetSources,
    data: Data,
    config: FusionConfig,
    max_rounds: int,
) -> tuple[FusionProblem, int, bool]:
    """Match all parents with their mean, again and again, until no plan changes."""
    # Least squares takes long, and what the others are matched with needs no such care.
    calibration = config.used_calibration
    if isinstance(calibration, LeastSquares):
        calibration = Repair()
    maps = [one.correspondence.layer_map for one in sources.sources]
    products = [one.correspondence.products for one in sources.sources]
    rounds, converged = 1, False
    for _ in range(max_rounds - 1):
        mean = calibrate(problem, data, calibration, seed=config.seed).model
        target = replace(problem.target, model=mean, weights=None)
        mean_profile = profile_traced([target], data, config)[0]
        found = [
            source_of(mean_profile, original, of, made)
            for original, of, made in zip(aligned.profiles, maps, products, strict=True)
        ]
        means = TargetSources(mean_profile, tuple(found), -1)
        again = problem_of(
            aligned.names,
            prepared_sources(aligned.names, means, data, config),
            [one.weights.overall for one in problem.parents],
            config,
        )
        again = replace(again, reference=problem.reference)
        converged = plans_are_at_rest(problem, again)
        if converged:
            break
        problem = again
        rounds += 1
    if not converged:
        warn(
            f"the plans are not at rest after {max_rounds} round(s); the last mean is taken. Raise "
            "merging.strategy.max_rounds, or use merging='many_to_one'",
            ConvergenceWarning,
        )
    return problem, rounds, converged
