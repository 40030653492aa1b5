"""Entropic optimal transport by Sinkhorn's iteration, one problem or many, on CPU and GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _native
from clafusion.errors import ConvergenceWarning, InputError, warn
from clafusion.transport.checks import (
    check_cost,
    check_memory,
    check_sums,
    checked_weights,
    is_finite,
    listed,
    not_finite,
    vectors,
)
from clafusion.transport.solution import TransportSolution

__all__ = ["sinkhorn"]


@overload
def sinkhorn(
    costs: Tensor,
    source_weights: Tensor | None = None,
    target_weights: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
    marginal_relaxation: float | None = None,
    initial_potential: Tensor | None = None,
) -> TransportSolution: ...


@overload
def sinkhorn(
    costs: Sequence[Tensor],
    source_weights: Sequence[Tensor] | None = None,
    target_weights: Sequence[Tensor] | None = None,
    *,
    epsilon: float = 0.05,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
    marginal_relaxation: float | None = None,
    initial_potential: Sequence[Tensor] | None = None,
) -> list[TransportSolution]: ...


def sinkhorn(
    costs: Tensor | Sequence[Tensor],
    source_weights: Tensor | Sequence[Tensor] | None = None,
    target_weights: Tensor | Sequence[Tensor] | None = None,
    *,
    epsilon: float = 0.05,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
    marginal_relaxation: float | None = None,
    initial_potential: Tensor | Sequence[Tensor] | None = None,
) -> TransportSolution | list[TransportSolution]:
    r"""Solve entropic optimal transport problems, many at once, on the CPU or a GPU.

    With ``a`` and ``b`` the weights and ``e = epsilon * max|C|``,

    .. math:: \min_{P \ge 0} \sum_{ij} P_{ij} C_{ij} + e \sum_{ij} P_{ij} (\log P_{ij} - 1),
              \quad P 1 = a,\; P^T 1 = b

    by Sinkhorn's iteration (Cuturi, NeurIPS 2013), with potentials absorbed into the kernel and
    epsilon scaling (Schmitzer, SIAM J. Sci. Comput. 2019) and over-relaxation (Lehmann et al.,
    Optim. Lett. 2021). With ``marginal_relaxation`` the marginals are soft (Chizat et al., Math.
    Comp. 2018): the constraints give way to ``r (KL(P 1 | a) + KL(P^T 1 | b))`` with
    ``r = marginal_relaxation * max|C|``.

    The arithmetic is float32 throughout. Beside the exact iteration's, a plan's entries are off
    by about ``1e-7 / epsilon`` of themselves: what rounding the costs to float32 does.

    Parameters
    ----------
    costs
        One problem ``(num_source, num_target)``, a batch ``(count, num_source, num_target)`` or
        a list of problems of any shapes; float32 or float64, finite, all on the CPU or all on one
        CUDA device. There the work is queued on the current stream, results stay on the device,
        and only weights, and whether problems converged, are looked at on the host.
    source_weights, target_weights
        ``(num_source,)`` and ``(num_target,)``, with the batch's dimension in front for a batch
        and a list for a list; not negative, 0 allowed, both with the same sum. Default: uniform
        with sum 1.
    epsilon
        Regularisation relative to the largest ``|cost|`` of each problem, so that it has no
        unit. 0.05 blurs, 0.001 is close to exact and slow.
    tolerance
        Where a problem stops: the L1 distance of its plan's marginals from the weights, as a
        share of the mass; at least 1e-7. POT's ``stopThr`` bounds the L2 distance of one marginal,
        which is smaller.
    max_iterations
        Where a problem stops at the latest, epsilon scaling included.
    marginal_relaxation
        Weight of the soft marginals relative to the largest ``|cost|``; default: hard ones.
    initial_potential
        Target potentials to start from, shaped as ``target_weights``: those of a similar
        problem's solution save most iterations. Epsilon scaling is left out then.

    Returns
    -------
    TransportSolution
        For one problem or a batch; a list of solutions for a list. Plans have the costs' dtype.
        The same problem gives the same bytes in any batch and on any number of threads; on a GPU
        others than on the CPU, with plans that both meet the tolerance.

    Raises
    ------
    InputError
        An argument is not as said above, the plans would not fit into memory, or tensors are on
        a GPU and this build has no CUDA kernels.
    RuntimeError
        CUDA failed; the message names the kernel.

    Warns
    -----
    ConvergenceWarning
        A problem reached ``max_iterations``.
    """
    _check_settings(epsilon, tolerance, max_iterations, marginal_relaxation)
    batched = isinstance(costs, Tensor)
    if isinstance(costs, Tensor):
        if costs.ndim not in (2, 3):
            raise InputError(
                "costs must be one problem (num_source, num_target), a batch (count, num_source, "
                f"num_target) or a list; got a tensor of shape {tuple(costs.shape)}"
            )
        check_cost(costs, "costs")
        problems = [costs] if costs.ndim == 2 else list(costs)
        single = costs.ndim == 2
    else:
        problems = listed(costs, "costs")
        single = False
        for i, cost in enumerate(problems):
            if not isinstance(cost, Tensor) or cost.ndim != 2:
                raise InputError(f"costs[{i}] must be a tensor (num_source, num_target)")
            check_cost(cost, f"costs[{i}]")
    if not problems:
        return []
    on_cpu = _common_device(problems).type == "cpu"
    if on_cpu:
        check_memory(problems)
    counts = [tuple(cost.shape) for cost in problems]
    sources = checked_weights(
        source_weights, "source_weights", [n for n, _ in counts], single, batched
    )
    targets = checked_weights(
        target_weights, "target_weights", [m for _, m in counts], single, batched
    )
    uniform = source_weights is None and target_weights is None
    if marginal_relaxation is None and not uniform:
        check_sums(sources, targets, single)
    start = None
    if initial_potential is not None:
        sizes = [m for _, m in counts]
        start = _start(
            vectors(initial_potential, "initial_potential", sizes, single, batched), targets
        )
    found = (_solve_on_cpu if on_cpu else _solve_on_gpu)(
        costs if isinstance(costs, Tensor) and not single else problems,
        np.concatenate(sources),
        np.concatenate(targets),
        start,
        epsilon=epsilon,
        tolerance=tolerance,
        max_iterations=max_iterations,
        marginal_relaxation=math.inf if marginal_relaxation is None else marginal_relaxation,
    )
    if found is None:  # looking at every cost beforehand would take as long again
        i = next(i for i, cost in enumerate(problems) if not is_finite(cost))
        raise InputError(not_finite("costs" if single else f"costs[{i}]", problems[i]))
    dense = isinstance(costs, Tensor) and not single
    solutions = _solutions(found, problems, dense, tolerance, max_iterations)
    return solutions[0] if single and isinstance(solutions, list) else solutions


def _start(
    given: list[NDArray[np.float64]], targets: list[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return the potentials to start from, all problems in a row."""
    start = np.concatenate(given)
    if not np.isfinite(start[np.concatenate(targets) > 0]).all():
        raise InputError(
            "initial_potential must be finite where the target weight is positive; leave it out "
            "to start afresh"
        )
    return start


