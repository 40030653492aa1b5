"""The base and its models: read tensor by tensor, and compared before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clafusion.alignment.models import label
from clafusion.errors import ClafusionError, InputError, retold
from clafusion.execution.call import State
from clafusion.execution.results import held_tensors
from clafusion.merging.task_vectors import PART
from clafusion.tracing.ties import aliases_of
from clafusion.weights.factories import Model, ModelFile
from clafusion.weights.mapped import FileWeights
from clafusion.weights.messages import listed

__all__ = [
    "Network",
    "check_distances",
    "check_same_constants",
    "check_same_entries",
    "opened",
    "task_vectors",
]


@dataclass(frozen=True)
class Network:
    """A network whose weights are read one after another.

    Attributes
    ----------
    name
        What the caller calls it.
    module
        The module; its weights may lie in mapped files.
    state
        Its parameters and buffers, each tied one once.
    parameters
        The names of the floating parameters among them.
    """

    name: str
    module: nn.Module
    state: State
    parameters: tuple[str, ...]


def opened(name: str, model: Model) -> Network:
    """Return a model's weights; of a :class:`clafusion.ModelFile` they stay in the file.

    Raises
    ------
    InputError
        As for :meth:`clafusion.ModelFile.open`; the message names the model.
    """
    try:
        module, mapped = model.open() if isinstance(model, ModelFile) else (model, frozenset[str]())
    except ClafusionError as error:
        raise retold(error, f"{label(name)}: {error}") from error.__cause__
    tied = aliases_of(module)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    state = {key: one.detach() for key, one in own.items() if key not in tied}
    parameters = tuple(
        key for key, one in module.named_parameters() if key not in tied and one.is_floating_point()
    )
    return Network(name, module, FileWeights(state, mapped) if mapped else state, parameters)


def check_same_entries(base: Network, models: Mapping[str, Network]) -> None:
    """Refuse models that do not have the base's parameters and buffers, in its shapes.

    Raises
    ------
    InputError
        The message names the model, and what it lacks, has besides or has in another shape.
    """
    shapes = {name: tuple(one.shape) for name, one in _tensors(base).items()}
    for called, model in models.items():
        own = {name: tuple(one.shape) for name, one in _tensors(model).items()}
        lacking, more = shapes.keys() - own.keys(), own.keys() - shapes.keys()
        for names, what in ((lacking, "lacks"), (more, "has besides those of the base")):
            if names:
                raise InputError(
                    f"{label(called)} {what} {listed(map(repr, sorted(names)))}: models of one "
                    "origin have the same entries. Networks of other structures are fused by "
                    "clafusion.fuse"
                )
        for name, shape in shapes.items():
            if own[name] != shape:
                table = len(shape) == 2 and shape[1:] == own[name][1:]
                hint = " (another vocabulary, or other classes?)" if table else ""
                raise InputError(
                    f"{label(called)} has {name!r} in the shape {own[name]}, and the base in "
                    f"{shape}{hint}: models of one origin have the same shapes. Networks of other "
                    "widths are fused by clafusion.fuse"
                )


def check_same_constants(base: Network, models: Mapping[str, Network]) -> None:
    """Refuse models that hold other tensors than the base outside their parameters and buffers.

    The result has the base's. Where they differ they most often come from the weights, as a product
    that a module keeps from call to call: the merged weights would not change it.

    Raises
    ------
    InputError
        The message names the model and the attribute.
    """
    own = held_tensors(base.module)
    for called, model in models.items():
        for name, one in held_tensors(model.module).items():
            first = own.get(name)
            if first is None or first.is_meta or one.is_meta or first.shape != one.shape:
                continue
            if not torch.equal(first.to(one.device), one):
                raise InputError(
                    f"{label(called)} and the base hold other values in {name!r}, an attribute "
                    "that is neither parameter nor buffer and would not be merged. If a call "
                    "leaves it behind, give models that were not called yet, or let their train() "
                    "drop it; else register it as a buffer"
                )


def _tensors(network: Network) -> dict[str, Tensor]:
    """Return the tensors without reading their values."""
    module = network.module
    every = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: every[name] for name in network.state}


def task_vectors(base: Network, model: Network) -> Iterator[Tensor]:
    """Yield what training has added to the base's parameters, in float64, in flat parts."""
    for name in base.parameters:
        for first, own in _parts(base, model, name):
            yield own - first


def _parts(base: Network, model: Network, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a parameter of both networks, in float64, in flat parts."""
    first = base.state[name].reshape(-1)
    own = model.state[name].to(first.device).reshape(-1)
    for one, other in zip(first.split(PART), own.split(PART), strict=True):
        yield one.double(), other.double()


@torch.no_grad()
def check_distances(
    base: Network, models: Mapping[str, Network], furthest: float
) -> dict[str, float]:
    r"""Return how far each model's weights are from the base's, relative to their own norm.

    That is :math:`\|\theta_p - \theta_0\| / \|\theta_p\|` over the parameters of two and more axes;
    norms' gains would bring all networks together. Networks that know nothing of each other are
    further apart than 1.

    Raises
    ------
    InputError
        A model is further than ``furthest``, or weights or buffers are not finite.
    """
    counted = [name for name in base.parameters if base.state[name].dim() > 1]
    measured, trained = frozenset(counted or base.parameters), frozenset(base.parameters)
    floating = [name for name, one in base.state.items() if one.is_floating_point()]
    found = {}
    for called, model in models.items():
        far = norm = 0.0
        for name in floating:
            for first, own in _parts(base, model, name):
                if name in measured:
                    far += float((own - first).square().sum())
                    norm += float(own.square().sum())
                    if math.isfinite(far + norm):
                        continue
                _check_finite(first, own, name, called, is_trained=name in trained)
        distance = found[called] = math.sqrt(far / norm) if norm else float(far > 0)
        if distance > furthest:
            raise InputError(
                f"{label(called)} does not come from this base: its weights are "
                f"{distance:.3g} of their norm away, and what was trained from it is nearer than "
                f"furthest={furthest:g}. Networks of other origins are fused by clafusion.fuse"
            )
    return found


def _check_finite(first: Tensor, own: Tensor, name: str, called: str, *, is_trained: bool) -> None:
    """Refuse NaN and infinite weights; a buffer that is the same everywhere may be infinite."""
    if not is_trained and torch.equal(first, own):
        return
    for one, whose in ((own, label(called)), (first, "the base")):
        if not bool(one.isfinite().all()):
            raise InputError(f"{name!r} of {whose} holds NaN or infinite values")
