"""Costs -> transport plans: which channel moves where."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _native
from clafusion.errors import ConvergenceWarning, InputError

__all__ = ["Solver", "TransportSolution", "sinkhorn", "solve_transport"]

Solver = Literal["auto", "assignment", "exact", "sinkhorn", "unbalanced", "zip"]

LARGEST_EXACT = 4096 * 4096
"""Entries of a cost matrix beyond which ``"auto"`` takes Sinkhorn: exact solvers need minutes."""


@dataclass(frozen=True)
class TransportSolution:
    r"""A transport plan and what is known of it.

    For a dense batch every tensor has the batch as its first dimension.

    Attributes
    ----------
    plan
        ``(num_source, num_target)``: the mass that moves from each source to each target.
    source_potential, target_potential
        ``(num_source,)`` and ``(num_target,)``, float64. Sinkhorn: ``f`` and ``g`` with
        ``plan = exp((f[:, None] + g - cost) / epsilon)``, in layers of the cost, ``-inf`` where
        a weight is 0. Assignment and exact: the dual solution, ``f[:, None] + g <= cost`` with
        equality where mass moves.
    cost
        ``sum(plan * cost)``, float64.
    marginal_error
        L1 distance of the plan's marginals from the weights, as a share of the mass; float64.
    iterations
        How many iterations it took; 0 for exact solvers.
    converged
        Whether the tolerance was reached.
    status
        ``"optimal"``, ``"converged"`` or what to change.
    """

    plan: Tensor
    source_potential: Tensor
    target_potential: Tensor
    cost: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    status: str


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
        layer. 0.05 blurs, 0.001 is close to exact and slow.
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
        _check_cost(costs, "costs")
        problems = [costs] if costs.ndim == 2 else list(costs)
        single = costs.ndim == 2
    else:
        problems = _listed(costs, "costs")
        single = False
        for i, cost in enumerate(problems):
            if not isinstance(cost, Tensor) or cost.ndim != 2:
                raise InputError(f"costs[{i}] must be a tensor (num_source, num_target)")
            _check_cost(cost, f"costs[{i}]")
    if not problems:
        return []
    on_cpu = _common_device(problems).type == "cpu"
    if on_cpu:
        _check_memory(problems)
    counts = [tuple(cost.shape) for cost in problems]
    sources = _weights(source_weights, "source_weights", [n for n, _ in counts], single, batched)
    targets = _weights(target_weights, "target_weights", [m for _, m in counts], single, batched)
    uniform = source_weights is None and target_weights is None
    if marginal_relaxation is None and not uniform:
        _check_sums(sources, targets, single)
    start = None
    if initial_potential is not None:
        start = np.concatenate(
            _vectors(
                initial_potential, "initial_potential", [m for _, m in counts], single, batched
            )
        )
        if not np.isfinite(start[np.concatenate(targets) > 0]).all():
            raise InputError(
                "initial_potential must be finite where the target weight is positive; "
                "leave it out to start afresh"
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
        i = next(i for i, cost in enumerate(problems) if not _finite(cost))
        raise InputError(_not_finite("costs" if single else f"costs[{i}]", problems[i]))
    converged = found.converged.cpu().numpy()
    status = "converged"
    if not converged.all():
        errors = found.marginal_errors.cpu().numpy()
        status = _advise(converged, errors, tolerance, max_iterations)
    dtypes = [cost.dtype for cost in problems]

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
    if isinstance(found.plans, Tensor) and isinstance(costs, Tensor) and not single:
        count = len(problems)
        plan = found.plans.to(costs.dtype)
        return solution(slice(None), plan, f.view(count, -1), g.view(count, -1))
    f_parts, g_parts = f.split([n for n, _ in counts]), g.split([m for _, m in counts])
    solutions = [
        solution(i, found.plans[i].to(dtypes[i]), f_parts[i], g_parts[i])
        for i in range(len(problems))
    ]
    return solutions[0] if single else solutions


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
        if all(_finite(cost) for cost in costs):
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


def solve_transport(
    costs: Sequence[Tensor],
    source_weights: Sequence[Tensor] | None = None,
    target_weights: Sequence[Tensor] | None = None,
    *,
    solver: Solver = "auto",
    epsilon: float = 0.05,
    marginal_relaxation: float = 1.0,
) -> list[TransportSolution]:
    """Solve one optimal transport problem for each cost matrix.

    Parameters
    ----------
    costs
        One ``(num_source, num_target)`` per problem, float32 or float64, finite. They are moved
        to the CPU, but Sinkhorn runs on a GPU where costs are on one that our kernels can use.
    source_weights, target_weights
        One ``(num_source,)`` and ``(num_target,)`` per problem; not negative, both with the same
        sum. Default: uniform with sum 1.
    solver
        ``"assignment"``: one partner each (Jonker and Volgenant, Computing 1987), all problems
        in parallel; needs equal sizes and uniform weights.
        ``"exact"``: POT's network simplex, any sizes and weights, all problems in parallel.
        ``"sinkhorn"``: soft plans, see :func:`sinkhorn`.
        ``"unbalanced"``: Sinkhorn with soft marginals; the plan is scaled to the mass of the
        source weights.
        ``"auto"``: ``"assignment"`` where it applies, else ``"exact"``, but ``"sinkhorn"`` for
        more than 4096 x 4096 entries.
        (``"zip"`` moves both networks and is no transport problem: see :mod:`clafusion.matching.zipping`.)
    epsilon, marginal_relaxation
        Of ``"sinkhorn"`` and ``"unbalanced"``, relative to the largest ``|cost|``.

    Returns
    -------
    list of TransportSolution
        On the CPU, plans in float64.

    Raises
    ------
    InputError
        An argument is not as said above.

    Warns
    -----
    ConvergenceWarning
        A solver stopped before it was done.
    """
    if solver not in get_args(Solver):
        raise InputError(f"solver must be one of {get_args(Solver)}; got {solver!r}")
    if solver == "zip":
        raise InputError(
            "solver 'zip' also compares the channels within each network, of which these costs "
            "tell nothing; it is for clafusion.fuse, and for clafusion.matching.zipping.zip_channels"
        )
    _check_settings(epsilon, 1.0, 1, marginal_relaxation)
    problems = _listed(costs, "costs")
    for i, cost in enumerate(problems):
        if not isinstance(cost, Tensor) or cost.ndim != 2:
            raise InputError(f"costs[{i}] must be a tensor (num_source, num_target)")
        _check_cost(cost, f"costs[{i}]", any_device=True)
    _check_memory(problems)
    given = [cost.detach() for cost in problems]
    problems = [cost.cpu() for cost in given]
    for i, cost in enumerate(problems):
        if not _finite(cost):
            raise InputError(_not_finite(f"costs[{i}]", cost))
    shapes = [tuple(cost.shape) for cost in problems]
    sources = _weights(source_weights, "source_weights", [n for n, _ in shapes], False, False)
    targets = _weights(target_weights, "target_weights", [m for _, m in shapes], False, False)
    if solver != "unbalanced":
        _check_sums(sources, targets, False)
    chosen = [
        _choose(cost, a, b) if solver == "auto" else solver
        for cost, a, b in zip(problems, sources, targets, strict=True)
    ]
    solutions: dict[int, TransportSolution] = {}
    soft = [i for i, name in enumerate(chosen) if name in ("sinkhorn", "unbalanced")]
    if soft:
        gpu = next((one.device for one in given if one.device.type == "cuda"), None)
        use_gpu = gpu is not None and bool(_native.cuda_devices()[0])
        found = sinkhorn(
            [given[i].to(gpu) if use_gpu else problems[i].double() for i in soft],
            [torch.from_numpy(sources[i]) for i in soft],
            [torch.from_numpy(targets[i]) for i in soft],
            epsilon=epsilon,
            marginal_relaxation=marginal_relaxation if solver == "unbalanced" else None,
        )
        for i, solution in zip(soft, found, strict=True):
            tensors: dict[str, Any] = {
                k: v.cpu() for k, v in vars(solution).items() if isinstance(v, Tensor)
            }
            plan = tensors["plan"].double()
            tensors["plan"] = plan * (sources[i].sum() / plan.sum())
            solutions[i] = replace(solution, **tensors)
    matched = [i for i, name in enumerate(chosen) if name == "assignment"]
    for i in matched:
        if not _assignable(problems[i], sources[i], targets[i]):
            raise InputError(
                f"solver 'assignment' needs equal sizes and uniform weights; costs[{i}] has "
                f"shape {shapes[i]}: use solver='exact'"
            )
    assigned = _assign([problems[i] for i in matched], [sources[i].sum() for i in matched])
    solutions.update(zip(matched, assigned, strict=True))
    exact = [i for i, name in enumerate(chosen) if name == "exact"]
    found = _transport_exactly([(problems[i], sources[i], targets[i]) for i in exact])
    solutions.update(zip(exact, found, strict=True))
    return [solutions[i] for i in range(len(problems))]


def _choose(cost: Tensor, source: NDArray[np.float64], target: NDArray[np.float64]) -> Solver:
    if cost.numel() > LARGEST_EXACT:
        return "sinkhorn"
    return "assignment" if _assignable(cost, source, target) else "exact"


def _assignable(cost: Tensor, source: NDArray[np.float64], target: NDArray[np.float64]) -> bool:
    return (
        cost.shape[0] == cost.shape[1]
        and np.ptp(source) <= 1e-12 * source.max()
        and np.ptp(target) <= 1e-12 * target.max()
    )


def _assign(costs: list[Tensor], masses: list[float]) -> list[TransportSolution]:
    found = _native.assign([cost.numpy() for cost in costs])
    solutions = []
    for target, f, g, total, mass in zip(*found, masses, strict=True):
        n = len(target)
        plan = np.zeros((n, n))  # memory that is 0 as it comes, where torch would write it
        plan[np.arange(n), target] = mass / n
        cost = torch.tensor(total * mass / n, dtype=torch.float64)
        dual = torch.from_numpy(f), torch.from_numpy(g)
        solutions.append(_optimal(torch.from_numpy(plan), *dual, cost, 0.0))
    return solutions


def _transport_exactly(
    problems: list[tuple[Tensor, NDArray[np.float64], NDArray[np.float64]]],
) -> list[TransportSolution]:
    if not problems:
        return []
    import ot  # here, for with all that it imports it takes as long as torch

    def solve(
        problem: tuple[Tensor, NDArray[np.float64], NDArray[np.float64]],
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        cost, source, target = problem
        values = cost.double().numpy()
        # POT has absolute tolerances: bring costs to [0, 1), by a power of two, to round none.
        low = values.min()
        exponent = int(np.frexp(values.max() - low)[1])
        scaled = np.ldexp(values - low, -exponent)
        answer: tuple[NDArray[np.float64], dict[str, Any]] = ot.emd(
            source, target, scaled, numItermax=10_000_000, log=True
        )
        for name in ("u", "v"):  # centred, so that each takes half of the shift
            answer[1][name] = np.ldexp(np.asarray(answer[1][name]), exponent) + low / 2
        return answer

    # Threads: POT's network simplex runs without the GIL. Its warnings are said as our own.
    with warnings.catch_warnings(), ThreadPoolExecutor(_native.num_threads()) as threads:
        warnings.simplefilter("ignore")
        answers = list(threads.map(solve, problems))
    solutions = []
    for (cost, source, target), (found, log) in zip(problems, answers, strict=True):
        plan = torch.from_numpy(found)
        error = np.abs(found.sum(1) - source).sum() + np.abs(found.sum(0) - target).sum()
        solution = _optimal(
            plan,
            torch.from_numpy(log["u"]),
            torch.from_numpy(log["v"]),
            (plan * cost).sum(),
            float(error / source.sum()),
        )
        if log["warning"] is not None:
            status = f"the network simplex stopped early ({log['warning']}); use solver='sinkhorn'"
            warnings.warn(status, ConvergenceWarning, stacklevel=3)
            solution = replace(solution, converged=torch.tensor(False), status=status)
        solutions.append(solution)
    return solutions


def _optimal(plan: Tensor, f: Tensor, g: Tensor, total: Tensor, error: float) -> TransportSolution:
    return TransportSolution(
        plan=plan,
        source_potential=f,
        target_potential=g,
        cost=total,
        marginal_error=torch.tensor(error, dtype=torch.float64),
        iterations=torch.tensor(0),
        converged=torch.tensor(True),
        status="optimal",
    )


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
    warnings.warn(status, ConvergenceWarning, stacklevel=3)
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


def _listed(values: object, name: str) -> list[Tensor]:
    if isinstance(values, Tensor) or not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(
            f"{name} must be a list of tensors, one per problem; got {type(values).__name__}"
        )
    return list(values)


def _check_cost(cost: Tensor, name: str, *, any_device: bool = False) -> None:
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


def _check_memory(problems: Sequence[Tensor]) -> None:
    """Refuse what cannot fit: plans, kernels and the copies in between."""
    need = sum(16 * cost.numel() for cost in problems)
    if hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > have:
            raise InputError(
                f"costs need about {need / 2**30:.1f} GiB to solve and the machine has "
                f"{have / 2**30:.1f} GiB: solve fewer or smaller problems at a time"
            )


def _finite(cost: Tensor) -> bool:
    """Whether all entries are finite in float32. Two passes without a temporary.

    By NumPy: torch's threads wait for each other at every call, on a busy machine for longer than
    the work takes.
    """
    if cost.device.type != "cpu":
        return bool(torch.isfinite(cost.detach().float()).all())
    array = cost.detach().numpy()
    limit = np.finfo(np.float32).max
    return bool(-limit <= array.min() and array.max() <= limit)  # false for NaN


def _not_finite(name: str, cost: Tensor) -> str:
    with_nan = torch.isnan(cost.detach())
    kind = "NaN" if bool(with_nan.any()) else "an entry that is infinite or beyond float32"
    where = with_nan if bool(with_nan.any()) else ~torch.isfinite(cost.detach().float())
    row, column = (int(x) for x in torch.nonzero(where)[0])
    return (
        f"{name} must be finite; got {kind} at [{row}, {column}]. "
        "Give pairs that must not match a large finite cost"
    )


def _vectors(
    values: Tensor | Sequence[Tensor], name: str, sizes: list[int], single: bool, batched: bool
) -> list[NDArray[np.float64]]:
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
        parts = _listed(values, name)
        if len(parts) != len(sizes):
            raise InputError(
                f"{name} must have one entry per problem: {len(sizes)}, got {len(parts)}"
            )
    vectors = []
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if not isinstance(part, Tensor) or tuple(part.shape) != (size,):
            found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise InputError(f"{name}[{i}] must be a tensor of shape ({size},); got {found}")
        if part.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} must be float32 or float64; got {part.dtype}")
        vectors.append(part.detach().cpu().double().numpy())
    return vectors


def _weights(
    weights: Tensor | Sequence[Tensor] | None,
    name: str,
    sizes: list[int],
    single: bool,
    batched: bool,
) -> list[NDArray[np.float64]]:
    if weights is None:
        uniform = {size: np.full(size, 1 / size) for size in set(sizes)}
        return [uniform[size] for size in sizes]
    vectors = _vectors(weights, name, sizes, single, batched)
    for i, vector in enumerate(vectors):
        which = name if single else f"{name}[{i}]"
        if not np.isfinite(vector).all():
            raise InputError(f"{which} must be finite; got {vector[~np.isfinite(vector)][0]}")
        if (vector < 0).any():
            raise InputError(f"{which} must not be negative; got {vector.min()}")
        if not 1e-30 < vector.sum() < 1e30:
            raise InputError(f"{which} must have a positive sum; got {vector.sum()}")
    return vectors


def _check_sums(
    sources: list[NDArray[np.float64]], targets: list[NDArray[np.float64]], single: bool
) -> None:
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if abs(source.sum() - target.sum()) > 1e-6 * source.sum():
            which = "" if single else f"[{i}]"
            raise InputError(
                f"source_weights{which} and target_weights{which} must have the same sum; got "
                f"{source.sum():.9g} and {target.sum():.9g}: divide each by its sum, or use "
                "soft marginals (marginal_relaxation)"
            )
