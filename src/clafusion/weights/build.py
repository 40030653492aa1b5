"""Put weights of any widths into a module."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.execution.call import State
from clafusion.execution.layouts import axes_in_memory, laid_out
from clafusion.execution.lazy import LazyState, overlaid
from clafusion.execution.results import copy_memo, forget_results
from clafusion.tracing.model import TracedModel
from clafusion.weights.state_files import EXTRA_STATE

__all__ = ["fill", "with_state", "with_tensors", "with_weights"]

_LARGE = 1 << 28  # bytes of weights


def with_state(
    module: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> nn.Module:
    """Return a copy of a module that holds ``state``, whatever the widths in it are.

    ``aliases`` maps the other names of tied entries to those in ``state``.
    """
    with torch.inference_mode(False):  # in which nothing is made that can be trained
        full = LazyState([*state, *aliases], lambda name: state[aliases.get(name, name)])
        built = _without(module, full)
        fill(built, full)
    return built


def with_tensors(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> nn.Module:
    """Return a copy of a module that has these parameters, without a copy of them.

    ``others`` holds the rest of its state, which is copied; ``aliases`` is that of
    :func:`with_state`.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    names = [name for name in parameters if type(own[name]) is nn.Parameter and not vars(own[name])]
    state = overlaid(parameters, others)
    with torch.inference_mode(False):
        given: dict[int, Any] = {
            id(own[name]): nn.Parameter(parameters[name], own[name].requires_grad) for name in names
        }
        left = [name for name in (*state, *aliases) if id(own.get(name)) not in given]
        given |= copy_memo(module)
        built = copy.deepcopy(module, given)  # which adds to ``given``
        fill(built, LazyState(left, lambda name: state[aliases.get(name, name)]))
    return built


def with_weights(traced: TracedModel, state: State) -> TracedModel:
    """Return a traced model with other weights of the same shapes, constants included.

    ``state`` may make its tensors when they are read. Those of a large network it makes again each
    time, so that nothing holds them; those of others it makes once, here.
    """
    size = sum(one.numel() * one.element_size() for one in traced.module_state().values())
    return replace(
        traced,
        weights=state if size > _LARGE else {name: state[name].clone() for name in state},
        constants={name: state[name] for name in traced.constants},
    )


def _without(module: nn.Module, names: Collection[str]) -> nn.Module:
    """Return a copy of a module in which parameters of some names are yet to be filled."""
    empty = {
        id(one): nn.Parameter(torch.empty_like(one), one.requires_grad)
        for name, one in module.named_parameters()
        if name in names and type(one) is nn.Parameter and not vars(one)
    }
    return copy.deepcopy(module, empty | copy_memo(module))


def fill(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put ``state`` into a module in place, whatever the widths in it are.

    What ``get_extra_state`` returned goes to ``set_extra_state`` of the same submodule.
    """
    with torch.no_grad():
        for kind in (module.named_parameters(), module.named_buffers()):
            for name, tensor in list(kind):
                if name in state:
                    value = state[name].detach().to(tensor)
                    # What is computed may be laid out otherwise, and the module's code need not
                    # run with that.
                    tensor.data = laid_out(value, axes_in_memory(tensor))
    for submodule in module.modules():
        _set_widths(submodule)
    for path, submodule in module.named_modules():
        name = f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE
        if name in state:
            submodule.set_extra_state(state[name])
    forget_results(module)


def _set_widths(module: nn.Module) -> None:
    """Make a layer's attributes agree with its parameters' shapes."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        into, out = weight.size(1), weight.size(0)
        if module.transposed:
            into, out = out, into
            module.in_channels, module.out_channels = into, out * module.groups
        else:
            if module.groups == module.in_channels > 1 and into == 1:
                module.groups = out * module.in_channels // module.out_channels
            module.in_channels, module.out_channels = into * module.groups, out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = weight if weight is not None else module.running_mean
        if known is not None:
            module.num_features = known.size(0)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = weight.size(0)
    elif isinstance(module, nn.LayerNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
