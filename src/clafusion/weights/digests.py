"""Digests of weights and of what models compute, the same in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clafusion.tracing.ties import identity_of

__all__ = ["add_tensor", "digest_of", "structure_digest", "tensors_digest", "versions"]

_SHOWN_BY_REPR = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    Enum,
    np.generic,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.memory_format,
)
_DEEPEST = 12  # attributes of attributes enter down to this depth


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        add_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def structure_digest(model: nn.Module) -> str:
    """Return the SHA-256 of what a model computes with its tensors, as far as that shows.

    That is the type of every submodule, the code of its ``forward`` and its attributes; not what
    the code calls. It may differ for equal models with attributes of unusual types.
    """
    seen: dict[int, int] = {}
    ties: dict[Any, int] = {}
    entries: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(vars(module))
        parameters, buffers, children = (
            own.pop(kind, {}) for kind in ("_parameters", "_buffers", "_modules")
        )
        own.pop("training", None)
        hidden = own.get("_non_persistent_buffers_set", ())
        entries.append(
            [
                path,
                _name_of(type(module)),
                _as_json(getattr(type(module), "forward", None), seen, 0),
                seen.setdefault(id(module), len(seen)),
                [[name, child is None] for name, child in children.items()],
                [
                    [
                        name,
                        None if value is None else ties.setdefault(identity_of(value), len(ties)),
                    ]
                    for name, value in (*parameters.items(), *buffers.items())
                ],
                [[name, _as_json(buffers.get(name), seen, 0)] for name in sorted(hidden)],
                [[name, _as_json(_unnumbered(name, one), seen, 0)] for name, one in own.items()],
            ]
        )
    return digest_of(entries)


def _unnumbered(name: str, value: Any) -> Any:
    """Return an attribute; of hooks without the numbers, which count all hooks of the process.

    A module of torch.fx has lists of hooks besides.
    """
    is_hooks = "hooks" in name and isinstance(value, Mapping)
    return list(value.values()) if is_hooks else value


def _as_json(value: Any, seen: dict[int, int], depth: int) -> Any:
    """Return a JSON value that sets ``value`` apart and is the same in another process.

    ``seen`` numbers the objects met so far, so that a cycle ends.
    """

    def inner(part: Any) -> Any:
        return _as_json(part, seen, depth + 1)

    kind = _name_of(type(value))
    if isinstance(value, _SHOWN_BY_REPR):
        return [kind, repr(value)]
    if isinstance(value, (type, ModuleType)):
        return [kind, _name_of(value)]
    if id(value) in seen or depth > _DEEPEST:
        return [kind, seen.get(id(value))]
    if isinstance(value, (list, tuple)):
        return [kind, [inner(part) for part in value]]
    if isinstance(value, (set, frozenset)):
        return [kind, sorted(json.dumps(inner(part)) for part in value)]
    if isinstance(value, Mapping):
        return [kind, [[inner(key), inner(part)] for key, part in value.items()]]
    if isinstance(value, Tensor):
        try:
            return [kind, tensors_digest({"": value})]
        except (RuntimeError, NotImplementedError):  # sparse, on the device meta
            return [kind, str(value.dtype), value.shape]
    if isinstance(value, np.ndarray):
        return [kind, str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, CodeType):
        return [kind, value.co_code.hex(), value.co_names, inner(value.co_consts)]
    seen[id(value)] = len(seen)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
        return [kind, _name_of(value), inner(parts)]
    if isinstance(value, MethodType):
        return [kind, inner(value.__func__), inner(value.__self__)]
    if isinstance(value, partial):
        return [kind, inner([value.func, value.args, value.keywords])]
    if type(value).__module__.startswith("torch.") and not isinstance(value, nn.Module):
        return [kind, _name_of(value)]
    return [kind, _name_of(value), inner(getattr(value, "__dict__", {}))]


def _name_of(value: Any) -> str:
    own = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', '')}.{own}"


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and values to a ``hashlib`` digest."""
    values = tensor.detach().cpu().contiguous()
    digest.update(f"{name}:{values.dtype}:{tuple(values.shape)}:".encode())
    if values.numel():
        digest.update(values.flatten().view(torch.uint8).numpy())


def versions() -> dict[str, str]:
    """Return the releases of those packages on which the bytes of a result may depend."""
    found: dict[str, str] = {"torch": torch.__version__}
    for name in ("clafusion", "numpy", "scipy", "pot", "safetensors", "transformers"):
        with suppress(PackageNotFoundError):  # transformers need not be there
            found[name] = version(name)
    return found