def _solutions(
    found: _Found,
    problems: Sequence[Tensor],
    dense: bool,
    tolerance: float,
    max_iterations: int,
) -> TransportSolution | list[TransportSolution]:
    """Return the solution of each problem, or of a dense batch the solution of all in one."""
    converged = found.converged.cpu().numpy()
    status = "converged"
    if not converged.all():
        errors = found.marginal_errors.cpu().numpy()
        status = _advise(converged, errors, tolerance, max_iterations)

    def solution(index: Any, plan: Tensor, f: Tensor, g: Tensor) -> TransportSolution:
        return TransportSolution(
            plan=plan,
            source_potential=f,
            target_potential=g,
            cost=found.costs[index],
            marginal_error=found.marginal_errors[index],
            iterations=found.iterations[index],
            converged=found.converged[index],
            status="converged" if bool(converged[index].all()) else status,
        )

    f, g = found.source_potentials, found.target_potentials
    if isinstance(found.plans, Tensor) and dense:
        plan = found.plans.to(problems[0].dtype)
        count = len(problems)
        return solution(slice(None), plan, f.view(count, -1), g.view(count, -1))
    f_parts = f.split([cost.size(0) for cost in problems])
    g_parts = g.split([cost.size(1) for cost in problems])
    return [
        solution(i, found.plans[i].to(cost.dtype), f_parts[i], g_parts[i])
        for i, cost in enumerate(problems)
    ]


