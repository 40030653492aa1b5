"""What solvers check of their arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.errors import InputError

__all__ = [
    "check_cost",
    "check_memory",
    "check_sums",
    "checked_weights",
    "is_finite",
    "listed",
    "not_finite",
    "vectors",
]


def listed(values: object, name: str) -> list[Tensor]:
    """Return arguments that must be a list of tensors."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(
            f"{name} must be a list of tensors, one per problem; got {type(values).__name__}"
        )
    return list(values)


def check_cost(cost: Tensor, name: str, *, any_device: bool = False) -> None:
    """Refuse what is no cost matrix."""
    if cost.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} must be float32 or float64; got {cost.dtype}: call .float()")
    if cost.device.type not in ("cpu", "cuda") and not any_device:
        raise InputError(
            f"{name} must be on the CPU or a CUDA device; got {cost.device}: call .cpu()"
        )
    if cost.numel() == 0:
        raise InputError(
            f"{name} must have at least one source and one target; got shape {tuple(cost.shape)}"
        )


def check_memory(problems: Sequence[Tensor]) -> None:
    """Refuse what cannot fit: plans, kernels and the copies in between."""
    need = sum(16 * cost.numel() for cost in problems)
    if hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > have:
            raise InputError(
                f"costs need about {need / 2**30:.1f} GiB to solve and the machine has "
                f"{have / 2**30:.1f} GiB: solve fewer or smaller problems at a time"
            )


def is_finite(cost: Tensor) -> bool:
    """Whether all entries are finite in float32. Two passes without a temporary.

    By NumPy: torch's threads wait for each other at every call, on a busy machine for longer than
    the work takes.
    """
    if cost.device.type != "cpu":
        return bool(torch.isfinite(cost.detach().float()).all())
    array = cost.detach().numpy()
    limit = np.finfo(np.float32).max
    return bool(-limit <= array.min() and array.max() <= limit)  # false for NaN


def not_finite(name: str, cost: Tensor) -> str:
    """Say which costs are not finite."""
    with_nan = torch.isnan(cost.detach())
    kind = "NaN" if bool(with_nan.any()) else "an entry that is infinite or beyond float32"
    where = with_nan if bool(with_nan.any()) else ~torch.isfinite(cost.detach().float())
    row, column = (int(x) for x in torch.nonzero(where)[0])
    return (
        f"{name} must be finite; got {kind} at [{row}, {column}]. "
        "Give pairs that must not match a large finite cost"
    )


def vectors(
    values: Tensor | Sequence[Tensor], name: str, sizes: list[int], single: bool, batched: bool
) -> list[NDArray[np.float64]]:
    """Return the vector of each problem as arrays, after checking their shapes."""
    if batched and not isinstance(values, Tensor):
        raise InputError(f"{name} must be a tensor, as costs is; got {type(values).__name__}")
    if isinstance(values, Tensor):
        if not batched:
            raise InputError(f"{name} must be a list of tensors, as costs is; got a tensor")
        shape = (sizes[0],) if single else (len(sizes), sizes[0])
        if tuple(values.shape) != shape:
            raise InputError(f"{name} must have shape {shape}; got {tuple(values.shape)}")
        parts = [values] if single else list(values)
    else:
        parts = listed(values, name)
        if len(parts) != len(sizes):
            raise InputError(
                f"{name} must have one entry per problem: {len(sizes)}, got {len(parts)}"
            )
    checked = []
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if not isinstance(part, Tensor) or tuple(part.shape) != (size,):
            found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise InputError(f"{name}[{i}] must be a tensor of shape ({size},); got {found}")
        if part.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} must be float32 or float64; got {part.dtype}")
        checked.append(part.detach().cpu().double().numpy())
    return checked


def checked_weights(
    weights: Tensor | Sequence[Tensor] | None,
    name: str,
    sizes: list[int],
    single: bool,
    batched: bool,
) -> list[NDArray[np.float64]]:
    """Return the weights of each problem, uniform where none are given."""
    if weights is None:
        uniform = {size: np.full(size, 1 / size) for size in set(sizes)}
        return [uniform[size] for size in sizes]
    given = vectors(weights, name, sizes, single, batched)
    for i, vector in enumerate(given):
        which = name if single else f"{name}[{i}]"
        if not np.isfinite(vector).all():
            raise InputError(f"{which} must be finite; got {vector[~np.isfinite(vector)][0]}")
        if (vector < 0).any():
            raise InputError(f"{which} must not be negative; got {vector.min()}")
        if not 1e-30 < vector.sum() < 1e30:
            raise InputError(f"{which} must have a positive sum; got {vector.sum()}")
    return given


def check_sums(
    sources: list[NDArray[np.float64]], targets: list[NDArray[np.float64]], single: bool
) -> None:
    """Refuse weights whose sums differ."""
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if abs(source.sum() - target.sum()) > 1e-6 * source.sum():
            which = "" if single else f"[{i}]"
            raise InputError(
                f"source_weights{which} and target_weights{which} must have the same sum; got "
                f"{source.sum():.9g} and {target.sum():.9g}: divide each by its sum, or use "
                "soft marginals (marginal_relaxation)"
            )
