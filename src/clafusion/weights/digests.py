"""Hashes that tell data, weights and models from others, the same in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import partial
from importlib.metadata import version
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clafusion.profiling.batches import Data

__all__ = ["data_digest", "digest_of", "structure_digest", "tensors_digest", "versions"]

_TOLD_BY_REPR = (
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
_DEEPEST = 12  # how far attributes of attributes are looked at


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def structure_digest(model: nn.Module) -> str:
    """Return the SHA-256 of what a model computes with its tensors, as far as that can be told.

    That is every submodule's group, the code of its ``forward`` and its attributes; not what the
    code calls. It may differ for equal models with attributes of unusual kinds.
    """
    seen: dict[int, int] = {}
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(vars(module))
        parameters, buffers, children = (
            own.pop(kind, {}) for kind in ("_parameters", "_buffers", "_modules")
        )
        own.pop("training", None)
        hidden = own.get("_non_persistent_buffers_set", ())
        found.append(
            [
                path,
                _name_of(type(module)),
                _told(getattr(type(module), "forward", None), seen, 0),
                seen.setdefault(id(module), len(seen)),
                [[name, child is None] for name, child in children.items()],
                [
                    [name, None if one is None else seen.setdefault(id(one), len(seen))]
                    for name, one in (*parameters.items(), *buffers.items())
                ],
                [[name, _told(buffers.get(name), seen, 0)] for name in sorted(hidden)],
                [
                    # The keys of hooks are numbers that count all hooks of the process.
                    [name, _told(list(one.values()) if "hooks" in name else one, seen, 0)]
                    for name, one in own.items()
                ],
            ]
        )
    return digest_of(found)


def _told(value: Any, seen: dict[int, int], depth: int) -> Any:
    """Return as JSON what tells a value from others and is the same in another process."""

    def told(one: Any) -> Any:
        return _told(one, seen, depth + 1)

    kind = _name_of(type(value))
    if isinstance(value, _TOLD_BY_REPR):
        return [kind, repr(value)]
    if isinstance(value, (type, ModuleType)):
        return [kind, _name_of(value)]
    if id(value) in seen or depth > _DEEPEST:
        return [kind, seen.get(id(value))]
    if isinstance(value, (list, tuple)):
        return [kind, [told(one) for one in value]]
    if isinstance(value, (set, frozenset)):
        return [kind, sorted(json.dumps(told(one)) for one in value)]
    if isinstance(value, Mapping):
        return [kind, [[told(key), told(one)] for key, one in value.items()]]
    if isinstance(value, Tensor):
        try:
            return [kind, tensors_digest({"": value})]
        except (RuntimeError, NotImplementedError):  # sparse, on the device meta
            return [kind, str(value.dtype), value.shape]
    if isinstance(value, np.ndarray):
        return [kind, str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, CodeType):
        return [kind, value.co_code.hex(), value.co_names, told(value.co_consts)]
    seen[id(value)] = len(seen)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
        return [kind, _name_of(value), told(parts)]
    if isinstance(value, MethodType):
        return [kind, told(value.__func__), told(value.__self__)]
    if isinstance(value, partial):
        return [kind, told([value.func, value.args, value.keywords])]
    if type(value).__module__.startswith("torch.") and not isinstance(value, nn.Module):
        return [kind, _name_of(value)]
    return [kind, _name_of(value), told(getattr(value, "__dict__", {}))]


def _name_of(value: Any) -> str:
    own = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', '')}.{own}"


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def data_digest(data: Data) -> str:
    """Return the SHA-256 of all batches, in order."""
    digest = hashlib.sha256()
    for batch in [data] if isinstance(data, Tensor) else data:
        parts: Iterable[tuple[Any, Any]] = (
            [("", batch)]
            if isinstance(batch, Tensor)
            else sorted(batch.items())
            if isinstance(batch, Mapping)
            else enumerate(batch)
        )
        digest.update(b"batch")
        for name, one in parts:
            if isinstance(one, Tensor):
                _add(digest, str(name), one)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous()
    digest.update(f"{name}:{values.dtype}:{tuple(values.shape)}:".encode())
    if values.numel():
        digest.update(values.flatten().view(torch.uint8).numpy())


def versions() -> dict[str, str]:
    """Return the releases on which the bytes of a result may depend."""
    return {"clafusion": version("clafusion"), "torch": torch.__version__}