class _Found(NamedTuple):
    """Solutions, where they were found: plans of one shape in one tensor, potentials in a row."""

    plans: Tensor | list[Tensor]
    source_potentials: Tensor
    target_potentials: Tensor
    costs: Tensor
    marginal_errors: Tensor
    iterations: Tensor
    converged: Tensor


def _solve_on_cpu(
    costs: Tensor | list[Tensor],
    sources: NDArray[np.float64],
    targets: NDArray[np.float64],
    start: NDArray[np.float64] | None,
    **settings: Any,
) -> _Found | None:
    """Solve, or return None where a cost is not finite in float32."""
    with np.errstate(over="ignore"):  # the kernel refuses what became infinite
        arrays = [np.ascontiguousarray(cost.detach().numpy(), np.float32) for cost in costs]
    try:
        plans, *others = _native.sinkhorn(arrays, sources, targets, start, **settings)
    except ValueError:
        if all(is_finite(cost) for cost in costs):
            raise
        return None
    base = plans[0].base
    whole = [torch.from_numpy(plan) for plan in plans] if base is None else torch.from_numpy(base)
    return _Found(whole, *(torch.from_numpy(one) for one in others))


def _solve_on_gpu(
    costs: Tensor | list[Tensor],
    sources: NDArray[np.float64],
    targets: NDArray[np.float64],
    start: NDArray[np.float64] | None,
    **settings: Any,
) -> _Found | None:
    """Solve, or return None where a cost is not finite in float32."""
    device = costs[0].device
    given: Tensor | list[Tensor]
    if isinstance(costs, Tensor):  # at once: a call a problem would take longer than solving them
        given = costs.detach().to(torch.float32).contiguous()
    else:
        given = [cost.detach().to(torch.float32).contiguous() for cost in costs]
    plans, f, g, totals, errors, iterations, status = _native.sinkhorn_on_device(
        given,
        torch.from_numpy(sources).to(device),
        torch.from_numpy(targets).to(device),
        None if start is None else torch.from_numpy(start).to(device),
        **settings,
    )
    if bool((status == _native.NOT_FINITE).any()):
        return None
    return _Found(plans, f, g, totals, errors, iterations, status == _native.CONVERGED)


def _common_device(costs: Sequence[Tensor]) -> torch.device:
    device = costs[0].device
    for i, cost in enumerate(costs):
        if cost.device != device:
            raise InputError(
                f"costs must be on one device; costs[0] is on {device} but costs[{i}] on "
                f"{cost.device}: move them with .to(device)"
            )
    return device


def _advise(
    converged: NDArray[np.bool_],
    errors: NDArray[np.float64],
    tolerance: float,
    max_iterations: int,
) -> str:
    failed = np.flatnonzero(~converged)
    if failed.size == 0:
        return "converged"
    status = (
        f"{failed.size} of {converged.size} transport problems did not converge in "
        f"{max_iterations} iterations: the marginal error of problem {failed[0]} is "
        f"{errors[failed[0]]:.1e}, tolerance {tolerance:.1e}; "
        "raise epsilon, tolerance or max_iterations"
    )
    warn(status, ConvergenceWarning)
    return status


def _check_settings(
    epsilon: float, tolerance: float, max_iterations: int, marginal_relaxation: float | None
) -> None:
    for name, value in (
        ("epsilon", epsilon),
        ("tolerance", tolerance),
        ("marginal_relaxation", marginal_relaxation),
    ):
        if value is None and name == "marginal_relaxation":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name} must be a positive number; got {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number; got {value!r}")
    if tolerance < 1e-7:
        raise InputError(
            f"tolerance must be at least 1e-7, as float32 resolves no less; got {tolerance!r}"
        )
    if epsilon < 1e-6:
        raise InputError(
            f"epsilon must be at least 1e-6 of the largest cost, as float32 sees no smaller "
            f"differences; got {epsilon!r}: use solver='exact'"
        )
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int):
        raise InputError(f"max_iterations must be an integer; got {max_iterations!r}")
    if not 1 <= max_iterations < 2**62:
        raise InputError(f"max_iterations must be positive; got {max_iterations}")
