"""A merged network and data -> the network calibrated and assessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from clafusion.alignment.models import label
from clafusion.assessment.assess import assess
from clafusion.assessment.parts import Parts, parts_of
from clafusion.calibration.methods import calibrate
from clafusion.config import MergeConfig
from clafusion.correspondence.correspondence import Correspondence, correspond, identity_plans
from clafusion.errors import InputError, StructureError
from clafusion.execution.call import State
from clafusion.execution.lazy import LazyState
from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
from clafusion.one_origin.result import BASE, MergeResult
from clafusion.profiling.batches import Data, Progress, batches
from clafusion.profiling.thinning import alike
from clafusion.quality import hash_of
from clafusion.stages import Clock, ExampleInputs, profile_traced, traced_parent
from clafusion.tracing.model import TracedModel
from clafusion.tracing.ties import aliases_of
from clafusion.weights.factories import Model
from clafusion.weights.storage import Storage

__all__ = ["Tasks", "calibrated", "prepared"]

_BATCH = 256  # inputs of one task at a time


@dataclass(frozen=True)
class Tasks:
    """The base and the models that count, traced, and the data that they run on.

    Attributes
    ----------
    target
        The base.
    parents
        The models by name.
    weights
        Their weights; they add up to 1.
    parts
        The data, parted.
    owners
        Where each model has inputs of its own task: for each batch of them the position of the
        model.
    data_hash
        As in a :class:`clafusion.MergeResult`.
    """

    target: TracedModel
    parents: Mapping[str, TracedModel]
    weights: tuple[float, ...]
    parts: Parts
    owners: tuple[int, ...]
    data_hash: str | None


def prepared(
    base: Model,
    models: Mapping[str, Model],
    weights: tuple[float, ...],
    data: Data | Mapping[str, Data],
    example_inputs: ExampleInputs,
    config: MergeConfig,
) -> Tasks:
    """Trace a base and the models that count, and bring the data into the form of a calibration.

    Parameters
    ----------
    base, models, weights
        The networks, and the models' weights.
    data, example_inputs
        As for :func:`clafusion.merge`.
    config
        The options.
    """
    every = {BASE: base, **models}
    target, *parents = alike(
        [traced_parent(name, one, example_inputs, config.fusion) for name, one in every.items()]
    )
    owners: tuple[int, ...] = ()
    if isinstance(data, Mapping):
        data, owners = _by_tasks({name: data[name] for name in models}, target)
    parts = parts_of(data, parents, config.assessment)
    named = dict(zip(models, parents, strict=True))
    return Tasks(target, named, weights, parts, owners, hash_of(data))


def calibrated(
    result: MergeResult,
    tasks: Tasks,
    state: State,
    storage: Storage,
    clock: Clock,
    progress: Progress | None,
) -> MergeResult:
    """Calibrate what was merged by what the models do on the data, and assess it.

    Parameters
    ----------
    result
        The merge so far.
    tasks
        The traced networks and the data.
    state
        The merged parameters and buffers.
    storage
        Where weights are kept.
    clock
        Measures the stages.
    progress
        As for :func:`clafusion.merge`.
    """
    config, names = result.config.fusion, tuple(tasks.parents)
    target, parts = tasks.target, tasks.parts
    with clock.stage("profile"):
        profiles = profile_traced([*tasks.parents.values()], parts.kept, config, progress, names)
    problem = FusionProblem(
        target,
        tuple(
            Parent(
                name,
                profile,
                _correspond(target, profile.traced, name),
                identity_plans(target),
                MergeWeights(weight),
            )
            for name, profile, weight in zip(names, profiles, tasks.weights, strict=True)
        ),
        storage=storage,
        merged=_by_all_names(state, target),
        owners=tasks.owners,
    )
    with clock.stage("calibrate"):
        outcome = calibrate(
            problem,
            data=parts.kept,
            settings=config.used_calibration,
            seed=config.seed,
            progress=progress,
        )
    with clock.stage("assess"):
        found = assess(
            outcome.model,
            problem,
            tasks.parents,
            tasks.weights,
            parts,
            config.assessment,
            progress,
        )
    return replace(
        result,
        model=outcome.model,
        problem=problem,
        assessment=found,
        averaged=outcome.averaged,
        timings=clock.seconds,
        peak_memory=clock.peak_memory,
        data_hash=tasks.data_hash,
        example=(target.example_inputs, target.keywords),
    )


def _correspond(target: TracedModel, source: TracedModel, name: str) -> Correspondence:
    """Return what corresponds where every layer has the place that it has in the base."""
    if [one.name for one in source.layers] != [one.name for one in target.layers]:
        raise StructureError(
            f"{label(name)} runs other layers than the base: models of one origin have one "
            "structure. Networks of other structures are fused by clafusion.fuse"
        )
    return correspond(target, source, tuple(range(len(target.layers))))


def _by_all_names(state: State, target: TracedModel) -> State:
    """Return a merged state in which tied entries and the graph's constants have their names."""
    tied, own = aliases_of(target.model), target.state()

    def value(name: str) -> Tensor:
        name = tied.get(name, name)
        return state[name] if name in state else own[name]

    return LazyState(own, value)


def _by_tasks(
    data: Mapping[str, Data], target: TracedModel
) -> tuple[list[tuple[Tensor, ...]], tuple[int, ...]]:
    """Return batches of each model's inputs in turn, and for each batch the model's position."""
    of_tasks = []
    for name, own in data.items():
        try:
            found = list(batches(own, target.example_inputs, target.keywords, device=target.device))
        except InputError as error:
            raise InputError(f"data[{name!r}]: {error}") from error
        if not target.takes_whole_batches:
            whole = [torch.cat(one) for one in zip(*found, strict=True)]
            parts = math.ceil(len(whole[0]) / _BATCH)
            found = list(zip(*(one.tensor_split(parts) for one in whole), strict=True))
        of_tasks.append(found)
    joined = [
        (batch, owner)
        for turn in zip_longest(*of_tasks)
        for owner, batch in enumerate(turn)
        if batch is not None
    ]
    return [batch for batch, _ in joined], tuple(owner for _, owner in joined)
