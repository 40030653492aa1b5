r"""Fuse more than two networks into one.

*Iterative*: the models are fused one after another, each with what the ones before it became, with
weights that make up the wanted shares. *Many-to-one*: all are brought into the frame of the deepest
and averaged at once. *Barycentre*: the average then becomes the frame, into which all are brought
again, until no plan changes any more: the plans then agree with each other by construction, for all
of them lead through the same frame (as the barycentre of measures does, Agueh and Carlier, SIAM J.
Math. Anal. 2011; for networks C2M3, arXiv 2405.17897).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clafusion.blending import aligned_state, transport_vector
from clafusion.calibration import BatchMoments, observed_moments, repair, reset_batchnorm
from clafusion.data import Data, first_batch
from clafusion.depth import Lifting, lifting, with_state
from clafusion.errors import ConvergenceWarning, InputError
from clafusion.graph import State
from clafusion.pipeline import (
    AlignedPair,
    FusionConfig,
    FusionResult,
    Progress,
    align_signatures,
    channel_plans,
    fuse,
    profiled,
    traced_to_fuse,
)

__all__ = ["ModelsResult", "SeveralMethod", "fuse_models"]

SeveralMethod = Literal["iterative", "many_to_one", "barycentre"]


@dataclass(frozen=True)
class ModelsResult:
    """A network fused from several.

    Attributes
    ----------
    model
        The fused network: the architecture of the model with the most units.
    weights
        Each model's share; they add up to 1.
    method
        How they were fused.
    pairs
        The alignments: of each step for ``"iterative"``, else of each model with the deepest.
    plans
        For each of ``pairs`` the transport plans, as in :class:`FusionResult`.
    rounds
        How many times all models were brought into a frame.
    converged
        Whether the plans stopped changing; True where there was nothing to repeat.
    """

    model: nn.Module
    weights: tuple[float, ...]
    method: SeveralMethod
    pairs: tuple[AlignedPair, ...]
    plans: tuple[tuple[Tensor | None, ...], ...]
    rounds: int
    converged: bool


def fuse_models(
    models: Sequence[nn.Module],
    data: Data,
    *,
    weights: Sequence[float] | None = None,
    method: SeveralMethod = "iterative",
    max_rounds: int = 10,
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
    example_inputs, device, progress
        As for :func:`clafusion.fuse`.
    settings
        The other settings of :func:`clafusion.fuse`, but ``weight``. Calibration by least squares,
        merging and widths need ``"iterative"``.

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
        models = [copy.deepcopy(model).to(device) for model in models]
    if method == "iterative":
        settings |= {"example_inputs": example_inputs, "progress": progress}
        return _one_after_another(models, data, shares, settings)
    for name, wanted in (
        ("balance", "add"),
        ("width", "own"),
        ("normalisation", "two"),
        ("match_classifier", False),
    ):
        if getattr(config, name) != wanted:
            raise InputError(f"{name}={getattr(config, name)!r} needs method='iterative'")
    if config.calibration == "least_squares":
        raise InputError("calibration='least_squares' needs method='iterative'")
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
    signatures = profiled(graphs, data, config, progress)
    deepest = max(range(len(graphs)), key=lambda i: len(graphs[i].units))
    pairs = [align_signatures(signatures[deepest], one, config=config) for one in signatures]
    partners = [pair.alignment.deep_to_shallow for pair in pairs]
    moments = [observed_moments(graph, data) for graph in graphs]
    frame = signatures[deepest]
    before: list[tuple[Tensor | None, ...]] | None = None
    for done in range(max_rounds):
        liftings = [
            lifting(frame.graph, graph, partner)
            for graph, partner in zip(graphs, partners, strict=True)
        ]
        plans = [
            tuple(channel_plans(one, frame, signature, config))
            for one, signature in zip(liftings, signatures, strict=True)
        ]
        converged = before is not None and _same(before, plans)
        if converged:
            break
        before = plans
        state = _average(liftings, plans, shares)
        model = _calibrated(liftings, plans, shares, state, moments, data, config)
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
    others = [i for i in range(len(models)) if i != deepest]
    return ModelsResult(
        model,
        shares,
        method,
        tuple(pairs[i] for i in others),
        tuple(plans[i] for i in others),
        done + (not converged),
        converged or method == "many_to_one",
    )


def _same(
    before: Sequence[Sequence[Tensor | None]], after: Sequence[Sequence[Tensor | None]]
) -> bool:
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for left, right in zip(before, after, strict=True)
        for one, other in zip(left, right, strict=True)
    )


def _average(
    liftings: Sequence[Lifting],
    plans: Sequence[Sequence[Tensor | None]],
    shares: Sequence[float],
) -> dict[str, Tensor]:
    """Return the weighted mean of all models in the frame.

    Inside a block that some models lack, only the others count; its last write is zero for those.
    """
    aligned = [aligned_state(one, plan) for one, plan in zip(liftings, plans, strict=True)]
    fused = {}
    for name, tensor in liftings[0].deep.state().items():
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
    liftings: Sequence[Lifting],
    plans: Sequence[Sequence[Tensor | None]],
    shares: Sequence[float],
    state: State,
    moments: Sequence[Sequence[BatchMoments]],
    data: Data,
    config: FusionConfig,
) -> nn.Module:
    graph = liftings[0].deep
    if config.calibration == "repair":
        goals = [
            _mean_moments(liftings, plans, shares, of_batch)
            for of_batch in zip(*moments, strict=True)
        ]
        # All the weight on the frame, whose statistics are given as the models' mean.
        own = lifting(graph, graph, tuple(range(len(graph.units))))
        own_plans = [torch.eye(one.size, dtype=torch.float64) for one in graph.classes]
        state = repair(own, own_plans, state, data, deep_weight=1.0, observed=(goals, goals))
    model = with_state(graph.model, state, graph)
    if config.calibration == "batchnorm":
        reset_batchnorm(model, data, graph.example_inputs, graph.keywords)
    return model


def _mean_moments(
    liftings: Sequence[Lifting],
    plans: Sequence[Sequence[Tensor | None]],
    shares: Sequence[float],
    of_batch: Sequence[BatchMoments],
) -> BatchMoments:
    """Return the weighted mean of the models' statistics at every site of the frame."""
    found = {}
    for unit in liftings[0].deep.units:
        for site in unit.sites:
            total, mean = 0.0, torch.zeros((), dtype=torch.float64)
            for one, plan, share, moments in zip(liftings, plans, shares, of_batch, strict=True):
                other = one.sites.get(site.node)
                if one.origins[site.weight] == "silent":
                    total += share
                elif other is not None:
                    moved = transport_vector(
                        torch.stack(moments[other.node]),
                        plan,
                        (site.classes, site.members),
                        (other.classes, other.members),
                        one.classes,
                    )
                    total += share
                    mean = mean + share * moved
            pair = (mean / total if total > 0 else mean).expand(2, len(site.classes))
            found[site.node] = (pair[0], pair[1])
    return found
