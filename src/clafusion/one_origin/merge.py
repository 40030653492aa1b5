"""The base and its models -> one model: the stages in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from clafusion.config import MergeConfig, MergeMethod, NoCalibration, Sensitivity
from clafusion.errors import InputError, check_callable
from clafusion.execution.call import device_of
from clafusion.execution.heap import held_now
from clafusion.interop.inputs import readable
from clafusion.interop.vocabulary import check_alike
from clafusion.memory import NeededMemory, bytes_of, check_limit
from clafusion.merging.task_vectors import PART
from clafusion.one_origin.calibrated import calibrated, prepared
from clafusion.one_origin.networks import (
    Network,
    check_distances,
    check_same_constants,
    check_same_entries,
    opened,
)
from clafusion.one_origin.parameters import merged_state
from clafusion.one_origin.result import BASE, MergeResult
from clafusion.one_origin.sensitivity import check_tasks, weights_in_layers
from clafusion.profiling.batches import PROGRESS, Data, Progress
from clafusion.profiling.graphs import is_graph
from clafusion.settings import overridden
from clafusion.stages import Clock, ExampleInputs, merge_weights, named_models, placed
from clafusion.tracing.examples import example_tensors
from clafusion.tracing.ties import aliases_of
from clafusion.weights.factories import Model
from clafusion.weights.storage import InFiles, InMemory, Storage

__all__ = ["merge"]

_COPIES = 2  # tensors of the largest size that are made besides those of the networks
_GRADIENTS = 3  # of a whole network: copies, gradients, and their products
_PARTS = 6  # the same of parts in float64, besides three for each model


def merge(
    base: Model,
    models: Sequence[Model] | Mapping[str, Model],
    data: Data | Mapping[str, Data] | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    config: MergeConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    memory_limit: int | str | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> MergeResult:
    r"""Merge models that were trained from one base, by what training has added to its weights.

    Nothing is matched: the channels of such models correspond as they stand. Networks that were
    trained from other starts are what :func:`clafusion.fuse` is for. For the equations see
    :mod:`clafusion.merging.task_vectors`. No model is modified.

    Parameters are merged by the method. Buffers of floating numbers, as the running statistics of
    BatchNorm, get the models' weighted mean, as a scaled sum of changes could make a variance
    negative. Whole numbers have to be the same in the base and all models, but for BatchNorm's
    counters. A model of weight 0 is left out: what is merged is the same as without it.

    Parameters
    ----------
    base
        The network that the models were trained from. Of a :class:`clafusion.ModelFile`, as of a
        Hugging Face directory, one tensor at a time is read.
    models
        One or more models with the base's structure: a list, or a mapping with names.
    data
        Unlabelled inputs, as for :func:`clafusion.fuse`: to calibrate by and to assess the result.
        A mapping gives each model, by its name, inputs of its own task: on these a calibration aims
        at what that model does alone (as RegMean does, arXiv 2212.09849), and else at the models'
        weighted mean. Without data nothing is run, so that any network can be merged.
    weights
        Each model's weight, not negative; they are divided by their sum. Default: equal.
    config
        The options; see :class:`clafusion.MergeConfig`.
    example_inputs, device
        As for :func:`clafusion.fuse`. Without data ``example_inputs`` are what the result is
        exported with where it is saved: see :meth:`clafusion.MergeResult.save`.
    memory_limit
        How much memory the process may take, as ``"6GB"`` or in bytes; default no limit. Then what
        is merged is kept in temporary files, from which the result's parameters are mapped.
    progress
        Called with the stage's name and how far it is; of ``"merge"`` the number of tensors.
    overrides
        Any field of ``config``: ``method="dare"``, ``method=Ties(density=0.1)``,
        ``calibration="repair"``.

    Returns
    -------
    MergeResult
        With the merged model as ``.model``.

    Raises
    ------
    InputError
        An option is unusable; a model lacks an entry, has one more or another shape, another
        vocabulary or other whole numbers than the base, or does not come from it; a calibration
        has no data; the base's type cannot hold the result; or ``memory_limit`` is too small.
    ClafusionError
        With data as for :func:`clafusion.fuse`.

    Examples
    --------
    >>> result = clafusion.merge(base, [maths, code], method="ties")  # doctest: +SKIP
    >>> result.save("merged.safetensors")  # doctest: +SKIP
    """
    config = overridden(
        MergeConfig,
        config,
        overrides,
        ("weights", "example_inputs", "device", "memory_limit", "progress"),
    )
    check_callable(progress, "progress", PROGRESS)
    if data is None and not isinstance(config.calibration, NoCalibration):
        raise InputError(f"calibration={config.calibration.name!r} needs data: give some inputs")
    named = named_models(models, least=1)
    if BASE in named:
        raise InputError(f"models: no model can be called {BASE!r}, as the base is: rename it")
    given = merge_weights(weights, tuple(named))
    every = {BASE: base, **named}
    named_models(every)  # which refuses what is no model
    check_alike(every)
    data = _readable(data, named)
    by_task = isinstance(data, Mapping) and not is_graph(data)
    check_tasks(config, data, by_task=by_task)
    shown = next(iter(data.values())) if isinstance(data, Mapping) else data
    if shown is None and example_inputs is None:
        every, _ = placed(every, (), (), device)
    else:
        every, example_inputs = placed(
            every, () if shown is None else shown, example_inputs, device
        )
    networks = {name: opened(name, one) for name, one in every.items()}
    first, others = networks[BASE], {name: networks[name] for name in named}
    check_same_entries(first, others)
    check_same_constants(first, others)
    storage: Storage = InMemory()
    if memory_limit is not None:
        check_limit(
            bytes_of(memory_limit, "memory_limit"), _needed_memory(first, len(named), config.method)
        )
        storage = InFiles()
    example = None
    if example_inputs is not None:
        example = example_tensors(first.module, example_inputs)
    clock = Clock(device_of(first.module))
    with clock.stage("compare"):
        distances = check_distances(first, others, config.furthest)
    # What a model of weight 0 does says nothing of the result.
    counted = {name: one for name, one in zip(named, given, strict=True) if one > 0}
    of_counted = tuple(counted.values())
    tasks = None
    if data is not None and example_inputs is not None:
        with clock.stage("trace"):
            own = {name: every[name] for name in counted}
            tasks = prepared(every[BASE], own, of_counted, data, example_inputs, config)
    own_weights = None
    if tasks is not None and isinstance(config.method, Sensitivity):
        with clock.stage("sensitivity"):
            own_weights = weights_in_layers(tasks, first.parameters, config.method)
    with clock.stage("merge"):
        merging = {name: others[name] for name in counted}
        state = merged_state(first, merging, of_counted, config, storage, progress, own_weights)
    result = MergeResult(
        model=first.module,
        base=first.module,
        models={name: one.module for name, one in others.items()},
        weights=given,
        distances=distances,
        config=config,
        example=example,
    )
    if tasks is not None:
        return calibrated(result, tasks, state, storage, clock, progress)
    model = storage.model(first.module, state, aliases_of(first.module))
    return replace(result, model=model, timings=clock.seconds, peak_memory=clock.peak_memory)


def _readable(
    data: Data | Mapping[str, Data] | None, models: Mapping[str, Model]
) -> Data | Mapping[str, Data] | None:
    """Return data, or each model's, as stages read them."""
    if data is None:
        return None
    if not isinstance(data, Mapping) or is_graph(data):
        return readable(data, models)
    if data.keys() != models.keys():
        raise InputError(
            f"data as a mapping must have one entry for each model, {', '.join(models)}; got "
            f"{', '.join(map(str, data))}"
        )
    return {name: readable(one, models) for name, one in data.items()}


def _needed_memory(base: Network, count: int, method: MergeMethod) -> NeededMemory:
    """Return how much a merge of so many models holds at the most, but for calibrations."""
    every = [*base.module.parameters(), *base.module.buffers()]
    sizes = [one.numel() * one.element_size() for one in every]
    at_once = 8 * PART * (3 * count + _PARTS)
    found = {"merge": (count + 1 + _COPIES) * max(sizes, default=0) + at_once}
    if isinstance(method, Sensitivity):
        found = {"sensitivity": _GRADIENTS * sum(sizes), **found}
    return NeededMemory(held_now(), found)
