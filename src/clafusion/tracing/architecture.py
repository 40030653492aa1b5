"""What an export of a model depends on, to tell whether two models share a graph."""

from __future__ import annotations

import copyreg
import hashlib
import re
from collections.abc import Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clafusion.tracing.ties import identity_of

__all__ = ["Architecture", "architecture", "digest_of_values"]

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
    re.Pattern,
)
# Attributes on which no export depends: it is made of a copy in eval mode, and from where a
# checkpoint came says nothing of its code.
_BESIDE = frozenset({"training", "name_or_path", "_name_or_path"})
_DEEPEST = 12  # attributes of attributes are compared down to this depth


def architecture(model: nn.Module) -> Architecture | None:
    """Return all that an export can depend on; equal for models that export to the same graph.

    That is the type and the attributes of every submodule; the shapes, types and ties of
    parameters and buffers; and the values of buffers, except a norm's statistics.

    None if some attribute is neither a plain value nor an object made of such (a hook, a tensor, a
    module that is not registered), so that nothing can be said about it. What global variables say
    is not compared: that is for the caller, who can run both.
    """
    numbers: dict[Any, int] = {}
    entries: list[Any] = []
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            attributes = dict(vars(module))
            parameters, buffers, children = (
                attributes.pop(kind) for kind in ("_parameters", "_buffers", "_modules")
            )
            if any("hooks" in name and value for name, value in attributes.items()):
                return None
            entries.append(
                (
                    path,
                    type(module),
                    numbers.setdefault(id(module), len(numbers)),
                    tuple((name, child is None) for name, child in children.items()),
                    _facts(parameters, module, numbers),
                    _facts(buffers, module, numbers),
                    _attributes(attributes),
                )
            )
        hash(tuple(entries))
    except Exception:  # an object says how it is copied by code of its own, which may do anything
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
            facts.append((name, number, form, digest_of_values(value)))
    return tuple(facts)


def _attributes(of: Mapping[Any, Any], depth: int = -1) -> tuple[Any, ...]:
    """Return a hashable form of a module's or an object's attributes, without ``_BESIDE``."""
    return tuple(
        (name, _plain(value, depth + 1)) for name, value in of.items() if name not in _BESIDE
    )


def digest_of_values(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's values."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).digest()


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a hashable form of a plain value or an object; raise TypeError for any other."""

    def inner(part: Any) -> Any:
        return _plain(part, depth + 1)

    if isinstance(value, float) and value != value:  # which would not equal itself
        return float, "nan"
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Enum):
        return type(value), value.name
    if depth > _DEEPEST or type(value) is object or isinstance(value, (Tensor, nn.Module)):
        raise TypeError
    if type(value) in (list, tuple):
        return type(value), tuple(map(inner, value))
    if type(value) in (set, frozenset) and all(isinstance(item, str) for item in value):
        return type(value), frozenset(value)
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        return type(value), tuple((inner(key), inner(part)) for key, part in value.items())
    # An object is what copy.deepcopy would make it from again.
    made = value.__reduce_ex__(2)
    if isinstance(made, str) or made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise TypeError
    _, arguments, state, items, pairs = (*made, None, None, None)[:5]
    return (
        type(value),
        inner(tuple(arguments)),
        _attributes(state, depth) if type(state) is dict else inner(state),
        None if items is None else inner(list(items)),
        None if pairs is None else inner(list(pairs)),
    )
