"""The main job: the stages in order."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clafusion.alignment.dynamic_program import AlignmentMode, LayerAlignment, align_layers
from clafusion.alignment.layer_costs import LayerCost, layer_costs
from clafusion.calibration.least_squares import Lean, Parent, frame_as_parent, regress_leaning
from clafusion.calibration.repair import repair, reset_batchnorm
from clafusion.correspondence.correspondence import (
    Correspondence,
    allowed_pairs,
    check_lifted,
    gap_costs,
    lifting,
    skip_costs,
    warn_of_counted_channels,
    with_state,
)
from clafusion.errors import AlignmentError, ClafusionError, InputError, StructureError
from clafusion.matching.activation_costs import (
    MAX_CHANNELS,
    ActivationCost,
    activation_costs,
    classifier_costs,
)
from clafusion.matching.head_order import order_heads
from clafusion.matching.united_heads import head_plans, unite_heads
from clafusion.matching.weight_costs import match_by_weights
from clafusion.matching.zipping import zip_plans
from clafusion.merging.blending import Normalisation, blend
from clafusion.merging.layer_weights import LayerWeights, MergeWeights, layer_shares
from clafusion.profiling.batches import Data, first_batch
from clafusion.profiling.importance import (
    Importance,
    channel_importance,
    layer_sensitivities,
    marginals,
    sensitivities,
)
from clafusion.profiling.profile import LayerValues, ModelProfile, profile_models
from clafusion.targets.balance import Balance, Balanced, Merge, Width, balance
from clafusion.tracing.model import TracedModel
from clafusion.tracing.trace import copied, trace
from clafusion.transport.solve import Solver, solve_transport

__all__ = [
    "AlignedPair",
    "Calibration",
    "FusionConfig",
    "FusionResult",
    "ChannelCost",
    "Progress",
    "align",
    "fuse",
    "profile",
]

Calibration = Literal["none", "batchnorm", "repair", "least_squares"]
ChannelCost = Literal["correlation", "euclidean", "weight", "dual"]

Progress = Callable[[str, int], None]
"""Called with the stage's name and how many of its inputs are done."""


