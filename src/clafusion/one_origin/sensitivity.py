"""Traced models with inputs of their own tasks -> how much each counts in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clafusion.alignment.models import label
from clafusion.assessment.parts import compared_output
from clafusion.config import Assessment, MergeConfig, Sensitivity
from clafusion.errors import InputError, retold
from clafusion.merging.sensitivity import alignments, layer_of, relative_sensitivities, shares
from clafusion.one_origin.calibrated import Tasks
from clafusion.profiling.batches import Data, batches, in_chunks
from clafusion.profiling.importance import sensitivities
from clafusion.profiling.masks import counting_values, kept_positions, zeroed
from clafusion.threads import one_thread
from clafusion.tracing.model import TracedModel

__all__ = ["check_tasks", "weights_in_layers"]

_CHUNK = 64  # inputs whose outputs are held at once
_WITHOUT = (
    "method='sensitivity' needs a floating output with a gradient, which this model does not have: "
    "take another method"
)


def check_tasks(config: MergeConfig, data: Any, *, by_task: bool) -> None:
    """Refuse a merge by sensitivity without inputs of each model's own task.

    Raises
    ------
    InputError
        There are no data, or they say not whose they are.
    """
    if isinstance(config.method, Sensitivity) and (data is None or not by_task):
        found = "no data" if data is None else "data of all tasks together"
        raise InputError(
            "method='sensitivity' needs inputs of each model's own task: give data as a mapping "
            f"with an entry for each model; got {found}. Without, take 'task_arithmetic'"
        )


def weights_in_layers(
    tasks: Tasks, parameters: Sequence[str], method: Sensitivity
) -> dict[str, tuple[float, ...]]:
    """Return each model's weight in each parameter, by its name.

    Parameters
    ----------
    tasks
        The traced models, and the inputs of each model's own task.
    parameters
        The names of the merged parameters.
    method
        The options.

    Raises
    ------
    InputError
        A model has no output with a gradient, or a sensitivity or an output is not finite.
    """
    inputs = _of_models(tasks)
    own = []
    for (name, model), some in zip(tasks.parents.items(), inputs, strict=True):
        try:
            found = sensitivities(model, some, max_inputs=method.samples, without=_WITHOUT)
            own.append(_by_layers(found, parameters))
        except InputError as error:
            raise retold(error, f"{label(name)}: {error}") from error
    aligned = alignments(_distances(tasks, inputs, method.samples))
    by_layer = shares(own, aligned, tasks.weights, method.temperature)
    return {name: by_layer[layer_of(name)] for name in parameters}


def _of_models(tasks: Tasks) -> list[Data]:
    """Return the inputs of each model's own task, without those that are held out."""
    target = tasks.target
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in tasks.parents]
    every = batches(tasks.parts.kept, target.example_inputs, target.keywords, device=target.device)
    for batch, owner in zip(every, tasks.owners, strict=True):
        found[owner].append(batch)
    return [*found]


def _by_layers(products: dict[str, Tensor], parameters: Sequence[str]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    with one_thread():
        for name in parameters:
            one = products.get(name)
            added = sums.setdefault(layer_of(name), [])
            added.append(0.0 if one is None else float(one.double().sum()))
    return relative_sensitivities({name: math.fsum(one) for name, one in sums.items()})


def _distances(tasks: Tasks, inputs: Sequence[Data], samples: int) -> list[list[float]]:
    """Return how far each model's outputs are from each other model's, on the other's inputs."""
    models = [*tasks.parents.values()]
    found = [[0.0] * len(models) for _ in models]
    compared = compared_output(tasks.target, Assessment())
    if compared is None:
        raise InputError(_WITHOUT)
    for j, own in enumerate(inputs):
        far, norm = [0.0] * len(models), 0.0
        with one_thread(), torch.no_grad():
            for some in in_chunks(own, tasks.target, samples, _CHUNK, device=tasks.target.device):
                values = [_output(one, some, *compared) for one in models]
                norm += float(values[j].square().sum())
                for i, value in enumerate(values):
                    far[i] += float((value - values[j]).square().sum())
        for i, one in enumerate(far):
            found[i][j] = math.sqrt(one / norm) if norm else float(one > 0)
    return found


def _output(model: TracedModel, inputs: tuple[Tensor, ...], index: int, kind: str) -> Tensor:
    """Return the compared output in float64, 0 where it does not count."""
    values = [*model.run(inputs, state=model.state())]
    value = values[index]
    mask = kept_positions(model, inputs)
    name = model.output_names[index]
    value = zeroed(value, counting_values(model, name, value, mask)).double()
    return value - value.mean(-1, keepdim=True) if kind == "classes" else value
