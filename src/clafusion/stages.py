"""What all ways to fuse share: checked arguments, traced and profiled parents, clocks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clafusion.alignment.models import label
from clafusion.assessment.parts import most_assessed, num_kept
from clafusion.config import (
    GRAPH_ROWS,
    Barycentre,
    FusionConfig,
    Iterative,
    LeastSquares,
    Like,
    ManyToOne,
    NoCalibration,
    Orthogonal,
    Strategy,
)
from clafusion.errors import (
    ClafusionError,
    DataError,
    InputError,
    PinnedWarning,
    StructureError,
    kind_of,
    retold,
    warn,
)
from clafusion.execution.call import usable_device
from clafusion.execution.heap import freed_memory, give_back, held_by_process
from clafusion.interop.inputs import example_of
from clafusion.matching.activation_costs import MAX_CHANNELS
from clafusion.presets import preset_of
from clafusion.profiling.batches import Data, Progress
from clafusion.profiling.importance import (
    channel_importance,
    layer_sensitivities,
    sensitivities,
)
from clafusion.profiling.profile import ModelProfile, Observer, profile_models
from clafusion.profiling.thinning import thinned
from clafusion.settings import overridden
from clafusion.tracing.copies import copied
from clafusion.tracing.known_proofs import KnownProofs
from clafusion.tracing.model import TracedModel
from clafusion.tracing.pinned import movable_share
from clafusion.tracing.rotatable import folded_state
from clafusion.tracing.rotations import find_rotatable
from clafusion.tracing.rows import mixing_operation
from clafusion.tracing.trace import trace
from clafusion.weights.build import with_weights
from clafusion.weights.factories import Model, ModelFile, keep_origin
from clafusion.weights.mapped import FileWeights

__all__ = [
    "Clock",
    "ExampleInputs",
    "check_strategy",
    "config_from",
    "expected_work",
    "merge_weights",
    "named_models",
    "needs_moments",
    "placed",
    "prepared",
    "profile_options",
    "profile_traced",
    "traced_parent",
    "traced_template",
    "warn_of_pinned_channels",
    "with_norms_folded",
]

_MOVABLE = 0.5  # of all weights: where fewer can move, a warning says so

ExampleInputs: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"
"""What a model is traced with: one input, several positional ones, or keyword inputs.

Each is a tensor, or a list or mapping of tensors.
"""


def profile_traced(
    models: Sequence[TracedModel],
    data: Data,
    config: FusionConfig,
    progress: Progress | None = None,
    names: Sequence[str] = (),
    *,
    spill: bool = False,
    most_rows: int | None = None,
    observe: Observer | None = None,
) -> list[ModelProfile]:
    """Profile traced models in one pass, with all that the options of a fusion need of them.

    Errors call the models by ``names``, where they are given. ``spill``, ``most_rows`` and
    ``observe`` are those of :func:`clafusion.profiling.profile.profile_models`.
    """
    options = config.profiling
    profiles = profile_models(
        models,
        data,
        alignment_samples=options.alignment_samples,
        matching_rows=options.matching_rows,
        layer_values=options.layer_values,
        max_inputs=options.inputs,
        moments=needs_moments(config),
        seed=config.seed,
        progress=progress,
        called=[label(name) for name in names],
        spill=spill,
        most_rows=most_rows,
        observe=observe,
        graph_rows=GRAPH_ROWS.get(config.matching.cost, ""),
    )
    if config.matching.importance == config.merging.layer_weights == "uniform":
        return profiles
    return [_with_importance(one, data, config, progress) for one in profiles]


def needs_moments(config: FusionConfig) -> bool:
    """Say whether a fusion needs the parents' statistics."""
    is_barycentre = isinstance(config.merging.strategy, Barycentre)
    return config.used_calibration.needs_moments or (
        is_barycentre and isinstance(config.used_calibration, LeastSquares)
    )


def profile_options(config: FusionConfig) -> dict[str, Any]:
    """Return all options on which a profile depends, as plain data."""
    return {
        "profiling": config.profiling.to_dict(),
        "importance": config.matching.importance,
        "layer_weights": config.merging.layer_weights,
        "moments": needs_moments(config),
        "graph_rows": GRAPH_ROWS.get(config.matching.cost, ""),
        "held_out": 0.0 if config.assessment.outputs == "none" else config.assessment.held_out,
        "seed": config.seed,
        "verify": config.verify,
    }


