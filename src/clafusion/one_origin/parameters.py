"""The parameters and buffers of a base and its models -> those of the merged network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from clafusion.config import MergeConfig, Ties
from clafusion.errors import InputError
from clafusion.execution.call import State
from clafusion.merging.mean import weighted_mean
from clafusion.merging.task_vectors import TaskVectors, magnitude_threshold
from clafusion.one_origin.networks import Network, task_vectors
from clafusion.profiling.batches import Progress
from clafusion.weights.storage import Storage

__all__ = ["merged_state"]

_COUNTER = "num_batches_tracked"  # of BatchNorm, which says nothing of the function


@torch.no_grad()
def merged_state(
    base: Network,
    models: Mapping[str, Network],
    weights: tuple[float, ...],
    config: MergeConfig,
    storage: Storage,
    progress: Progress | None,
    own_weights: Mapping[str, Sequence[float]] | None = None,
) -> State:
    """Return the merged parameters and buffers, kept where ``storage`` says.

    The models are those that count, whose weights are above 0; ``own_weights`` are those of
    :class:`clafusion.merging.task_vectors.TaskVectors`.

    Raises
    ------
    InputError
        The base's type cannot hold a parameter, or what is no floating number differs.
    """
    method, thresholds = config.method, tuple[float, ...]()
    if isinstance(method, Ties):
        vectors = [partial(task_vectors, base, one) for one in models.values()]
        thresholds = tuple(magnitude_threshold(one, method.density) for one in vectors)
    rule = TaskVectors(method, weights, thresholds, config.seed, own_weights or {})
    state, parameters = storage.empty(), frozenset(base.parameters)
    for i, name in enumerate(base.state, 1):
        first = base.state[name]
        others = [one.state[name] for one in models.values()]
        if name in parameters:
            state[name] = rule.merged(name, first, others)
        else:
            state[name] = _merged_buffer(name, first, others, weights)
        if progress is not None:
            progress("merge", i)
    return state


def _merged_buffer(
    name: str, base: Tensor, others: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Return a buffer, or a parameter of whole numbers."""
    first, *rest = (one.to(base.device) for one in others)
    alike = all(torch.equal(first, one) for one in rest)
    if base.is_floating_point():
        if alike:
            return first.to(base, copy=True)
        return weighted_mean([one.double() for one in (first, *rest)], weights).to(base)
    if alike and torch.equal(first, base):
        return base.clone()
    if name.rpartition(".")[2] == _COUNTER:
        return first.to(base, copy=True) if alike else base.clone()
    kind = str(base.dtype).removeprefix("torch.")
    where = "and is the same in all models but not in the base" if alike else "and differs"
    raise InputError(
        f"{name!r} holds {kind} {where}: there is no mean of it. Only floating numbers are merged, "
        "and all else is the base's: give the base and all models the same"
    )
