"""The only importer of the compiled module: checks, allocates the outputs, calls.

A function here takes what Python has (arrays, tensors), makes it what the kernel needs
(dtype, contiguity), allocates every output and returns it. The kernels neither allocate
results nor see torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _core
from clafusion.errors import InputError

__all__ = ["align_layers", "gram", "hsic_all_pairs", "num_threads", "set_num_threads"]

num_threads = _core.num_threads
set_num_threads = _core.set_num_threads

_ALIGNMENT_MODES = {"layer": 0, "segment": 1}


def align_layers(
    costs: Sequence[NDArray[np.float64]],
    skips: Sequence[NDArray[np.float64]],
    *,
    mode: str,
    pin_first: bool,
    pin_last: bool,
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64], NDArray[np.int64]]:
    """Solve a ragged batch of alignment problems.

    Returns one ``deep_to_shallow`` array per problem, the total costs ``(count,)`` and how far
    each search reached ``(count, 2)`` (deep, shallow), which explains an infinite total.
    """
    shapes = np.array([cost.shape for cost in costs], dtype=np.int64).reshape(len(costs), 2)
    flat_costs = np.concatenate([np.ravel(cost) for cost in costs]).astype(np.float64, copy=False)
    flat_skips = np.concatenate(list(skips)).astype(np.float64, copy=False)
    deep_to_shallow = np.empty(flat_skips.size, dtype=np.int64)
    totals = np.empty(len(costs), dtype=np.float64)
    reached = np.empty((len(costs), 2), dtype=np.int64)
    _core.align_layers(
        flat_costs,
        flat_skips,
        shapes,
        _ALIGNMENT_MODES[mode],
        pin_first,
        pin_last,
        deep_to_shallow,
        totals,
        reached,
    )
    return np.split(deep_to_shallow, np.cumsum(shapes[:-1, 0])), totals, reached


def gram(x: Tensor) -> NDArray[np.float64]:
    r"""Inner products between all pairs of samples, ``G = X X^T``.

    Products are summed in float32 within a block of 512 features and in float64 across blocks.
    The bytes depend on the input only, not on the number of threads.

    Parameters
    ----------
    x
        ``(num_samples, num_features)``, floating point, on any device, in any layout; read in
        place if it is float32 on the CPU and a sample's features lie one behind the other.

    Returns
    -------
    ``(num_samples, num_samples)``, symmetric.

    Raises
    ------
    InputError
        ``x`` is not a floating-point matrix, or a sample holds NaN, infinity or numbers whose
        squares exceed float32.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise InputError(
            "x must be a floating-point matrix (num_samples, num_features); "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    rows = x.detach().to(device="cpu", dtype=torch.float32)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    result = np.empty((len(rows), len(rows)))
    try:
        _core.gram(rows.numpy(), result)
    except ValueError as error:
        raise InputError(str(error)) from None
    return result


def hsic_all_pairs(
    grams_a: Sequence[NDArray[np.float64]],
    grams_b: Sequence[NDArray[np.float64]],
    *,
    unbiased: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Centre Gram matrices of one size ``(S, S)`` and multiply all pairs.

    Returns the products ``(len(grams_a), len(grams_b))`` and both sides' squared norms.
    """
    products = np.empty((len(grams_a), len(grams_b)))
    norms_a, norms_b = np.empty(len(grams_a)), np.empty(len(grams_b))
    _core.hsic_all_pairs(list(grams_a), list(grams_b), unbiased, products, norms_a, norms_b)
    return products, norms_a, norms_b