def _with_importance(
    profile: ModelProfile, data: Data, config: FusionConfig, progress: Progress | None
) -> ModelProfile:
    model, count = profile.traced, config.profiling.inputs
    products = sensitivity = None
    if "sensitivity" in (config.matching.importance, config.merging.layer_weights):
        products = sensitivities(model, data, max_inputs=count, progress=progress)
        if config.merging.layer_weights == "sensitivity":
            sensitivity = layer_sensitivities(model, products)
    importance = channel_importance(
        model,
        data,
        config.matching.importance,
        max_inputs=count,
        progress=progress,
        products=products,
    )
    return replace(profile, importance=importance, sensitivity=sensitivity)


# --- arguments ----------------------------------------------------------------------------------


def config_from(
    config: FusionConfig | None, overrides: Mapping[str, Any], keywords: Sequence[str] = ()
) -> FusionConfig:
    """Return a configuration with some of its fields given anew, as :func:`clafusion.fuse` does.

    ``preset`` among them stands for all others, from a preset: see :mod:`clafusion.presets`.
    ``keywords`` are the caller's other arguments, which an error may suggest, too.

    Raises
    ------
    InputError
        A field is unknown or out of its range.
    """
    overrides = dict(overrides)
    if "preset" in overrides:
        if config is not None:
            raise InputError("preset and config are both whole configurations: give one of them")
        config = preset_of(overrides.pop("preset"))
    return overridden(FusionConfig, config, overrides, (*keywords, "preset"))


def expected_work(count: int, config: FusionConfig, models: int = 2) -> dict[str, int]:
    """Return what each stage will have reported when it ends, in their order.

    That is so many models of ``"trace"``, 1 of ``"match"``, and of all others so many of ``count``
    inputs.

    It is a guess before the models are traced: of models that admit one batch size only nothing is
    held out, and least squares takes fewer inputs where memory is short.
    """
    kept = num_kept(count, config.assessment)
    held_out = count - kept
    profiled = min(kept, config.profiling.inputs or kept)
    calibration = config.used_calibration
    samples = calibration.samples if isinstance(calibration, LeastSquares) else kept
    found = {"trace": models, "profile": profiled}
    if {config.matching.importance, config.merging.layer_weights} != {"uniform"}:
        found["importance"] = profiled
    found |= {"match": 1}
    if not isinstance(calibration, NoCalibration):
        found["calibrate"] = min(kept, samples)
    if config.assessment.outputs != "none":
        found["assess"] = min(held_out or count, most_assessed(held_out=held_out > 0))
    return found


def named_models(models: Sequence[Model] | Mapping[str, Model], least: int = 2) -> dict[str, Model]:
    """Return the models, ``least`` or more, by what errors and tables call them."""
    wanted = "at least two networks" if least > 1 else "networks, at least one"
    if isinstance(models, nn.Module) or not isinstance(models, (Sequence, Mapping)):
        raise InputError(f"models must be a list or a mapping of {wanted}; got {kind_of(models)}")
    if isinstance(models, Mapping):
        for name in models:
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise InputError(f"models: a name must be text on one line; got {name!r}")
        named = dict(models)
    else:
        named = {f"models[{i}]": one for i, one in enumerate(models)}
    for name, model in named.items():
        if not isinstance(model, (nn.Module, ModelFile)):
            is_path = isinstance(model, (str, os.PathLike))
            hint = ": read it by clafusion.load" if is_path else ""
            raise InputError(
                f"{label(name)} must be a torch.nn.Module or a clafusion.ModelFile; got "
                f"{kind_of(model)}{hint}"
            )
    if len(named) < least:
        raise InputError(f"models must be {wanted}; got {len(named)}")
    return named


def merge_weights(
    weights: Sequence[float] | Mapping[str, float] | None, names: Sequence[str]
) -> tuple[float, ...]:
    """Return each model's weight; they add up to 1.

    Raises
    ------
    InputError
        The weights do not fit the models, are negative or all 0.
    """
    if weights is None:
        return (1.0 / len(names),) * len(names)
    keys: Sequence[int | str] = range(len(names))
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in names]
        missing = [name for name in names if name not in weights]
        if unknown or missing:
            what = f"unknown {unknown[0]!r}" if unknown else f"none for {missing[0]!r}"
            raise InputError(f"weights must have one entry for each model; {what}")
        weights, keys = [weights[name] for name in names], names
    if isinstance(weights, (Tensor, np.ndarray)) and weights.ndim == 1:
        weights = weights.tolist()
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise InputError(f"weights must be a list of numbers; got {weights!r}")
    if len(weights) != len(names):
        raise InputError(
            f"weights must have one entry for each model, {len(names)}; got {len(weights)}"
        )
    for key, one in zip(keys, weights, strict=True):
        is_number = isinstance(one, Real) and not isinstance(one, bool)
        if not (is_number and 0 <= one < float("inf")):
            raise InputError(f"weights[{key!r}] must be a number of at least 0; got {one!r}")
    largest = float(max(weights))
    if not largest > 0:
        raise InputError(f"weights must not be all 0; got {list(weights)}")
    given = [float(one) for one in weights]
    if math.isinf(sum(given)):
        given = [one / largest for one in given]
    return tuple(one / sum(given) for one in given)


