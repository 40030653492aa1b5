"""The only importer of the compiled modules: checks, allocates the outputs, calls.

A function here takes what Python has (arrays, tensors), makes it what the kernel needs
(dtype, contiguity), allocates every output and returns it. The kernels neither allocate
results nor see torch.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _core
from clafusion.errors import InputError

__all__ = [
    "align_equal_layers",
    "align_layers",
    "assign",
    "build_info",
    "channel_moments",
    "cuda_devices",
    "gram",
    "hsic_all_pairs",
    "keep_lower",
    "lose_channels",
    "num_threads",
    "scale_channels",
    "set_num_threads",
    "sinkhorn",
    "sinkhorn_on_device",
]

_threads = os.environ.get("CLAFUSION_NUM_THREADS", "1")
if not (_threads.isdecimal() and int(_threads) > 0):
    raise InputError(f"CLAFUSION_NUM_THREADS must be a positive whole number; got {_threads!r}")


def _load_cuda() -> tuple[Any, str]:
    try:
        return importlib.import_module("clafusion._cuda"), ""
    except ModuleNotFoundError:
        reason = "this build of clafusion has no CUDA kernels: install it where nvcc is found"
    except ImportError as error:
        reason = f"the CUDA kernels of this build do not load: {error}"
    return None, reason


_cuda, _no_cuda = _load_cuda()


def build_info() -> dict[str, Any]:
    """Return what the compiled module is and what it uses on this machine.

    Returns
    -------
    dict
        ``compiler``; ``simd``: the instruction set chosen at run time (``"avx512"``, ``"avx2"``
        or ``"baseline"``); ``threads``: how many a kernel may use now; ``sanitized``: whether
        AddressSanitizer is built in; ``cuda``: whether CUDA kernels are; ``cuda_architectures``:
        the compute capabilities there is machine code for (``"80, 90"``), others get it from the
        driver; ``cuda_runtime``: the version of the CUDA runtime in it (``"13.0"``). Both are
        empty without CUDA kernels.
    """
    info = _core.build_info()
    info.update(cuda=_cuda is not None, cuda_architectures="", cuda_runtime="")
    if _cuda is not None:
        built = _cuda.build_info()
        major, minor = built["runtime"] // 1000, built["runtime"] % 1000 // 10
        info.update(cuda_architectures=built["architectures"], cuda_runtime=f"{major}.{minor}")
    return info


def cuda_devices() -> tuple[list[str], str]:
    """Return the names of the GPUs that our CUDA kernels can use, and why none if none."""
    if _cuda is None:
        return [], _no_cuda
    names, reason = _cuda.devices()
    return names, reason if reason or names else "no GPU was found"


def num_threads() -> int:
    """Return how many threads a kernel may use.

    It is what :func:`set_num_threads` said, else the environment variable
    ``CLAFUSION_NUM_THREADS`` at the first call, else the number of processors allowed to this
    process. Results do not depend on it.
    """
    return _core.num_threads()


def set_num_threads(count: int) -> None:
    """Set how many threads a kernel may use in this process; 0 returns to the default.

    Raises
    ------
    InputError
        ``count`` is not a whole number from 0 to 1024.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise InputError(f"count must be a whole number from 0 to 1024; got {count!r}")
    if not 0 <= count <= 1024:
        raise InputError(f"count must be from 0 (the default) to 1024; got {count}")
    _core.set_num_threads(int(count))


_ALIGNMENT_MODES = {"layer": 0, "segment": 1}


def align_layers(
    costs: Sequence[NDArray[np.float64]],
    skips: Sequence[NDArray[np.float64]],
    skips_shallow: Sequence[NDArray[np.float64]] = (),
    *,
    mode: str,
    pin_first: bool,
    pin_last: bool,
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64], NDArray[np.int64]]:
    """Solve a ragged batch of alignment problems.

    Without ``skips_shallow`` no shallow layer may go unmatched. Returns one ``deep_to_shallow``
    array per problem, the total costs ``(count,)`` and how far each search reached ``(count, 2)``
    (deep, shallow), which explains an infinite total.
    """
    shapes = np.array([cost.shape for cost in costs], dtype=np.int64).reshape(len(costs), 2)
    flat_costs = np.concatenate([np.ravel(cost) for cost in costs]).astype(np.float64, copy=False)
    flat_skips = np.concatenate(list(skips)).astype(np.float64, copy=False)
    flat_shallow = np.concatenate([np.empty(0), *skips_shallow])
    solutions, totals, reached = _align_flat(
        flat_costs, flat_skips, flat_shallow, shapes, mode, pin_first, pin_last
    )
    return np.split(solutions, np.cumsum(shapes[:-1, 0])), totals, reached


