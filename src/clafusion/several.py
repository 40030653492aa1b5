r"""Fuse more than two networks into one.

*Iterative*: the models are fused one after another, each with what the ones before it became, with
weights that make up the wanted shares. *Many-to-one*: all are brought into the frame of the deepest
and averaged at once. *Barycentre*: the average then becomes the frame, into which all are brought
again, until no plan changes any more: the plans then agree with each other by construction, for all
of them lead through the same frame (as the barycentre of measures does, Agueh and Carlier, SIAM J.
Math. Anal. 2011; for networks C2M3, arXiv 2405.17897).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clafusion.calibration.least_squares import Parent, frame_as_parent, regress_leaning
from clafusion.calibration.repair import repair, reset_batchnorm
from clafusion.correspondence.correspondence import (
    check_lifted,
    lifting,
    warn_of_counted_channels,
    with_state,
)
from clafusion.errors import ConvergenceWarning, InputError, StructureError
from clafusion.execution.call import State
from clafusion.fusion import (
    AlignedPair,
    FusionConfig,
    FusionResult,
    Progress,
    align_profiles,
    channel_plans,
    fuse,
    profiled,
    traced_to_fuse,
)
from clafusion.matching.head_order import order_heads
from clafusion.matching.united_heads import unite_models
from clafusion.merging.blending import aligned_state, outgoing_map
from clafusion.merging.layer_weights import MergeWeights
from clafusion.profiling.batches import Data, first_batch
from clafusion.profiling.moments import BatchMoments, observed_moments
from clafusion.tracing.trace import copied

__all__ = ["ModelsResult", "SeveralMethod", "fuse_models"]

SeveralMethod = Literal["iterative", "many_to_one", "barycentre"]


@dataclass(frozen=True)
class ModelsResult:
    """A network fused from several.

    Attributes
    ----------
    model
        The fused network: the architecture of the model with the most layers.
    weights
        Each model's share; they add up to 1.
    method
        How they were fused.
    pairs
        The alignments: of each step for ``"iterative"``, else of each model with the deepest.
    plans
        For each of ``pairs`` the transport plans, as in :group:`FusionResult`.
    rounds
        How many times all models were brought into a frame.
    converged
        Whether the plans stopped changing; True where there was nothing to repeat.
    leans
        How far the interior leans towards one model (see :func:`clafusion.fuse`), of each step for
        ``"iterative"``; empty but for least squares.
    """

    model: nn.Module
    weights: tuple[float, ...]
    method: SeveralMethod
    pairs: tuple[AlignedPair, ...]
    plans: tuple[tuple[Tensor | None, ...], ...]
    rounds: int
    converged: bool
    leans: tuple[float, ...] = ()


def fuse_models(
    models: Sequence[nn.Module],
    data: Data,
    *,
    weights: Sequence[float] | None = None,
    method: SeveralMethod = "iterative",
    max_rounds: int = 10,
    into: nn.Module | None = None,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> ModelsResult:
    """Fuse two or more trained networks of different depth and width into one.

    Parameters
    ----------
    models
        The networks, with the same inputs and outputs. None is modified.
    data
        Unlabelled inputs, as for :func:`clafusion.fuse`.
    weights
        Each model's share, not negative; they are divided by their sum. Default: equal.
    method
        ``"iterative"``, ``"many_to_one"`` or ``"barycentre"``: see :mod:`clafusion.several`. Of
        two models the first is :func:`clafusion.fuse`.
    max_rounds
        After how many frames a barycentre is taken as it is.
    into
        As for :func:`clafusion.fuse`, of every step; it needs ``"iterative"``.
    example_inputs, device, progress
        As for :func:`clafusion.fuse`.
    settings
        The other settings of :func:`clafusion.fuse`, but ``weight``. Merging, widths and layer
        weights need ``"iterative"``. By least squares the interior leans towards the model with the
        largest share, of equals towards the deepest; a barycentre's frames are repaired, and the
        last mean is regressed.

    Raises
    ------
    InputError
        An argument is not as said above.
    StructureError, AlignmentError, UnsupportedOpError, GraphVerificationError
        As for :func:`clafusion.fuse`.

    Examples
    --------
    >>> result = clafusion.fuse_models([resnet20, resnet32, resnet14], images)  # doctest: +SKIP
    """
    if isinstance(models, nn.Module) or not isinstance(models, Sequence) or len(models) < 2:
        raise InputError("models must be a list of at least two networks")
    for i, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise InputError(f"models[{i}] must be a torch.nn.Module; got {type(model).__name__}")
    shares = _shares(weights, len(models))
    if method not in get_args(SeveralMethod):
        raise InputError(f"method must be one of {get_args(SeveralMethod)}; got {method!r}")
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise InputError(f"max_rounds must be a positive whole number; got {max_rounds!r}")
    if "weight" in settings:
        raise InputError("weight is for two models; give weights, one for each model")
    unknown = settings.keys() - {one.name for one in fields(FusionConfig)}
    if unknown:
        raise InputError(f"settings must be those of fuse; got {', '.join(sorted(unknown))}")
    config = FusionConfig(**settings)
    if device is not None:
        models = [copied(model).to(device) for model in models]
    if method == "iterative":
        settings |= {"into": into, "example_inputs": example_inputs, "progress": progress}
        return _one_after_another(models, data, shares, settings)
    for name, wanted in (
        ("balance", "add"),
        ("width", "own"),
        ("normalisation", "two"),
        ("match_classifier", False),
        ("layer_weights", "uniform"),
    ):
        if getattr(config, name) != wanted:
            raise InputError(f"{name}={getattr(config, name)!r} needs method='iterative'")
    if into is not None:
        raise InputError("into needs method='iterative'")
    if config.solver == "zip":
        raise InputError("solver='zip' needs method='iterative'")
    rounds = max_rounds if method == "barycentre" else 1
    example = first_batch(data) if example_inputs is None else example_inputs
    return _into_one_frame(models, data, shares, method, rounds, example, config, progress)


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    try:
        given = [1.0] * count if weights is None else [float(one) for one in weights]
    except (TypeError, ValueError) as error:
        raise InputError(f"weights must be numbers: {error}") from None
    if len(given) != count:
        raise InputError(f"weights must have one entry a model: {count}; got {len(given)}")
    total = sum(given)
    if not (all(one >= 0 for one in given) and 0 < total < float("inf")):
        raise InputError(f"weights must not be negative and not all 0; got {given}")
    return tuple(one / total for one in given)


def _one_after_another(
    models: Sequence[nn.Module],
    data: Data,
    shares: tuple[float, ...],
    settings: Mapping[str, Any],
) -> ModelsResult:
    fused, total = models[0], shares[0]
    steps: list[FusionResult] = []
    for model, share in zip(models[1:], shares[1:], strict=True):
        total += share
        weight = share / total if total > 0 else 0.5
        step = fuse(fused, model, data, weight=weight, **settings)
        fused = step.model
        steps.append(step)
    return ModelsResult(
        fused,
        shares,
        "iterative",
        tuple(step.pair for step in steps),
        tuple(step.plans for step in steps),
        len(steps),
        True,
        tuple(step.lean for step in steps if step.lean is not None),
    )


def _into_one_frame(
    models: Sequence[nn.Module],
    data: Data,
    shares: tuple[float, ...],
    method: SeveralMethod,
    max_rounds: int,
    example: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    config: FusionConfig,
    progress: Progress | None,
) -> ModelsResult:
    graphs = [
        traced_to_fuse(f"models[{i}]", model, example, config) for i, model in enumerate(models)
    ]
    profiles = [
        replace(one, moments=tuple(observed_moments(one.traced, data)))
        for one in profiled(graphs, data, config, progress)
    ]
    deepest = max(range(len(graphs)), key=lambda i: len(graphs[i].layers))
    others = [i for i in range(len(models)) if i != deepest]
    order = [*others, deepest]  # as least squares wants them
    pairs = [align_profiles(profiles[deepest], one, config=config) for one in profiles]
    for i, pair in enumerate(pairs):
        if pair.alignment.unmatched_shallow:
            raise StructureError(
                f"models[{i}] has layers for which models[{deepest}], the deepest, has none; use "
                "method='iterative'"
            )
        target, _ = unite_models(graphs[deepest], graphs[i], pair.alignment.deep_to_shallow)
        if target.united_heads:
            raise StructureError(
                f"models[{i}] has another number of attention heads than models[{deepest}], the "
                "deepest; use method='iterative'"
            )
    # Least squares takes long and needs no good start: only the last mean is regressed.
    last = config.calibration == "least_squares"
    each = replace(config, calibration="repair") if last else config
    frame = profiles[deepest]
    parents: list[Parent] = []
    orders: list[Mapping[int, tuple[int, ...]]] = []
    converged = False
    for done in range(max_rounds):
        before, parents = (parents, orders), []
        orders, moments = [], []
        for i in order:
            source = profiles[i]
            moved: dict[int, tuple[int, ...]] = {}
            if graphs[i] is frame.traced:
                parents.append(frame_as_parent(graphs[i], MergeWeights(shares[i])))
            else:
                lifted = lifting(frame.traced, graphs[i], pairs[i].alignment.deep_to_shallow)
                if done == 0:  # every frame has the same architecture
                    check_lifted(lifted)
                    warn_of_counted_channels(lifted)
                lifted, source, moved = order_heads(lifted, frame, source)
                plans = tuple(channel_plans(lifted, frame, source, config))
                parents.append(Parent(lifted, plans, MergeWeights(shares[i])))
            orders.append(moved)
            moments.append(source.moments or observed_moments(source.traced, data))
        converged = orders == before[1] and _same(before[0], parents)
        if converged:
            break
        model = _calibrated(parents, moments, data, each)
        if done + 1 < max_rounds:
            graph = traced_to_fuse("fused", model, example, config)
            frame = profiled([graph], data, config)[0]
    if method == "barycentre" and not converged:
        warnings.warn(
            f"the plans still changed after {max_rounds} rounds; the last mean is taken. Raise "
            "max_rounds, or use method='many_to_one'",
            ConvergenceWarning,
            stacklevel=3,
        )
    leans: tuple[float, ...] = ()
    if last:
        state, lean = regress_leaning(
            parents,
            lambda interior: _average(parents, [one.overall for one in interior]),
            data,
            lean=config.lean,
            seed=config.seed,
            progress=progress,
        )
        leans = (lean,)
        graph = parents[0].lifting.deep
        model = with_state(graph.model, state, graph)
    return ModelsResult(
        model,
        shares,
        method,
        tuple(pairs[i] for i in others),
        tuple(tuple(one.plans) for one in parents[:-1]),
        done + (not converged),
        converged or method == "many_to_one",
        leans,
    )


def _same(before: Sequence[Parent], after: Sequence[Parent]) -> bool:
    """Say whether no plan moves any channel otherwise."""
    return len(before) == len(after) and all(
        one is other
        or (
            one is not None
            and other is not None
            and torch.equal(outgoing_map(one), outgoing_map(other))
        )
        for left, right in zip(before, after, strict=True)
        for one, other in zip(left.plans, right.plans, strict=True)
    )


def _average(parents: Sequence[Parent], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of all models in the frame.

    Inside a block that some models lack, only the others count; its last write is zero for those.
    """
    aligned = [aligned_state(one.lifting, one.plans) for one in parents]
    fused = {}
    for name, tensor in parents[0].lifting.deep.state().items():
        present = [
            (share, one[name]) for share, one in zip(shares, aligned, strict=True) if name in one
        ]
        total = sum(share for share, _ in present)
        if total > 0:
            mean = sum((share / total) * one.double() for share, one in present)
            assert isinstance(mean, Tensor)
            fused[name] = mean.to(tensor)
        else:
            fused[name] = tensor.clone()
    return fused