def check_strategy(strategy: Strategy, count: int) -> None:
    """Refuse a strategy by which aligned models cannot be fused.

    Raises
    ------
    InputError
        The strategy is the caller's own, or aligns more than two models one after another.
    """
    if not isinstance(strategy, (ManyToOne, Iterative, Barycentre)):
        raise InputError(
            f"merging.strategy={strategy.name!r} is unknown: strategies of your own are not "
            "supported. Take 'many_to_one', 'iterative' or 'barycentre'"
        )
    if isinstance(strategy, Iterative) and count > 2:
        raise InputError(
            f"merging.strategy='iterative' aligns each model with what came of those before, but "
            f"these {count} are aligned already: call clafusion.fuse with the models, or take "
            "'many_to_one'"
        )


def placed(
    models: Mapping[str, Model],
    data: Data,
    example_inputs: ExampleInputs | None,
    device: str | torch.device | None,
) -> tuple[dict[str, Model], ExampleInputs]:
    """Return the models, and the inputs to trace them with, on a device; None: where they are.

    Raises
    ------
    InputError
        The device cannot be used here, a model cannot be copied, or the data have no first batch.
    """
    if example_inputs is None:
        example_inputs = example_of(data, next(iter(models.values())))
    if device is None:
        return dict(models), example_inputs
    usable = usable_device(device)
    copies: dict[str, Model] = {name: _copied_to(name, one, usable) for name, one in models.items()}
    return copies, _moved_to(example_inputs, usable)


def _copied_to(name: str, model: Model, device: torch.device) -> nn.Module:
    """Return a copy of a model on a device; errors name the model."""
    try:
        if isinstance(model, ModelFile):
            return model.load().to(device)
        return keep_origin(copied(model), model).to(device)
    except InputError as error:
        raise InputError(f"{label(name)}: {error}") from error


def _moved_to(inputs: ExampleInputs, device: torch.device) -> ExampleInputs:
    """Return example inputs on a device."""
    moved: ExampleInputs = tree_map(
        lambda one: one.to(device) if isinstance(one, Tensor) else one, inputs
    )
    return moved


def traced_parent(
    name: str,
    model: Model,
    example_inputs: ExampleInputs,
    config: FusionConfig,
    proofs: KnownProofs | None = None,
) -> TracedModel:
    """Trace a model and refuse what no fusion could use; errors name the model.

    Of a :class:`clafusion.ModelFile` the weights stay in the file. ``proofs`` are those of
    :func:`clafusion.trace`.

    Raises
    ------
    InputError, UnsupportedOpError, GraphVerificationError
        As for :func:`clafusion.trace`.
    InputError
        Its outputs have no rows.
    StructureError
        The model has no layer with weights.
    """
    try:
        module, mapped = model.open() if isinstance(model, ModelFile) else (model, None)
        traced = trace(
            module, example_inputs, verify=config.verify, seed=config.seed, proofs=proofs
        )
    except ClafusionError as error:
        raise retold(error, f"{label(name)}: {error}") from error.__cause__
    if mapped:
        weights = FileWeights(traced.module_state(), mapped)
        weights.drop()
        traced = replace(traced, weights=weights)
    traced = prepared(traced, config)
    for group in traced.groups:
        if group.size > MAX_CHANNELS:
            raise InputError(
                f"{label(name)}: {group.name!r} has {group.size} channels; matching them would "
                f"take about {16 * group.size * group.size / 1e9:.1f} GB. Layers of up to "
                f"{MAX_CHANNELS} channels are supported"
            )
    if not traced.layers:
        raise StructureError(f"{label(name)} has no layer with weights")
    if not traced.keeps_rows:
        raise InputError(
            f"{label(name)} puts out no row for each row of its inputs, whose first axis must be "
            "the batch. If its batch is another axis (batch_first=False), wrap it in a module that "
            "transposes inputs and outputs; if it returns a loss, let it return its outputs"
        )
    if traced.mixes_rows:
        raise InputError(
            f"{label(name)}: the rows of its inputs see each other ({mixing_operation(traced)} "
            "is the first where they do), so that its outputs depend on which rows come together. "
            "The first axis must be the batch: give it an axis more in front, of such sets of "
            "rows, or fuse the part that treats each row alone"
        )
    return traced


def prepared(traced: TracedModel, config: FusionConfig) -> TracedModel:
    """Return a model as a fusion runs it: norms folded, the last layer thinned, where that is."""
    return thinned(with_norms_folded(traced, config))


