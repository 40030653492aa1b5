"""Moments of channels, inner products of samples, and their alignment by kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _core
from clafusion.errors import InputError, check_type

__all__ = ["channel_moments", "gram", "hsic_all_pairs", "scale_channels"]


def channel_moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    r"""Return each channel's mean and variance over all other axes, in float64.

    .. math:: \mu_c = \frac1n \sum_i x_{ic}, \qquad v_c = \frac1n \sum_i (x_{ic} - \mu_c)^2

    Values are summed in float32 in short runs, and the runs, with the squares of deviations from
    their own means, in float64 (Chan, Golub and LeVeque, The American Statistician 37(3), 1983).
    The bytes depend on the input only, not on the number of threads.

    Parameters
    ----------
    x
        Contiguous float32 on the CPU, with at least one value a channel.
    axis
        The axis of the channels.
    """
    mean, variance = np.empty(x.size(axis)), np.empty(x.size(axis))
    _core.channel_moments(_by_channels(x, axis), mean, variance)
    return torch.from_numpy(mean), torch.from_numpy(variance)


def scale_channels(
    x: Tensor,
    axis: int,
    scale: Tensor,
    shift: Tensor,
    *,
    other: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    out: Tensor | None = None,
) -> Tensor:
    r"""Rescale and shift each channel, add another tensor and clamp, in one pass over memory.

    .. math:: y_{ic} = \min(\max(s_c\, x_{ic} + t_c + o_{ic},\ \text{low}),\ \text{high})

    NaN stays NaN.

    Parameters
    ----------
    x, axis
        As for :func:`channel_moments`.
    scale, shift
        The factor and the shift of each channel, ``(num_channels,)``.
    other
        What is added, contiguous float32 of the shape of ``x``; None for nothing.
    low, high
        The bounds.
    out
        Where the result is written: ``x`` itself (the default), or a contiguous float32 tensor of
        its shape that shares no memory with ``x`` and ``other``.

    Returns
    -------
    Tensor
        ``out``, or ``x``.
    """
    out = x if out is None else out
    factor, offset = (one.detach().float().numpy() for one in (scale, shift))
    values, results = _by_channels(x, axis), _by_channels(out, axis)
    added = None if other is None else _by_channels(other, axis)
    _core.scale_channels(values, factor, offset, added, low, high, results)
    return out


def _by_channels(x: Tensor, axis: int) -> NDArray[np.float32]:
    """Return a tensor's own memory in the shape ``(outer, num_channels, inner)``."""
    axis %= x.dim()
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    return x.detach().view(outer, x.size(axis), inner).numpy()


def gram(
    x: Tensor, *, leading: int | None = None, out: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    r"""Return the inner products between all pairs of samples, ``G = X X^T``.

    Products are summed in float32 over at most 4096 features, in runs of 128, and these sums in
    float64: an entry's error is below ``160 * 2**-24`` of the sum of its products' magnitudes. The
    bytes depend on the input only, not on the number of threads.

    Parameters
    ----------
    x
        ``(num_samples, num_features)``, floating point, on any device, in any layout; read in
        place if it is float32 on the CPU and a sample's features lie one behind the other.
    leading
        With how many of the samples, from the first on, all are multiplied; default all.
    out
        A Gram matrix of the same samples, to which this one is added: features may come block by
        block. If an error is raised it is of no use any more.

    Returns
    -------
    ndarray
        ``(num_samples, leading)``, the columns of a symmetric matrix: ``out`` or a new one.

    Raises
    ------
    InputError
        ``x`` is not a floating-point matrix, a sample holds NaN, infinity or numbers whose
        products exceed float32, ``leading`` is negative or exceeds their number, or ``out`` is not
        a contiguous float64 matrix of that shape.
    """
    check_type(x, Tensor, "x", "a tensor (num_samples, num_features)")
    if leading is not None:
        check_type(leading, int, "leading", "a whole number")
    if out is not None:
        check_type(out, np.ndarray, "out", "a NumPy array")
    if x.ndim != 2 or not x.is_floating_point():
        raise InputError(
            "x must be a floating-point matrix (num_samples, num_features); "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    rows = x.detach().to(device="cpu", dtype=torch.float32)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    leading = len(rows) if leading is None else leading
    if not 0 <= leading <= len(rows):
        raise InputError(
            f"leading must be between 0 and the number of samples, {len(rows)}; got {leading}"
        )
    shape = (len(rows), leading)
    if out is None:
        out = np.zeros(shape)
    elif out.dtype != np.float64 or out.shape != shape or not out.flags.carray:
        raise InputError(
            f"out must be a contiguous, writeable float64 matrix of shape {shape}; got "
            f"{out.dtype} of shape {out.shape}"
        )
    try:
        _core.add_gram(rows.numpy(), out)
    except ValueError as error:
        raise InputError(str(error)) from None
    return out


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