def align_equal_layers(
    costs: NDArray[np.float64],
    skips: NDArray[np.float64] | None,
    *,
    mode: str,
    pin_first: bool,
    pin_last: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Solve alignment problems of one shape: ``costs`` ``(count, m, n)``, ``skips`` ``(count, m)``.

    Without ``skips`` leaving a layer unmatched costs nothing. As :func:`align_layers`, with
    ``deep_to_shallow`` as one array ``(count, m)``. Raises ValueError for NaN or ``-inf``.
    """
    count, deep, shallow = costs.shape
    shapes = np.tile(np.array([deep, shallow], dtype=np.int64), (count, 1))
    solutions, totals, reached = _align_flat(
        costs.reshape(-1),
        np.empty(0) if skips is None else skips.reshape(-1),
        np.empty(0),
        shapes,
        mode,
        pin_first,
        pin_last,
    )
    return solutions.reshape(count, deep), totals, reached


def _align_flat(
    costs: NDArray[np.float64],
    skips: NDArray[np.float64],
    skips_shallow: NDArray[np.float64],
    shapes: NDArray[np.int64],
    mode: str,
    pin_first: bool,
    pin_last: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    deep_to_shallow = np.empty(shapes[:, 0].sum(), dtype=np.int64)
    totals = np.empty(len(shapes), dtype=np.float64)
    reached = np.empty((len(shapes), 2), dtype=np.int64)
    mode_number = _ALIGNMENT_MODES[mode]
    _core.align_layers(
        costs,
        skips,
        skips_shallow,
        shapes,
        mode_number,
        pin_first,
        pin_last,
        deep_to_shallow,
        totals,
        reached,
    )
    return deep_to_shallow, totals, reached


def assign(
    costs: Sequence[NDArray[np.floating]],
) -> tuple[
    list[NDArray[np.int64]],
    list[NDArray[np.float64]],
    list[NDArray[np.float64]],
    NDArray[np.float64],
]:
    """Solve linear assignment problems exactly, each of its own size ``(n, n)``, in parallel.

    Returns per problem the column of each row, the source and the target potentials (``f_i + g_j
    <= C_ij``, with equality where i is matched with j, to rounding), and the total costs. Costs
    are finite, at most 1e200 in magnitude.
    """
    matrices = [np.ascontiguousarray(cost, dtype=np.float64) for cost in costs]
    ends = np.cumsum([len(matrix) for matrix in matrices], dtype=np.int64)
    rows = int(ends[-1]) if len(ends) else 0
    targets, totals = np.empty(rows, dtype=np.int64), np.empty(len(matrices))
    source_potentials, target_potentials = np.empty(rows), np.empty(rows)
    _core.assign(matrices, targets, source_potentials, target_potentials, totals)
    return (
        np.split(targets, ends)[:-1],
        np.split(source_potentials, ends)[:-1],
        np.split(target_potentials, ends)[:-1],
        totals,
    )


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


def scale_channels(x: Tensor, axis: int, scale: Tensor, shift: Tensor) -> None:
    """Multiply each channel by its scale and add its shift, in place.

    ``x`` and ``axis`` are those of :func:`channel_moments`.
    """
    factors = (one.detach().float().numpy() for one in (scale, shift))
    _core.scale_channels(_by_channels(x, axis), *factors)


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


def lose_channels(
    inverse: Tensor,
    products: Tensor,
    blocks: Tensor,
    read: Tensor,
    settled: Tensor,
    logs: Tensor,
    left: Tensor,
    lost: Tensor,
    count: int,
    *,
    cancelled: float,
) -> None:
    """Take away the channels that are missed least, in place: see ``csrc/selection/selection.hpp``.

    Matrices are contiguous, float64 and on the CPU; ``logs`` are ``(4, num_rows, num_features)``,
    ``left`` flags, ``lost`` int64.
    """
    _core.lose_channels(
        inverse.numpy(),
        products.numpy(),
        blocks.numpy(),
        read.numpy(),
        settled.numpy(),
        logs.numpy(),
        left.numpy(),
        lost.numpy(),
        count,
        cancelled,
    )


def keep_lower(matrix: Tensor, kept: Tensor) -> Tensor:
    """Return some rows and columns of a symmetric matrix, in its own memory.

    ``matrix`` is contiguous, float64 and on the CPU, ``kept`` int64 and ascending. The lower
    triangle is read and written; what stands above is of no use.
    """
    _core.keep_lower(matrix.numpy(), kept.numpy())
    return matrix.view(-1)[: len(kept) ** 2].view(len(kept), len(kept))


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


def sinkhorn(
    costs: Sequence[NDArray[np.float32]],
    source_weights: NDArray[np.float64],
    target_weights: NDArray[np.float64],
    initial_potential: NDArray[np.float64] | None,
    *,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
    marginal_relaxation: float,
) -> tuple[
    list[NDArray[np.float32]],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[np.bool_],
]:
    """Solve a ragged batch of entropic transport problems.

    Weights and potentials of the problems lie one behind the other. Returns one plan per
    problem, the source and target potentials, and per problem the cost, the marginal error, the
    iterations and whether they converged. Plans of equal shapes share one array, in order.
    """
    costs = list(costs)
    count = len(costs)
    plans: list[NDArray[np.float32]]
    if len({cost.shape for cost in costs}) == 1:
        plans = list(np.empty((count, *costs[0].shape), dtype=np.float32))
    else:
        plans = [np.empty(cost.shape, dtype=np.float32) for cost in costs]
    source_potentials = np.empty(source_weights.size)
    target_potentials = np.empty(target_weights.size)
    totals, errors = np.empty(count), np.empty(count)
    iterations, converged = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    _core.sinkhorn(
        costs,
        source_weights,
        target_weights,
        initial_potential,
        epsilon,
        tolerance,
        max_iterations,
        marginal_relaxation,
        plans,
        source_potentials,
        target_potentials,
        totals,
        errors,
        iterations,
        converged,
    )
    converged_ = converged.astype(np.bool_)
    return plans, source_potentials, target_potentials, totals, errors, iterations, converged_


CONVERGED, NOT_FINITE = 1, 2
"""What a problem's status may be, beside 0: not converged."""


class DeviceSinkhorn(NamedTuple):
    """What :func:`sinkhorn_on_device` returns, all on the device; potentials as weights."""

    plans: Tensor | list[Tensor]
    source_potentials: Tensor
    target_potentials: Tensor
    totals: Tensor
    errors: Tensor
    iterations: Tensor
    status: Tensor


def sinkhorn_on_device(
    costs: Tensor | Sequence[Tensor],
    source_weights: Tensor,
    target_weights: Tensor,
    initial_potential: Tensor | None,
    *,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
    marginal_relaxation: float,
) -> DeviceSinkhorn:
    """Solve a ragged batch of entropic transport problems on a GPU, on the current stream.

    ``costs`` is a batch ``(count, num_source, num_target)``, or a list of problems. Weights and
    potentials are float64 and lie one behind the other. Plans of equal shapes share one tensor, in
    order. Problems beyond a block's or cluster's shared memory make the host wait.

    Raises
    ------
    InputError
        There are no CUDA kernels, a tensor is on another device, of another type or not
        contiguous, or the device's memory is too small.
    RuntimeError
        CUDA failed; the message names the kernel.
    """
    if _cuda is None:
        raise InputError(f"costs are on {costs[0].device}, but {_no_cuda}; or call .cpu()")
    device = costs[0].device
    count = len(costs)
    if isinstance(costs, Tensor):
        _check_on_device("costs", costs, device, torch.float32, costs.numel())
        shapes = np.tile(np.array(costs.shape[1:], dtype=np.int64), (count, 1))
        addresses = costs.data_ptr() + 4 * costs[0].numel() * np.arange(count, dtype=np.int64)
    else:
        for i, cost in enumerate(costs):
            _check_on_device(f"costs[{i}]", cost, device, torch.float32, cost.numel())
        shapes = np.array([tuple(cost.shape) for cost in costs], dtype=np.int64)
        addresses = np.array([cost.data_ptr() for cost in costs], dtype=np.int64)
    rows, columns = (int(total) for total in shapes.sum(0))
    _check_on_device("source_weights", source_weights, device, torch.float64, rows)
    _check_on_device("target_weights", target_weights, device, torch.float64, columns)
    if initial_potential is not None:
        _check_on_device("initial_potential", initial_potential, device, torch.float64, columns)
    with torch.cuda.device(device):
        need = 4 * int(shapes.prod(1).sum())
        try:
            size = _cuda.sinkhorn_workspace(shapes, device.index)
            need += size + 16 * (rows + columns)
            plans: Tensor | list[Tensor]
            if (shapes == shapes[0]).all():
                plans = costs[0].new_empty((count, *costs[0].shape))
                size_of_one = 4 * costs[0].numel()
                plan_addresses = plans.data_ptr() + size_of_one * np.arange(count, dtype=np.int64)
            else:
                plans = [torch.empty_like(cost) for cost in costs]
                plan_addresses = np.array([plan.data_ptr() for plan in plans], dtype=np.int64)
            # The allocator's addresses are multiples of 512.
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            potentials = torch.empty_like(source_weights), torch.empty_like(target_weights)
            totals, errors = source_weights.new_empty((2, count))
            iterations, status = torch.empty((2, count), dtype=torch.int64, device=device)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"costs need {need / 2**30:.2f} GiB more on {device} for plans and workspace, "
                "which are not free: solve fewer or smaller problems at a time"
            ) from error
        _cuda.sinkhorn(
            shapes,
            addresses,
            plan_addresses,
            source_weights.data_ptr(),
            target_weights.data_ptr(),
            0 if initial_potential is None else initial_potential.data_ptr(),
            potentials[0].data_ptr(),
            potentials[1].data_ptr(),
            totals.data_ptr(),
            errors.data_ptr(),
            iterations.data_ptr(),
            status.data_ptr(),
            epsilon,
            tolerance,
            max_iterations,
            marginal_relaxation,
            workspace.data_ptr(),
            size,
            device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return DeviceSinkhorn(plans, *potentials, totals, errors, iterations, status)


def _check_on_device(
    name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, size: int
) -> None:
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device} but costs[0] on {device}: move one of them")
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.numel() != size:
        raise InputError(
            f"{name} must be contiguous, {dtype}, with {size} entries; got {tensor.dtype}, "
            f"{tensor.numel()} entries, strides {tensor.stride()}"
        )