def with_norms_folded(traced: TracedModel, config: FusionConfig) -> TracedModel:
    """Return a model whose streams can be rotated, where the solver rotates them."""
    if not isinstance(config.matching.solver, Orthogonal) or traced.rotatable is not None:
        return traced
    groups = find_rotatable(traced, seed=config.seed).groups
    if not groups:
        return replace(traced, rotatable=())
    folded = with_weights(traced, folded_state(traced.state(), groups))
    return replace(folded, rotatable=groups)


def traced_template(
    config: FusionConfig, like: Model, example_inputs: ExampleInputs
) -> TracedModel:
    """Trace a copy of the module that gives the result its structure.

    It gets the type, the place and the mode (train or eval) of ``like``, one of those to be fused.

    Raises
    ------
    InputError
        The template is no module.
    ClafusionError
        As for :func:`clafusion.trace`.
    """
    target = config.target
    assert isinstance(target, Like)
    if not isinstance(target.template, nn.Module):
        raise InputError(
            "target.template must be a torch.nn.Module of the wanted structure; got "
            f"{target.template!r}"
        )
    if isinstance(like, ModelFile):
        like, _ = like.open()
    known = next((one for one in like.parameters() if one.is_floating_point()), torch.empty(0))
    try:
        module = copied(target.template).to(known.device, known.dtype)
        module.train(like.training)
        traced = trace(module, example_inputs, verify=config.verify, seed=config.seed)
        return prepared(traced, config)
    except DataError as error:  # the models take the data: the fault is the template's
        raise InputError(f"target.template: {error}") from error.__cause__
    except ClafusionError as error:
        raise retold(error, f"target.template: {error}") from error.__cause__


def warn_of_pinned_channels(
    names: Sequence[str], models: Sequence[TracedModel], weights: Sequence[float]
) -> None:
    """Warn where several models count, and have channels that keep their places.

    Warns
    -----
    PinnedWarning
        The message names the channels, and the operations at which the analysis loses them; and
        how much of a model can move, where that is less than half of its weights.
    """
    counting = [
        (name, one) for name, one, weight in zip(names, models, weights, strict=True) if weight > 0
    ]
    found: dict[str, list[str]] = {}
    for name, one in counting:
        for pinned in one.pinned:
            found.setdefault(str(pinned), []).append(label(name))
    if len(counting) < 2 or not found:
        return
    shown = [f"{pinned} in {' and '.join(whose)}" for pinned, whose in found.items()]
    more = f"; and {len(shown) - 3} more" if len(shown) > 3 else ""
    shares = [(name, movable_share(one)) for name, one in counting if one.pinned]
    few = ", ".join(f"{share:.0%} of {label(name)}" for name, share in shares if share < _MOVABLE)
    warn(
        f"channels that cannot be matched are averaged in the order in which they stand: "
        f"{'; '.join(shown[:3])}{more}. That suits only networks that were trained from one start"
        + (f". Of all weights only these can move: {few}" if few else ""),
        PinnedWarning,
    )


# --- clocks -------------------------------------------------------------------------------------


class Clock:
    """Measure the stages: seconds, and how much memory was held at the most.

    On a GPU that is what PyTorch held there. Elsewhere it is what the process held. The system
    knows the most that the process ever held: exact for the stage that raised it, while of another
    stage only what was held at its beginning or its end is known.

    Parameters
    ----------
    device
        Where the stages run.
    seconds, peak_memory
        What earlier stages took.
    keeps_memory
        Whether memory that is freed in a stage stays for what comes next. Else all goes back, so
        that a limit is kept.
    """

    def __init__(
        self,
        device: torch.device | None,
        seconds: Mapping[str, float] | None = None,
        peak_memory: Mapping[str, int] | None = None,
        *,
        keeps_memory: bool = True,
    ) -> None:
        self.seconds = dict(seconds or {})
        self.peak_memory = dict(peak_memory or {})
        self._keeps_memory = keeps_memory
        self._gpu = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs in here, and call it ``name``."""
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
            before = most = 0
        else:
            before, most = held_by_process()
        start = time.perf_counter()
        with freed_memory(stays=self._keeps_memory):
            yield
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)  # what is queued belongs to this stage
            self.peak_memory[name] = torch.cuda.max_memory_allocated(self._gpu)
        self.seconds[name] = time.perf_counter() - start
        if self._gpu is None:
            now, most_since = held_by_process()
            self.peak_memory[name] = max(before, now, most_since if most_since > most else 0)
            if self._keeps_memory:
                give_back()
            else:
                give_back(0)

    def add(self, other: Clock) -> None:
        """Add what another clock measured: the seconds of each stage, and the more memory."""
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            most = self.peak_memory.get(name, 0), other.peak_memory[name]
            self.peak_memory[name] = max(most)
