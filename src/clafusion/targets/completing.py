"""Networks with more children in their containers, which compute what they did before."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from clafusion.errors import ClafusionError
from clafusion.execution.call import flatten_tensors, rounding_of
from clafusion.profiling.thinning import thinned
from clafusion.tracing.copies import copied
from clafusion.tracing.model import TracedModel
from clafusion.tracing.trace import trace_like
from clafusion.weights.build import with_state

__all__ = ["own_state", "with_more_children"]


def own_state(model: TracedModel) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model's module."""
    state = model.state()
    return {name: state[name].detach() for name in state if name not in model.constants}


def with_more_children(
    model: TracedModel,
    additions: Mapping[str, Mapping[str, str]],
    state: Mapping[str, Tensor],
    numbers: Mapping[tuple[str, str], int] | None = None,
) -> TracedModel | None:
    """Return a network with copies of children behind the others of their containers.

    Parameters
    ----------
    model
        The network.
    additions
        Path of a container -> for each new child the one whose copy it is, by their names.
    state
        All parameters and buffers, those of the new children included.
    numbers
        Path of a module and name of an attribute -> the number that it is to be.

    Returns
    -------
    TracedModel or None
        None where the module's code does not run so, or computes something else.
    """
    module = copied(model.model)
    for path, children in additions.items():
        container = module.get_submodule(path) if path else module
        for key, original in children.items():
            container._modules[key] = copy.deepcopy(container._modules[original])
    for (path, name), number in (numbers or {}).items():
        setattr(module.get_submodule(path), name, number)
    try:
        built = trace_like(with_state(module, state, model.aliases), model)
        with torch.no_grad():
            found, wanted = (
                list(flatten_tensors(list(one.run(model.example_inputs)))) for one in (built, model)
            )
    except (ClafusionError, RuntimeError, KeyError):  # the module's code knows its own otherwise
        return None
    bound = rounding_of(model.state().values())
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            return None
        if one.numel():
            gap, largest = (x.double().abs().max() for x in (one.double() - other.double(), other))
            if not gap <= bound * largest.clamp(min=1e-30):
                return None
    return built if model.thinning is None else thinned(built)
