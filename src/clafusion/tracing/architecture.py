"""What an export of a model depends on, to tell whether two models share a graph."""

from __future__ import annotations

from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clafusion.tracing.ties import identity_of

__all__ = ["Architecture", "architecture"]

Architecture: TypeAlias = tuple[Any, ...]
"""A hashable value; equal for models that export to the same graph."""

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    type(None),
    FunctionType,
    BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
)


def architecture(model: nn.Module) -> Architecture | None:
    """Return all that an export can depend on; equal for models that export to the same graph.

    That is the type and the attributes of every submodule; the shapes, types and ties of
    parameters and buffers; and the values of buffers, except a norm's statistics.

    None if some attribute is no plain value (a hook, a tensor, an object of a type of its own), so
    that nothing can be said about it.
    """
    numbers: dict[Any, int] = {}
    entries: list[Any] = []
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            attributes = dict(vars(module))
            parameters, buffers, children = (
                attributes.pop(kind) for kind in ("_parameters", "_buffers", "_modules")
            )
            entries.append(
                (
                    path,
                    type(module),
                    numbers.setdefault(id(module), len(numbers)),
                    tuple((name, child is None) for name, child in children.items()),
                    _facts(parameters, module, numbers),
                    _facts(buffers, module, numbers),
                    tuple((name, _plain(value)) for name, value in attributes.items()),
                )
            )
        hash(tuple(entries))
    except (TypeError, AttributeError, RuntimeError):
        return None
    return tuple(entries)


def _facts(
    tensors: Mapping[str, Tensor | None], owner: nn.Module, numbers: dict[Any, int]
) -> tuple[Any, ...]:
    """Return what an export may depend on of a module's tensors; equal numbers show ties."""
    facts: list[tuple[Any, ...]] = []
    for name, value in tensors.items():
        if value is None:
            facts.append((name, None))
            continue
        number = numbers.setdefault(identity_of(value), len(numbers))
        form = type(value), value.shape, value.stride(), value.dtype, value.device
        is_statistic = type(owner).__module__ == "torch.nn.modules.batchnorm"
        if isinstance(value, nn.Parameter) or is_statistic:
            facts.append((name, number, form, value.requires_grad))
        else:
            values = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            facts.append((name, number, form, values.numpy().tobytes()))
    return tuple(facts)


def _plain(value: Any) -> Any:
    """Return a hashable form of a plain value; raise TypeError for any other."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, (set, frozenset)) and all(isinstance(item, str) for item in value):
        return type(value), frozenset(value)
    if isinstance(value, dict) and not value:
        return type(value), ()
    raise TypeError
