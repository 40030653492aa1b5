"""Tensors in files: which values a model's own tensors can take without a change of meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clafusion.weights.messages import listed

__all__ = ["unlike_values", "unusable_values"]


def unusable_values(entries: Mapping[str, Any]) -> list[str]:
    """Return what no model could take, in words: each entry by name, with what to do."""
    return _listed(
        f"{name!r} {problem}"
        for name, value in entries.items()
        if isinstance(value, Tensor) and (problem := _unusable(value)) is not None
    )


def unlike_values(model: nn.Module, entries: Mapping[str, Any]) -> list[str]:
    """Return which entries would mean something else in a model, in words, with what to do.

    These are numbers of another kind (int8, bool, complex, float8 for float parameters, fractions
    for counts), numbers that the model's type cannot hold, and NaN and infinite weights. Buffers
    may be infinite, as masks are.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = {**dict(model.named_buffers(remove_duplicate=False)), **parameters}
    statistics = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name in ("running_mean", "running_var")
    }
    found = [
        f"{name!r} {problem}"
        for name, value in entries.items()
        if isinstance(value, Tensor) and name not in own  # the model's own hooks may rename it
        if (problem := _unlike_all(value, own)) is not None
    ]
    for name, value in entries.items():
        if isinstance(value, Tensor) and name in own and _unusable(value) is None:
            problem = _unlike(value, own[name])
            if problem is None and (name in parameters or name in statistics):
                problem = _not_finite(value)
            if problem is not None:
                found.append(f"{name!r} {problem}")
    return _listed(found)


def _listed(problems: Iterable[str]) -> list[str]:
    every = list(problems)
    return [listed(every)] if every else []


def _unusable(value: Tensor) -> str | None:
    if is_lazy(value):
        return "has no shape, as its module was lazy: run the module once before saving"
    if value.is_meta:
        return "is on the meta device and has no values: save it after loading them"
    if value.is_nested:
        return "is a nested tensor: save its parts as tensors"
    if value.layout is not torch.strided:
        return f"is sparse ({value.layout}): make it dense first (.to_dense())"
    if value.is_quantized:
        return f"is quantised ({_type(value)}): dequantise it first (.dequantize())"
    return None


def _unlike(value: Tensor, own: Tensor) -> str | None:
    between = f"is {_type(value)} in the file and {_type(own)} in the model"
    if own.is_complex():
        own_is_real = False
    elif own.is_floating_point():
        own_is_real = True
    else:
        is_whole = _is_kept(value, own)
        return None if is_whole else f"{between}, which cannot hold its values"
    if value.is_complex():
        return (
            f"{between}: the imaginary parts would be lost; give a model with complex weights"
            if own_is_real
            else None
        )
    if value.dtype == torch.bool:
        return f"{between}: it is a mask; convert it first if it is meant so (.float())"
    if not value.is_floating_point() or value.element_size() < 2:
        if own.dtype == value.dtype:
            return None
        return (
            f"{between}: dequantise it first (multiply it by its scale in the program that made "
            "the file)"
        )
    if own_is_real and torch.finfo(own.dtype).max < torch.finfo(value.dtype).max:
        top = float(torch.finfo(own.dtype).max)
        lost = int((value.isfinite() & (value.abs() > top)).sum())
        if lost:
            return f"{between}, which cannot hold {lost} of its values: build the model as it is"
    return None


def _unlike_all(value: Tensor, own: Mapping[str, Tensor]) -> str | None:
    """Say that no tensor of a model is of a value's kind, if that is one of 8 bits or complex."""
    is_packed = value.element_size() == 1 and value.dtype != torch.bool
    if not (is_packed or value.is_complex()) or _unusable(value) is not None:
        return None
    if not own or any(one.dtype == value.dtype or one.is_complex() for one in own.values()):
        return None
    return _unlike(value, next((one for one in own.values() if one.is_floating_point()), value))


def _is_kept(value: Tensor, own: Tensor) -> bool:
    """Return whether whole numbers (counts, positions, masks) stay what they are."""
    if value.is_complex() or (value.is_floating_point() and not bool(value.isfinite().all())):
        return False
    wide = value.double() if value.is_floating_point() else value
    return bool((wide.to(own.dtype).to(wide.dtype) == wide).all())


def _not_finite(value: Tensor) -> str | None:
    if not value.is_complex() and (not value.is_floating_point() or value.element_size() < 2):
        return None
    bad = int((~value.isfinite()).sum())
    if not bad:
        return None
    return f"holds {bad} NaN or infinite values: take a checkpoint from before it diverged"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
