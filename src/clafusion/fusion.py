"""The main job: the stages in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment.models import AlignedModels, align_models, check_models, label
from clafusion.assessment.combining import chosen_combination, observer_of_outputs
from clafusion.assessment.evaluation import checked_labels
from clafusion.assessment.output_cache import LARGE_CACHE, OutputCache
from clafusion.assessment.parts import parts_of
from clafusion.calibration.methods import calibrate
from clafusion.calibration.outputs import KnownOutputs
from clafusion.config import (
    Barycentre,
    Deeper,
    FusionConfig,
    Iterative,
    Like,
    Shallower,
)
from clafusion.errors import InputError, check_callable
from clafusion.execution.call import device_of, usable_device
from clafusion.interop.inputs import example_of, readable
from clafusion.interop.vocabulary import (
    check_vocabulary,
    keep_own_entries,
    with_one_vocabulary,
)
from clafusion.memory import bytes_of, check_limit, check_weights, needed_memory
from clafusion.merging.layer_weights import weigh_layers
from clafusion.merging.left_out import left_out_parameters, warn_of_left_out
from clafusion.merging.problem import FusionProblem
from clafusion.merging.widths import warn_of_uneven_widths
from clafusion.problems import (
    matched_with_mean,
    prepared_sources,
    problem_of,
    with_merge_weights,
)
from clafusion.profiling.batches import PROGRESS, Data, Progress, rows_side_by_side
from clafusion.profiling.profile import ModelProfile
from clafusion.profiling.spilled import close_rows
from clafusion.profiling.thinning import alike
from clafusion.quality import assessed, hash_of
from clafusion.results import FusionResult
from clafusion.shared_trunk.fuse import fuse_with_branches
from clafusion.shared_trunk.tasks import check_classes
from clafusion.stages import (
    Clock,
    ExampleInputs,
    check_strategy,
    config_from,
    merge_weights,
    named_models,
    placed,
    prepared,
    profile_traced,
    traced_parent,
    traced_template,
    warn_of_pinned_channels,
)
from clafusion.targets.completed import completed_models
from clafusion.targets.sources import sources_of
from clafusion.targets.target import choose_target, width_position
from clafusion.tracing.copies import copied
from clafusion.tracing.model import TracedModel
from clafusion.tracing.trace import trace
from clafusion.weights.factories import Model
from clafusion.weights.storage import InFiles

__all__ = ["align", "align_profiles", "fuse", "fuse_aligned", "profile"]


def fuse(
    models: Sequence[Model] | Mapping[str, Model],
    data: Data,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    config: FusionConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    memory_limit: int | str | None = None,
    labels: Any = None,
    vocabulary: str = "same",
    progress: Progress | None = None,
    **overrides: Any,
) -> FusionResult:
    r"""Fuse trained networks of different depth and width into one, without training.

    The layers of the networks are aligned (CLAFusion, arXiv 2110.15538), every network is brought
    to one structure, its channels are matched by optimal transport (OTFusion, arXiv 1910.05653),
    the weights are averaged,

    .. math:: \tilde W = \sum_p w_p\, T_{out,p}^\top W_p\, T_{in,p},

    and what averaging loses is restored by a calibration. No model is modified.

    Parameters
    ----------
    models
        Two or more trained networks with the same inputs and outputs: a list, or a mapping with
        names, which then appear in every table and error. Of a :class:`clafusion.ModelFile` the
        weights stay in the file until an operation needs them, one at a time: no copy of the model
        is held.
    data
        Unlabelled inputs as the models were trained on: a tensor, a list of batches or a
        DataLoader (labels are ignored). A few hundred are enough. Every tenth input is kept out of
        the fusion, and the result is assessed on it: see :class:`clafusion.Assessment`.
    weights
        Each model's weight, not negative; they are divided by their sum. For a mapping of models a
        mapping, too, or in the same order. Default: equal.
    config
        The options; see :class:`clafusion.FusionConfig`.
    example_inputs
        Inputs to trace the models with; default the first batch of ``data``. Give a mapping for
        models that take keyword inputs, a tuple for several positional ones.
    device
        Where to compute; default where the models are.
    memory_limit
        How much memory the process may take, as ``"6GB"`` or in bytes; default no limit. Then
        weights are read from files, or made, when an operation needs them, and the averaged and
        calibrated ones are kept in temporary files (``TMPDIR`` says where), from which the result's
        parameters are mapped. The result has the same bytes as without a limit. See
        :func:`clafusion.estimate` for what a fusion needs.
    labels
        One for each row of ``data``, as for :func:`clafusion.evaluate`. The fusion makes no use of
        them: accuracy and loss of result and parents are measured, on the inputs that it has not
        seen. See ``FusionResult.evaluation``.
    vocabulary
        What is done about Hugging Face networks whose tokenizers have other entries: ``"same"``
        refuses them; ``"intersection"`` moves the rows of common entries, by the numbers of the
        first model, whose tokenizer the data must be made by, and keeps its rows of all others.
    progress
        Called with the stage's name and the number of inputs it has seen; of ``"trace"`` the number
        of models, of ``"match"`` 1 at its end.
    overrides
        Any field of ``config``: ``calibration="repair"``, ``target=Shallower()``,
        ``matching=Matching(solver="exact")``. A string stands for a value with its defaults.
        ``preset="fast"``, ``"accurate"`` or ``"paper"`` stands for a whole configuration, in which
        the other fields here are replaced: see the page Options.

    Returns
    -------
    FusionResult
        With the fused model as ``.model``.

    Raises
    ------
    InputError
        An option, a model's weights or the data are unusable, or ``memory_limit`` is less than the
        fusion needs; the message says the least that would do.
    UnsupportedOpError, GraphVerificationError
        A model cannot be analysed.
    StructureError, AlignmentError
        The models cannot be brought to one structure.

    Warns
    -----
    WidthWarning, ConvergenceWarning
        See there.
    PinnedWarning
        Channels that cannot be matched are averaged in the order in which they stand.
    AssessmentWarning
        A parent alone comes clearly nearer to what all put out together than the result does.

    Examples
    --------
    >>> result = clafusion.fuse([resnet20, resnet32], images)  # doctest: +SKIP
    >>> result.model(images[:8])  # doctest: +SKIP
    """
    config = config_from(
        config, overrides, ("weights", "example_inputs", "device", "labels", "progress")
    )
    check_callable(progress, "progress", PROGRESS)
    named = named_models(models)
    given = merge_weights(weights, tuple(named))
    data = readable(data, named)
    labels = None if labels is None else checked_labels(labels, data)
    limit = None if memory_limit is None else bytes_of(memory_limit, "memory_limit")
    check_vocabulary(vocabulary)
    if config.outputs == "both" and (limit is not None or vocabulary != "same"):
        what = "memory_limit" if limit is not None else f"vocabulary={vocabulary!r}"
        raise InputError(f"outputs='both' does not go with {what}: leave one out")
    is_stepwise = isinstance(config.merging.strategy, Iterative) and len(named) > 2
    if vocabulary == "intersection" and (limit is not None or is_stepwise):
        what = "memory_limit" if limit is not None else "merging.strategy='iterative'"
        raise InputError(f"vocabulary='intersection' does not go with {what}: leave one out")
    named, own_entries = with_one_vocabulary(named, vocabulary)
    named, example_inputs = placed(named, data, example_inputs, device)
    template = None
    if isinstance(config.target, Like):
        template = traced_template(config, next(iter(named.values())), example_inputs)
    if is_stepwise:
        return _one_after_another(
            named, data, given, config, example_inputs, template, limit, labels, progress
        )
    known = OutputCache(LARGE_CACHE) if limit is None else OutputCache()
    aligned = _aligned(
        named, data, config, example_inputs, progress, limit, spill=True, known_outputs=known
    )
    return fuse_aligned(
        aligned,
        data,
        given,
        config,
        template=template,
        known_outputs=known,
        memory_limit=limit,
        labels=labels,
        own_entries=own_entries,
        progress=progress,
    )


def align(
    models: Sequence[Model] | Mapping[str, Model],
    data: Data,
    config: FusionConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> AlignedModels:
    """Do the first half of :func:`fuse`: trace, profile and align, but fuse nothing.

    Parameters and errors are those of :func:`fuse`.
    """
    config = config_from(config, overrides)
    check_callable(progress, "progress", PROGRESS)
    named = named_models(models)
    data = readable(data, named)
    named, example_inputs = placed(named, data, example_inputs, device)
    return _aligned(named, data, config, example_inputs, progress)


def _aligned(
    named: Mapping[str, Model],
    data: Data,
    config: FusionConfig,
    example_inputs: ExampleInputs,
    progress: Progress | None,
    limit: int | None = None,
    *,
    spill: bool = False,
    known_outputs: OutputCache | None = None,
) -> AlignedModels:
    """Trace, profile and align; with ``spill`` for a fusion that closes the rows at its end.

    What the models put out on inputs on which their result is assessed goes to ``known_outputs``.
    """
    first = next(iter(named.values()))
    device = device_of(first) if isinstance(first, nn.Module) else None
    clock = Clock(device, keeps_memory=limit is None)
    if limit is not None:
        check_weights(limit, named)
    with clock.stage("trace"):
        traced = []
        for name, model in named.items():
            traced.append(traced_parent(name, model, example_inputs, config))
            if progress is not None:
                progress("trace", len(traced))
        traced = completed_models(alike(traced))
    if config.outputs == "both":
        check_classes({label(name): one for name, one in zip(named, traced, strict=True)})
    check_models(tuple(named), traced, config)
    with clock.stage("profile"):
        parts = parts_of(data, traced, config.assessment)
        kept = parts.kept
        if limit is not None:
            count = rows_side_by_side(kept, config.profiling.alignment_samples)
            check_limit(limit, needed_memory(traced, count, config))
        profiles = profile_traced(
            traced,
            kept,
            config,
            progress,
            tuple(named),
            spill=spill,
            most_rows=None if limit is None else limit // 8,
            observe=observer_of_outputs(traced[0], parts, config, known_outputs),
        )
    return align_profiles(tuple(named), profiles, config, clock=clock)


def align_profiles(
    names: Sequence[str],
    profiles: Sequence[ModelProfile],
    config: FusionConfig | None = None,
    *,
    timings: Mapping[str, float] | None = None,
    clock: Clock | None = None,
) -> AlignedModels:
    """Align models that are traced and profiled already; ``timings`` are those of before.

    Raises
    ------
    InputError
        The profiles come from different inputs.
    StructureError, AlignmentError
        The models cannot be brought to one structure.
    """
    config = config or FusionConfig()
    clock = clock or Clock(profiles[0].traced.device, timings)
    with clock.stage("align"):
        aligned = align_models(names, profiles, config)
    return replace(aligned, timings=clock.seconds, peak_memory=clock.peak_memory)


def profile(
    model: nn.Module | TracedModel,
    data: Data,
    config: FusionConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> ModelProfile:
    """Record what a model's layers and channels do on data, in one pass and fixed memory.

    A module is traced first, with ``example_inputs`` or the first batch of ``data``. Errors are
    those of :func:`clafusion.profiling.profile.profile_models`.
    """
    config = config_from(config, overrides)
    check_callable(progress, "progress", PROGRESS)
    data = readable(data, {"": model.model if isinstance(model, TracedModel) else model})
    if not isinstance(model, TracedModel):
        if device is not None:
            model = copied(model).to(usable_device(device))
        example_inputs = example_of(data, model) if example_inputs is None else example_inputs
        model = trace(model, example_inputs, verify=config.verify, seed=config.seed)
    model = prepared(model, config)
    kept = parts_of(data, [model], config.assessment).kept
    return profile_traced([model], kept, config, progress)[0]


def fuse_aligned(
    aligned: AlignedModels,
    data: Data,
    weights: Sequence[float] | None = None,
    config: FusionConfig | None = None,
    *,
    template: TracedModel | None = None,
    known_outputs: OutputCache | None = None,
    data_hash: str | None = None,
    memory_limit: int | None = None,
    labels: Tensor | None = None,
    matched: FusionProblem | None = None,
    own_entries: Tensor | None = None,
    progress: Progress | None = None,
) -> FusionResult:
    """Do the second half of :func:`fuse`: choose the target, match channels, average, calibrate.

    Parameters
    ----------
    aligned
        The models; see :func:`align` and :func:`align_profiles`.
    data, weights, config, memory_limit, labels, progress
        As for :func:`fuse`; the limit in bytes, the labels checked.
    template
        The traced module of a target :class:`clafusion.config.Like` one.
    known_outputs
        What the parents put out in the assessments of earlier fusions.
    data_hash
        The hash of the data, where it is known.
    matched
        The problem of an earlier fusion of the same models with the same target, matching and
        normalisation, to take its plans: they do not depend on the weights. Not for a barycentre.
    own_entries
        Entries of the vocabulary that the first model alone has, and keeps.
    """
    config = config or FusionConfig()
    data = readable(data, {"": aligned.profiles[0].traced.model})
    given = merge_weights(weights, aligned.names)
    check_strategy(config.merging.strategy, len(aligned.names))
    if config.outputs == "both":
        return fuse_with_branches(
            aligned,
            data,
            given,
            config,
            data_hash=data_hash,
            labels=labels,
            progress=progress,
        )
    parents = {name: one.traced for name, one in zip(aligned.names, aligned.profiles, strict=True)}
    parts = parts_of(data, tuple(parents.values()), config.assessment)
    result, own_outputs = _fused(
        aligned,
        parts.kept,
        given,
        config,
        template,
        memory_limit,
        progress,
        matched=matched,
        known_outputs=known_outputs,
    )
    if own_entries is not None:
        keep_own_entries(result.model, result.problem, aligned.names[0], own_entries)
        own_outputs = ()
    result = replace(result, data_hash=data_hash or hash_of(data))
    return assessed(result, parents, parts, progress, known_outputs, labels, own_outputs)


def _fused(
    aligned: AlignedModels,
    data: Data,
    weights: tuple[float, ...],
    config: FusionConfig,
    template: TracedModel | None,
    limit: int | None,
    progress: Progress | None,
    *,
    matched: FusionProblem | None = None,
    known_outputs: OutputCache | None = None,
) -> tuple[FusionResult, KnownOutputs]:
    """Do what :func:`fuse_aligned` does on the part of the data that a fusion may see.

    Returns the result, and what is known of its outputs.
    """
    warn_of_pinned_channels(aligned.names, [one.traced for one in aligned.profiles], weights)
    clock = Clock(
        aligned.profiles[0].traced.device,
        aligned.timings,
        aligned.peak_memory,
        keeps_memory=limit is None,
    )
    rounds, converged = 1, True
    if matched is not None:
        problem = with_merge_weights(matched, weights)
    else:
        with clock.stage("target"):
            chosen = choose_target(aligned, config, template)
            sources = sources_of(chosen, aligned)
        with clock.stage("match"):
            sources = prepared_sources(aligned.names, sources, data, config)
            problem = problem_of(aligned.names, sources, weights, config)
        if isinstance(config.merging.strategy, Barycentre):
            with clock.stage("barycentre"):
                problem, rounds, converged = matched_with_mean(
                    problem, aligned, sources, data, config, config.merging.strategy.max_rounds
                )
    if progress is not None:
        progress("match", 1)
    left_out = left_out_parameters(problem)
    warn_of_left_out(problem, left_out)
    warn_of_uneven_widths(problem)
    close_rows(one.rows for one in aligned.profiles)
    with clock.stage("merge"):
        if config.merging.layer_weights == "sensitivity":
            problem = weigh_layers(problem)
        traced = [one.traced for one in aligned.profiles]
        combination = chosen_combination(traced, weights, data, config, known_outputs)
        problem = replace(problem, combination=combination)
    if limit is not None:
        problem = replace(problem, storage=InFiles())
    with clock.stage("calibrate"):
        outcome = calibrate(
            problem, data, config.used_calibration, seed=config.seed, progress=progress
        )
    _refuse_overflow(outcome.model)
    result = FusionResult(
        model=outcome.model,
        aligned=aligned,
        problem=problem,
        config=config,
        weights=weights,
        anchor=outcome.anchor,
        toward=outcome.toward,
        averaged=outcome.averaged,
        left_out=left_out,
        timings=clock.seconds,
        peak_memory=clock.peak_memory,
        rounds=rounds,
        converged=converged,
    )
    return result, outcome.outputs


def _refuse_overflow(model: nn.Module) -> None:
    """Refuse a result in half precision that cannot hold its weights."""
    for name, one in model.named_parameters():
        if one.dtype is torch.float16 and not bool(torch.isfinite(one).all()):
            raise InputError(
                f"{name!r} of the result is beyond the numbers that float16 holds, the type of the "
                "model that gives the structure: convert all models to bfloat16 or float32"
            )


# --- more than two ------------------------------------------------------------------------------


def _one_after_another(
    named: Mapping[str, Model],
    data: Data,
    weights: tuple[float, ...],
    config: FusionConfig,
    example_inputs: ExampleInputs,
    template: TracedModel | None,
    limit: int | None,
    labels: Tensor | None,
    progress: Progress | None,
) -> FusionResult:
    """Fuse the first two, then what came of it with the third, and so on."""
    names = list(named)
    fused, total = named[names[0]], weights[0]
    called = names[0]
    steps: list[FusionResult] = []
    parents: dict[str, TracedModel] = {}
    for i, (name, weight) in enumerate(zip(names[1:], weights[1:], strict=True), 1):
        total += weight
        part = weight / total if total > 0 else 0.5
        pair = {called: fused, name: named[name]}
        own = _options_of_step(config, names, i)
        aligned = _aligned(pair, data, own, example_inputs, progress, limit, spill=True)
        traced = [one.traced for one in aligned.profiles]
        parents.setdefault(names[0], traced[0])
        parents[name] = traced[1]
        kept = parts_of(data, traced, own.assessment).kept
        step, _ = _fused(aligned, kept, (1.0 - part, part), own, template, limit, progress)
        fused, called = step.model, f"{called}+{name}"
        while called in named:
            called = f"({called})"
        steps.append(step)
    timings: dict[str, float] = {}
    peak_memory: dict[str, int] = {}
    for step in steps:
        for stage, seconds in step.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        for stage, held in step.peak_memory.items():
            peak_memory[stage] = max(peak_memory.get(stage, 0), held)
    parts = parts_of(data, tuple(parents.values()), config.assessment)
    # That of the last step is about what came of the others, and this result is of all of them.
    combination = chosen_combination(list(parents.values()), weights, parts.kept, config)
    result = replace(
        steps[-1],
        problem=replace(steps[-1].problem, combination=combination),
        config=config,
        weights=weights,
        rounds=len(steps),
        left_out=tuple(dict.fromkeys(name for step in steps for name in step.left_out)),
        steps=tuple(steps),
        timings=timings,
        peak_memory=peak_memory,
        data_hash=hash_of(data),
    )
    return assessed(result, parents, parts, progress, None, labels)


def _options_of_step(config: FusionConfig, names: Sequence[str], joining: int) -> FusionConfig:
    """Return the options of the step in which the model at position ``joining`` joins.

    Where one model gives the widths they are its own from when it joins.
    """
    target = config.target
    if not isinstance(target, (Deeper, Shallower)):
        return config
    giver = width_position(names, target.width)
    if giver is None:
        return config
    width = "own" if giver > joining else int(giver == joining)
    return replace(config, target=replace(target, width=width))