@dataclass(frozen=True)
class FusionConfig:
    """How to fuse; every field is an argument of :func:`fuse` and explained there.

    Raises
    ------
    InputError
        A setting is out of its range; the message names it.
    """

    weight: float = 0.5
    layer_cost: LayerCost = "cka"
    alignment: AlignmentMode = "layer"
    channel_cost: ChannelCost = "correlation"
    solver: Solver = "auto"
    epsilon: float = 0.05
    calibration: Calibration = "repair"
    lean: Lean = "auto"
    balance: Balance = "add"
    merge: Merge = "least_squares"
    width: Width = "own"
    alignment_samples: int = 400
    matching_rows: int = 8192
    verify: bool = True
    seed: int = 0
    layer_values: LayerValues = "output"
    profile_inputs: int | None = None
    pin_ends: bool = False
    normalisation: Normalisation = "two"
    match_classifier: bool = False
    importance: Importance = "uniform"
    zip_budget: float = 0.1
    layer_weights: LayerWeights = "uniform"

    @classmethod
    def paper(cls, *, match_classifier: bool = True) -> FusionConfig:
        """Return the settings of CLAFusion as published (arXiv 2110.15538), step by step.

        Profiles are pre-activations of the first 200 inputs; layers are aligned by linear CKA
        with the first and last pinned; channels are matched exactly by the Euclidean distance of
        their pre-activations; plans are normalised once (OTFusion, arXiv 1910.05653, algorithm 1);
        nothing is calibrated. The published code matches the classifier's outputs too, unless it
        is told to skip the last layer. Fuse with ``**dataclasses.asdict(FusionConfig.paper())``.
        """
        return cls(
            channel_cost="euclidean",
            solver="exact",
            calibration="none",
            alignment_samples=200,
            matching_rows=1 << 18,  # all positions of 200 images of 32 by 32
            layer_values="preactivation",
            profile_inputs=200,
            pin_ends=True,
            normalisation="single",
            match_classifier=match_classifier,
        )

    def __post_init__(self) -> None:
        if not (_is_number(self.weight) and 0.0 <= self.weight <= 1.0):
            raise InputError(
                f"weight must be in [0, 1], the second model's share; got {self.weight!r}"
            )
        if self.lean != "auto" and not (_is_number(self.lean) and 0.0 <= self.lean <= 1.0):
            raise InputError(f"lean must be 'auto' or in [0, 1]; got {self.lean!r}")
        for name, choices in (
            ("layer_cost", get_args(LayerCost)),
            ("alignment", ("layer", "chain", "random")),
            ("channel_cost", get_args(ChannelCost)),
            ("solver", get_args(Solver)),
            ("calibration", get_args(Calibration)),
            ("balance", get_args(Balance)),
            ("merge", get_args(Merge)),
            ("width", get_args(Width)),
            ("layer_values", get_args(LayerValues)),
            ("normalisation", get_args(Normalisation)),
            ("importance", get_args(Importance)),
            ("layer_weights", get_args(LayerWeights)),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(map(repr, choices))}; "
                    f"got {getattr(self, name)!r}"
                )
        if self.importance != "uniform" and self.solver == "assignment":
            raise InputError(
                "importance must be 'uniform' with solver 'assignment', which moves equal masses; "
                f"got {self.importance!r}: use solver='auto' or 'exact'"
            )
        if not (_is_number(self.zip_budget) and 0.0 <= self.zip_budget <= 1.0):
            raise InputError(f"zip_budget must be in [0, 1]; got {self.zip_budget!r}")
        if self.solver == "zip":
            self._check_zip()
        for name in ("alignment_samples", "matching_rows", "profile_inputs"):
            value = getattr(self, name)
            if name == "profile_inputs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise InputError(f"{name} must be a whole number of at least 2; got {value!r}")
        if (
            isinstance(self.seed, bool)
            or not isinstance(self.seed, int)
            or not (0 <= self.seed < 2**63)
        ):
            raise InputError(f"seed must be a whole number from 0 to 2**63 - 1; got {self.seed!r}")
        for name in ("verify", "pin_ends", "match_classifier"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if not (_is_number(self.epsilon) and self.epsilon > 0):
            raise InputError(f"epsilon must be a positive number; got {self.epsilon!r}")

    def _check_zip(self) -> None:
        for name, needed, reason in (
            ("channel_cost", "correlation", "groups are made by correlation"),
            ("importance", "uniform", "it moves no masses"),
            ("layer_weights", "uniform", "each channel has its own share already"),
            ("normalisation", "two", "what leaves and what enters a group differ"),
            ("match_classifier", False, "outputs are not merged"),
        ):
            if getattr(self, name) != needed:
                raise InputError(f"solver 'zip' needs {name}={needed!r}, for {reason}")
        if self.calibration == "least_squares":
            raise InputError(
                "solver 'zip' goes with the calibrations 'repair', 'batchnorm' and 'none'; "
                "'least_squares' chooses from both networks' channels itself: use solver='auto'"
            )


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(cast(float, value))


@dataclass(frozen=True)
class AlignedPair:
    """Two traced models, their profiles and the alignment of their layers.

    Attributes
    ----------
    deep, shallow
        Profiles of the model with more layers and of the other one (of two models with equally
        many layers the first is ``deep``).
    deep_is_first
        Whether the deep model is the first that was given.
    costs
        ``(m, n)``: the costs of all pairs of layers, before structure forbids some.
    alignment
        The layers' alignment. Its cost matrix is ``inf`` where structures differ.
    timings
        Seconds of each stage.
    peak_memory
        On a GPU: bytes that PyTorch held there at the most, in each stage. Else empty.
    """

    deep: ModelProfile
    shallow: ModelProfile
    deep_is_first: bool
    costs: NDArray[np.float64]
    alignment: LayerAlignment
    timings: Mapping[str, float]
    peak_memory: Mapping[str, int]


@dataclass(frozen=True)
class FusionResult:
    """A fused model and how it came about.

    Attributes
    ----------
    model
        The fused network: the deeper model's architecture (with ``balance="merge"`` the shallower
        one's, with ``into`` that one's, and where each model is the deeper one somewhere, the
        deeper model's with the other's layers put in), in the same mode (train or eval), trainable
        as that one is. Of two models equally deep the first gives the architecture.
    pair
        Profiles, layer costs and alignment.
    lifting
        What corresponds in the two networks, or in what stands for them.
    plans
        For each channel group of ``lifting.deep.groups`` its transport plan
        ``(num_source, num_target)``, source: ``lifting.shallow``; None inside inserted blocks.
        (Heads of which the networks have different numbers are united in one class there.)
    target_plans
        By the solver ``"zip"`` the plans ``(num_target, num_target)`` of the other network, whose
        channels then move, too; else None.
    shares
        For each matched pair of layers (those of ``alignment.pairs`` that the result has) the deep
        network's share; the rest is the shallow one's. All the same but for
        ``layer_weights="sensitivity"``.
    head_orders
        Where attention heads or convolution groups of the source had to change places to match the
        target's: index in ``lifting.shallow.blocks`` -> for every place the block that came there.
        ``lifting.shallow`` is of a copy with that order.
    lean
        How far the interior leans towards one parent; None but for least squares.
    config
        The settings.
    timings
        Seconds of each stage, in order.
    peak_memory
        On a GPU: bytes that PyTorch held there at the most, in each stage. Else empty.
    """

    model: nn.Module
    pair: AlignedPair
    lifting: Correspondence
    plans: tuple[Tensor | None, ...]
    lean: float | None
    config: FusionConfig
    timings: Mapping[str, float]
    peak_memory: Mapping[str, int]
    target_plans: tuple[Tensor | None, ...] | None = None
    shares: Mapping[tuple[int, int], float] = field(default_factory=dict)
    head_orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def alignment(self) -> LayerAlignment:
        """The alignment of the layers."""
        return self.pair.alignment

    def summary(self) -> str:
        """Return a table of the matched layers, and below it what was done and how long it took."""
        from clafusion.reports.tables import fusion_summary

        return fusion_summary(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the cost matrix with the chosen path, and the matched layers side by side.

        The file's ending (``.png``, ``.svg``, ``.pdf``) chooses the format.
        """
        from clafusion.reports.plots import plot_alignment

        plot_alignment(self.pair, path)


def fuse(
    first: nn.Module,
    second: nn.Module,
    data: Data,
    *,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    weight: float = 0.5,
    layer_cost: LayerCost = "cka",
    alignment: AlignmentMode = "layer",
    channel_cost: ChannelCost = "correlation",
    solver: Solver = "auto",
    epsilon: float = 0.05,
    calibration: Calibration = "repair",
    lean: Lean = "auto",
    balance: Balance = "add",
    merge: Merge = "least_squares",
    width: Width = "own",
    alignment_samples: int = 400,
    matching_rows: int = 8192,
    verify: bool = True,
    seed: int = 0,
    layer_values: LayerValues = "output",
    profile_inputs: int | None = None,
    pin_ends: bool = False,
    normalisation: Normalisation = "two",
    match_classifier: bool = False,
    importance: Importance = "uniform",
    zip_budget: float = 0.1,
    layer_weights: LayerWeights = "uniform",
    into: nn.Module | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> FusionResult:
    """Fuse two trained networks of different depth and width into one, without training.

    The layers of the two networks are aligned (CLAFusion, arXiv 2110.15538), the shallow one is
    lifted to the deep one's depth, its channels are matched with the deep one's by optimal
    transport (OTFusion, arXiv 1910.05653), the weights are averaged and the lost statistics
    restored (REPAIR, arXiv 2211.08403). Neither model is modified.

    Parameters
    ----------
    first, second
        The trained networks, in either order, with the same inputs and outputs. The deeper one
        gives the result's architecture and the frame into which the other's channels move.
    data
        Unlabelled inputs as the models were trained on: a tensor, a list of batches or a
        DataLoader (labels are ignored). A few hundred are enough.
    example_inputs
        Inputs to trace the models with; default the first batch of ``data``. Give a mapping for
        models that take keyword inputs, a tuple for several positional ones.
    weight
        The second model's share, in [0, 1].
    layer_cost
        The cost of matching two layers: ``"cka"`` is one minus linear CKA of their outputs. For
        the others see :func:`clafusion.alignment.layer_costs.layer_costs`.
    alignment
        ``"layer"`` (exact), or the baselines ``"chain"`` and ``"random"``.
    channel_cost
        The cost of matching two channels: ``"correlation"`` or ``"euclidean"``, both of their
        pre-activations; ``"weight"``, of their weights as the other channels are matched; or
        ``"dual"``, of correlation and weights. See :func:`clafusion.matching.activation_costs.activation_costs` and
        :func:`clafusion.matching.weight_costs.match_by_weights`.
    solver
        How channels are matched; see :func:`clafusion.transport.solve.solve_transport`. ``"zip"`` unites
        similar channels across the networks and within each (ZipIt, arXiv 2305.03053), by
        correlation: for networks that learnt different things. See :mod:`clafusion.matching.zipping`.
    epsilon
        Entropic regularisation of the solver ``"sinkhorn"``, relative to the largest cost.
    calibration
        ``"repair"`` (match the statistics of every layer), ``"least_squares"`` (regress every
        layer onto the parents; slower and more accurate), ``"batchnorm"`` (re-estimate running
        statistics) or ``"none"``.
    lean
        Of ``"least_squares"``: how far the interior leans from ``weight`` towards the parent that
        has more of it (of equals the one that gives the architecture), in [0, 1]. The outputs aim
        at the weighted mean all the same. ``"auto"`` tries 0 (best where the parents learnt
        different things) and 0.8 (where they learnt the same with different features), at twice the
        time, and takes what comes nearer to the parents' weighted mean outputs.
    balance
        ``"add"``: the result is as deep as the deeper network, and the shallower one gets layers
        that change nothing. ``"merge"``: it is as deep as the shallower one (compression), and the
        deeper one's unmatched layers go; use it with ``calibration="least_squares"``, by which the
        layers that are left make up for them.
    merge
        How they go: ``"least_squares"`` (left out), or for fully connected networks ``"sum"``,
        ``"majority"`` and ``"average"``; see :func:`clafusion.targets.balance.balance`.
    width
        The result's widths: of the network that gives the structure (``"own"``), of the
        ``"first"`` or ``"second"`` network, or of the one with fewer (``"narrow"``) or more
        channels (``"wide"``).
    alignment_samples
        Inputs over which layers are compared; held at once, so this bounds the memory.
    matching_rows
        Pairs of input and position over which channels are compared.
    verify
        Prove the analysis of each model by permuting a copy. See :func:`clafusion.tracing.trace`.
    seed
        Seed of every random choice. Same inputs and seed, same bytes.
    layer_values
        By what layers are compared: their ``"output"``, or that before its nonlinearity
        (``"preactivation"``); inserted layers' channels then by what flows through them.
    profile_inputs
        Profile on this many inputs only; None for all.
    pin_ends
        Whether the first layers of both networks match each other, and the last ones.
    normalisation
        Of the plans: ``"two"``, one for what leaves a layer and one for what enters it, or the
        published ``"single"``, which shrinks where widths differ.
    match_classifier
        Whether the outputs are matched, too, as if they were not labels. It needs
        ``layer_values="preactivation"``.
    importance
        How much mass each channel has in the matching: equal masses (``"uniform"``), or by the
        ``"norm"`` of its weights, its mean ``"activation"``, or the outputs' ``"sensitivity"`` to
        its weights. Channels of little mass then take no partner away from those of much. Not with
        the solvers ``"assignment"`` and ``"zip"``. See
        :func:`clafusion.profiling.importance.channel_importance`. Attention heads of which the networks have
        different numbers have equal masses.
    zip_budget
        Of the solver ``"zip"``: the share of a layer's channels that may be merged within one
        network, in [0, 1]. Above 0, weights 0 and 1 give back the parents only as far as the
        merged channels are alike.
    layer_weights
        Whether every layer has ``weight`` (``"uniform"``), or each matched layer a share of its own,
        by how sensitive each network's outputs are to it, with ``weight`` for the outputs
        (``"sensitivity"``), which seldom helps. Not with the solver ``"zip"``. See
        :func:`clafusion.merging.layer_weights.layer_shares`.
    into
        A module of the architecture that the result is to have, of any depth and widths that can
        hold both networks' layers; its weights do not matter, and it is not modified. Default: the
        deeper network's; where each is the deeper one somewhere, that with copies of the other's
        unmatched layers in its containers. Residual blocks for which ``into`` has no place are left
        out, and channels too; least squares makes up for them.
    device
        Where to compute; default where the models are.
    progress
        Called with the stage's name and the number of inputs it has seen.

    Returns
    -------
    FusionResult
        With the fused model as ``.model``.

    Raises
    ------
    InputError
        A setting, a model's weights or the data are unusable.
    UnsupportedOpError, GraphVerificationError
        A model cannot be analysed.
    StructureError, AlignmentError
        The two models cannot be brought to one structure.

    Examples
    --------
    >>> result = clafusion.fuse(resnet20, resnet32, images)  # doctest: +SKIP
    >>> result.model(images[:8])  # doctest: +SKIP
    """
    config = FusionConfig(
        weight=weight,
        layer_cost=layer_cost,
        alignment=alignment,
        channel_cost=channel_cost,
        solver=solver,
        epsilon=epsilon,
        calibration=calibration,
        lean=lean,
        balance=balance,
        merge=merge,
        width=width,
        alignment_samples=alignment_samples,
        matching_rows=matching_rows,
        verify=verify,
        seed=seed,
        layer_values=layer_values,
        profile_inputs=profile_inputs,
        pin_ends=pin_ends,
        normalisation=normalisation,
        match_classifier=match_classifier,
        importance=importance,
        zip_budget=zip_budget,
        layer_weights=layer_weights,
    )
    if into is not None and not (isinstance(into, nn.Module) and config.balance == "add"):
        raise InputError(
            "into must be a module that has the wanted architecture, without balance='merge'; "
            f"got {type(into).__name__} with balance={config.balance!r}"
        )
    _check_modules(first, second)
    if example_inputs is None:
        example_inputs = first_batch(data)
    template = None if into is None else traced_template(into, first, example_inputs, device)
    pair = align(
        first,
        second,
        data,
        example_inputs=example_inputs,
        config=config,
        device=device,
        progress=progress,
    )
    return fuse_aligned(pair, data, config=config, into=template, progress=progress)


def align(
    first: nn.Module,
    second: nn.Module,
    data: Data,
    *,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    config: FusionConfig | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> AlignedPair:
    """Do the first half of :func:`fuse`: trace, profile and align, but fuse nothing."""
    config = config or FusionConfig()
    _check_modules(first, second)
    if example_inputs is None:
        example_inputs = first_batch(data)
    if device is not None:
        target = torch.device(device)
        first, second = (copied(model).to(target) for model in (first, second))
        example_inputs = _to(example_inputs, target)
    clock = _Clock(next((one.device for one in first.parameters()), None))
    with clock.stage("trace"):
        graphs = [
            traced_to_fuse(name, model, example_inputs, config)
            for name, model in (("first", first), ("second", second))
        ]
    fit = _fit(*graphs)
    with clock.stage("profile"):
        profiles = profiled(graphs, data, config, progress)
    return _aligned(profiles[0], profiles[1], fit, config, clock)


def _check_modules(first: object, second: object) -> None:
    for name, model in (("first", first), ("second", second)):
        if not isinstance(model, nn.Module):
            raise InputError(
                f"the {name} model must be a torch.nn.Module; got {type(model).__name__}"
            )


def align_profiles(
    first: ModelProfile,
    second: ModelProfile,
    *,
    config: FusionConfig | None = None,
    timings: Mapping[str, float] | None = None,
) -> AlignedPair:
    """Align two models that are traced and profiled already; ``timings`` are those of before.

    Raises
    ------
    InputError
        The profiles come from different inputs.
    StructureError, AlignmentError
        The two models cannot be brought to one structure.
    """
    fit = _fit(first.traced, second.traced)
    clock = _Clock(_device(first), timings)
    return _aligned(first, second, fit, config or FusionConfig(), clock)


def _device(profile: ModelProfile) -> torch.device:
    return profile.traced.example_inputs[0].device


def _aligned(
    first: ModelProfile, second: ModelProfile, fit: _Fit, config: FusionConfig, clock: _Clock
) -> AlignedPair:
    deep, shallow = (first, second) if fit.deep_is_first else (second, first)
    with clock.stage("align"):
        costs = layer_costs(deep, shallow, metric=config.layer_cost)
        skip_shallow = None
        if fit.needs_gaps:
            if config.alignment != "layer":
                raise StructureError(
                    "each network is the deeper one somewhere, and so each needs gaps; they are "
                    f"in alignment='layer' only, and this is alignment={config.alignment!r}"
                )
            skip_shallow = gap_costs(deep.traced, shallow.traced, np.where(fit.allowed, costs, 0.0))
        alignment = align_layers(
            np.where(fit.allowed, costs, np.inf),
            skip=skip_costs(deep.traced),
            skip_shallow=skip_shallow,
            mode=config.alignment,
            pin_first=config.pin_ends,
            pin_last=config.pin_ends,
            seed=config.seed,
        )
    return AlignedPair(
        deep, shallow, fit.deep_is_first, costs, alignment, clock.seconds, clock.peak_memory
    )


def profile(
    model: nn.Module | TracedModel,
    data: Data,
    *,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    alignment_samples: int = 400,
    matching_rows: int = 8192,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> ModelProfile:
    """Record what a model's layers and channels do on data, in one pass and fixed memory.

    Parameters and errors are those of :func:`clafusion.profiling.profile.profile_models`; a module is
    traced first, with ``example_inputs`` or the first batch of ``data``.
    """
    if not isinstance(model, TracedModel):
        model = trace(model, first_batch(data) if example_inputs is None else example_inputs)
    return profile_models(
        [model],
        data,
        alignment_samples=alignment_samples,
        matching_rows=matching_rows,
        seed=seed,
        device=None if device is None else torch.device(device),
        progress=progress,
    )[0]


def profiled(
    graphs: Sequence[TracedModel],
    data: Data,
    config: FusionConfig,
    progress: Progress | None = None,
    *,
    moments: bool = False,
) -> list[ModelProfile]:
    """Profile traced models together, by the settings of a fusion."""
    profiles = profile_models(
        graphs,
        data,
        alignment_samples=config.alignment_samples,
        matching_rows=config.matching_rows,
        layer_values=config.layer_values,
        max_inputs=config.profile_inputs,
        moments=moments,
        seed=config.seed,
        progress=progress,
    )
    if config.importance == config.layer_weights == "uniform":
        return profiles
    return [_with_importance(one, data, config, progress) for one in profiles]


def _with_importance(
    profile: ModelProfile, data: Data, config: FusionConfig, progress: Progress | None
) -> ModelProfile:
    graph, count = profile.traced, config.profile_inputs
    products = sensitivity = None
    if "sensitivity" in (config.importance, config.layer_weights):
        products = sensitivities(graph, data, max_inputs=count, progress=progress)
        if config.layer_weights == "sensitivity":
            sensitivity = layer_sensitivities(graph, products)
    importance = channel_importance(
        graph, data, config.importance, max_inputs=count, progress=progress, products=products
    )
    return replace(profile, importance=importance, sensitivity=sensitivity)


def fuse_aligned(
    pair: AlignedPair,
    data: Data,
    *,
    config: FusionConfig | None = None,
    into: TracedModel | None = None,
    progress: Progress | None = None,
) -> FusionResult:
    """Do the second half of :func:`fuse`: match channels, average and calibrate.

    ``into`` is the traced module whose architecture the result is to have. Where both profiles
    have moments, REPAIR takes them from there.
    """
    config = config or FusionConfig()
    clock = _Clock(_device(pair.deep), pair.timings, pair.peak_memory)
    with clock.stage("balance"):
        if into is not None:
            _check_outputs(pair.deep.traced, into)
        balanced = balance(
            pair.deep,
            pair.shallow,
            pair.alignment,
            data,
            deep_is_first=pair.deep_is_first,
            how=config.balance,
            merge=config.merge,
            width=config.width,
            into=into,
            profile=lambda graph: profiled([graph], data, config)[0],
            seed=config.seed,
        )
        both = _with_equal_heads(balanced, config)
    target = both.target.traced
    # The share of the network that gives the structure, which the stages below call the deep one.
    deep_weight = config.weight if both.target_is_deep != pair.deep_is_first else 1 - config.weight
    with clock.stage("match"):
        plan = lifting(target, both.source.traced, both.partner, both.target_only_layers)
        if not target.united_heads and set(both.partner) >= set(range(len(plan.shallow.layers))):
            check_lifted(plan)
        metric: ActivationCost = "correlation"
        if config.channel_cost == "euclidean":
            metric = "euclidean"
        warn_of_counted_channels(plan)
        plan, source, orders = order_heads(plan, both.target, both.source, metric=metric)
        target_plans: list[Tensor | None] | None = None
        if config.solver == "zip":
            plans, target_plans = zip_plans(plan, both.target, source, budget=config.zip_budget)
        else:
            plans = channel_plans(plan, both.target, source, config)
        classifier = None
        if config.match_classifier:
            cost = classifier_costs(both.target, source, metric=metric)
            (solution,) = solve_transport([cost], solver=config.solver, epsilon=config.epsilon)
            classifier = solution.plan

    deep_shares = MergeWeights(deep_weight)
    if config.layer_weights == "sensitivity":
        deep_shares = layer_shares(plan, deep_weight, both.target.sensitivity, source.sensitivity)

    def average(shares: MergeWeights) -> dict[str, Tensor]:
        return blend(
            plan,
            plans,
            shares,
            normalisation=config.normalisation,
            classifier=classifier,
            target_plans=target_plans,
        )

    with clock.stage("blend"):
        state = average(deep_shares)
    lean: float | None = None
    with clock.stage("calibrate"):
        if config.calibration == "repair":
            observed = None
            if both.target.moments is not None and source.moments is not None:
                observed = both.target.moments, source.moments
            state = repair(
                plan,
                plans,
                state,
                data,
                deep_shares=deep_shares,
                target_plans=target_plans,
                observed=observed,
                progress=progress,
            )
        elif config.calibration == "least_squares":
            state, lean = regress_leaning(
                [
                    Parent(plan, plans, deep_shares.rest()),
                    frame_as_parent(target, deep_shares),
                ],
                lambda shares: average(shares[-1]),
                data,
                lean=config.lean,
                seed=config.seed,
                progress=progress,
            )
        model = with_state(target.model, state, target)
        if config.calibration == "batchnorm":
            reset_batchnorm(model, data, target.example_inputs, target.keywords)
    return FusionResult(
        model,
        pair,
        plan,
        tuple(plans),
        lean,
        config,
        clock.seconds,
        clock.peak_memory,
        None if target_plans is None else tuple(target_plans),
        _pair_shares(pair, balanced.source, plan, deep_shares.of_units(plan)),
        orders,
    )


def _with_equal_heads(both: Balanced, config: FusionConfig) -> Balanced:
    """Unite the blocks (attention heads) of which the two networks have different numbers."""
    target, source = unite_heads(both.target, both.source, both.partner)
    if target.traced.united_heads and config.solver == "zip":
        one, other = target.traced.united_heads[0], source.traced.united_heads[0]
        raise StructureError(
            "solver 'zip' needs equally many attention heads; "
            f"{target.traced.layers[one.layer].name!r} has {one.count} and "
            f"{source.traced.layers[other.layer].name!r} {other.count}: use solver='auto'"
        )
    return replace(both, target=target, source=source)


def _pair_shares(
    pair: AlignedPair, source: ModelProfile, plan: Correspondence, of_units: Sequence[float]
) -> dict[tuple[int, int], float]:
    """Return the deep network's share of each matched pair, for those of the plan's layers.

    ``source`` is the network that was brought to the other's frame: one of the pair's, or a made
    one that stands for it.
    """
    pairs = pair.alignment.pairs
    of_partner = {k: one for one, k in zip(of_units, plan.partner, strict=True) if k >= 0}
    if source is pair.shallow:
        return {(i, k): of_partner[k] for i, k in pairs if k in of_partner}
    if source is pair.deep:
        return {(i, k): 1.0 - of_partner[i] for i, k in pairs if i in of_partner}
    return {(i, k): 1.0 - of_units[k] for i, k in pairs}  # layers merged away


def channel_plans(
    plan: Correspondence, target: ModelProfile, source: ModelProfile, config: FusionConfig
) -> list[Tensor | None]:
    """Match the channels of every group; None where the source has no such channels."""
    solver, epsilon = config.solver, config.epsilon
    metric: ActivationCost = "euclidean" if config.channel_cost == "euclidean" else "correlation"
    masses = None
    if config.importance != "uniform":
        masses = marginals(plan, target.importance, source.importance)
    by_weights = partial(match_by_weights, plan, masses=masses, solver=solver, epsilon=epsilon)
    if config.channel_cost == "weight":
        return by_weights()
    costs = activation_costs(plan, target, source, metric=metric)
    if config.channel_cost == "dual":
        return by_weights(activation_costs=costs)
    # Channels that no layer reads, as those between the layers of an LSTM, show by their weights.
    unseen = {i for i, cost in enumerate(costs) if cost is not None and not bool(cost.any())}
    known, pairs_of_blocks = head_plans(
        plan, target, source, metric=metric, solver=solver, epsilon=epsilon
    )
    in_heads = {index for one in plan.deep.united_heads for index in one.groups}
    wanted = [
        i
        for i, cost in enumerate(costs)
        if cost is not None and i not in unseen and i not in in_heads
    ]
    pairs = None if masses is None else [pair for i in wanted if (pair := masses[i]) is not None]
    solutions = solve_transport(
        [cost for i in wanted if (cost := costs[i]) is not None],
        None if pairs is None else [of_source for of_source, _ in pairs],
        None if pairs is None else [of_target for _, of_target in pairs],
        solver=solver,
        epsilon=epsilon,
    )
    known |= {i: one.plan for i, one in zip(wanted, solutions, strict=True)}
    if unseen:
        return by_weights(known=known, head_pairs=pairs_of_blocks)
    return [known.get(i) for i in range(len(costs))]


class _Clock:
    """Measure the stages: seconds, and on a GPU how much memory PyTorch held there at the most."""

    def __init__(
        self,
        device: torch.device | None,
        seconds: Mapping[str, float] | None = None,
        peak_memory: Mapping[str, int] | None = None,
    ) -> None:
        self.seconds = dict(seconds or {})
        self.peak_memory = dict(peak_memory or {})
        self._gpu = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        start = time.perf_counter()
        yield
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)  # what is queued belongs to this stage
            self.peak_memory[name] = torch.cuda.max_memory_allocated(self._gpu)
        self.seconds[name] = time.perf_counter() - start


def _to(
    inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor], device: torch.device
) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: value.to(device) for name, value in inputs.items()}
    return tuple(value.to(device) for value in inputs)


def traced_to_fuse(
    name: str,
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    config: FusionConfig,
) -> TracedModel:
    """Trace a model and refuse what no pair could use; errors call it the ``name`` model."""
    try:
        graph = trace(model, example_inputs, verify=config.verify, seed=config.seed)
    except InputError as error:
        raise InputError(f"the {name} model: {error}") from error
    for group in graph.groups:
        if group.size > MAX_CHANNELS:
            size = group.size
            raise InputError(
                f"the {name} model's {group.name!r} has {size} channels; matching them "
                f"would take about {16 * size * size / 1e9:.1f} GB. Layers of up to "
                f"{MAX_CHANNELS} channels are supported"
            )
    if not graph.layers:
        raise StructureError(f"the {name} model has no layer with weights")
    return graph


def traced_template(
    into: nn.Module,
    like: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    device: str | torch.device | None = None,
) -> TracedModel:
    """Trace a copy of the module that gives the result its architecture.

    It gets the type, the place and the mode (train or eval) of ``like``, one of those to be fused.
    """
    known = next((one for one in like.parameters() if one.is_floating_point()), torch.empty(0))
    if device is not None:
        example_inputs = _to(example_inputs, torch.device(device))
    try:
        module = copied(into).to(known.device if device is None else device, known.dtype)
        return trace(module.train(like.training), example_inputs)
    except ClafusionError as error:
        raise type(error)(f"into: {error}") from error


@dataclass(frozen=True)
class _Fit:
    """How two models that can be fused fit together.

    ``allowed`` are the pairs of layers that can match, ``needs_gaps`` tells whether layers of both
    must go unmatched.
    """

    deep_is_first: bool
    allowed: NDArray[np.bool_]
    needs_gaps: bool


def _fit(first: TracedModel, second: TracedModel) -> _Fit:
    """Say which of two models is the deep one, after checking that they can be fused at all."""
    _check_outputs(first, second)
    deep_is_first = len(first.layers) >= len(second.layers)
    deep, shallow = (first, second) if deep_is_first else (second, first)
    allowed = allowed_pairs(deep, shallow)
    return _Fit(deep_is_first, allowed, _needs_gaps(deep, shallow, allowed))


def _check_outputs(first: TracedModel, second: TracedModel) -> None:
    if first.outputs != second.outputs:
        shown = [
            ", ".join(f"{('batch', *shape)} {dtype}" for shape, dtype in one.outputs)
            for one in (first, second)
        ]
        raise StructureError(
            f"the models have different outputs: {shown[0]} and {shown[1]}. Only models with the "
            "same inputs and outputs can be fused"
        )


def _needs_gaps(deep: TracedModel, shallow: TracedModel, allowed: NDArray[np.bool_]) -> bool:
    """Say whether layers of both networks must go unmatched.

    Where no alignment exists at all, say by name which layers stand in the way, before anything
    takes long.
    """
    costs, skip = np.where(allowed, 0.0, np.inf), skip_costs(deep)
    try:
        align_layers(costs, skip=skip)
        return False
    except AlignmentError:
        pass
    try:
        align_layers(costs, skip=skip, skip_shallow=gap_costs(deep, shallow, costs))
        return True
    except AlignmentError as error:
        stuck, k = error.reached_deep, error.reached_shallow
        reasons = []
        if k < len(shallow.layers):
            layer = shallow.layers[k]
            if not allowed[:, k].any():
                reasons.append(
                    f"layer {layer.name!r} of the shallower model has no counterpart of its "
                    "structure (operations, kernel sizes, strides, stage) in the deeper one"
                )
            else:
                names = [deep.layers[i].name for i in np.flatnonzero(allowed[:, k])]
                reasons.append(
                    f"layer {layer.name!r} of the shallower model could only match "
                    f"{', '.join(map(repr, names[:4]))}, which comes too early or is taken"
                )
        if stuck < len(deep.layers) and not deep.layers[stuck].insertable:
            reasons.append(
                f"layer {deep.layers[stuck].name!r} of the deeper model has no partner, and nothing "
                "that leaves the function as it is can stand in for it"
            )
        raise StructureError(
            f"the models ({len(deep.layers)} and {len(shallow.layers)} layers) cannot be brought to "
            f"one structure: {'; '.join(reasons) or error}. Inspect both with clafusion.trace or "
            "'clafusion inspect'"
        ) from error
