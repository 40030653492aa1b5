"""The CUDA kernels, where this build has them: Sinkhorn on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clafusion.errors import InputError

__all__ = ["CONVERGED", "NOT_FINITE", "DeviceSinkhorn", "cuda_devices", "sinkhorn_on_device"]


def _loaded() -> tuple[Any, str]:
    try:
        return importlib.import_module("clafusion._cuda"), ""
    except ModuleNotFoundError:
        reason = "this build of clafusion has no CUDA kernels: install it where nvcc is found"
    except ImportError as error:
        reason = f"the CUDA kernels of this build do not load: {error}"
    return None, reason


module, missing = _loaded()
"""The compiled module, or None; why there is none."""


def cuda_devices() -> tuple[list[str], str]:
    """Return the names of the GPUs that our CUDA kernels can use, and why none if none."""
    if module is None:
        return [], missing
    names, reason = module.devices()
    return names, reason if reason or names else "no GPU was found"


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
    if module is None:
        raise InputError(f"costs are on {costs[0].device}, but {missing}; or call .cpu()")
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
            size = module.sinkhorn_workspace(shapes, device.index)
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
        module.sinkhorn(
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