def _calibrated(
    parents: Sequence[Parent],
    moments: Sequence[Sequence[BatchMoments]],
    data: Data,
    config: FusionConfig,
) -> nn.Module:
    """Average, and calibrate by statistics."""
    graph = parents[0].lifting.deep
    state: State = _average(parents, [one.shares.overall for one in parents])
    if config.calibration == "repair":
        goals = [_mean_moments(parents, of_batch) for of_batch in zip(*moments, strict=True)]
        # All the weight on the frame, whose statistics are given as the models' mean.
        own = frame_as_parent(graph, MergeWeights(1.0))
        state = repair(
            own.lifting, own.plans, state, data, deep_shares=own.shares, observed=(goals, goals)
        )
    model = with_state(graph.model, state, graph)
    if config.calibration == "batchnorm":
        reset_batchnorm(model, data, graph.example_inputs, graph.keywords)
    return model


def _mean_moments(parents: Sequence[Parent], of_batch: Sequence[BatchMoments]) -> BatchMoments:
    """Return the weighted mean of the models' statistics at every calibration point of the frame."""
    found = {}
    for layer in parents[0].lifting.deep.layers:
        for point in layer.calibration_points:
            total, mean = 0.0, torch.zeros((), dtype=torch.float64)
            for one, moments in zip(parents, of_batch, strict=True):
                other = one.lifting.calibration_points.get(point.node)
                if one.lifting.origins[point.weight] == "silent":
                    total += one.shares.overall
                elif other is not None:
                    moved = one.moved(torch.stack(moments[other.node]), point, other)
                    total += one.shares.overall
                    mean = mean + one.shares.overall * moved
            pair = (mean / total if total > 0 else mean).expand(2, len(point.groups))
            found[point.node] = (pair[0], pair[1])
    return found
