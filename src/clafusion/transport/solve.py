"""Costs -> transport plans, by the solver that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _native
from clafusion.config import Assignment, Auto, Exact, Orthogonal, Sinkhorn, Solver, Unbalanced, Zip
from clafusion.errors import InputError
from clafusion.transport.assignment import assign, is_assignable
from clafusion.transport.checks import (
    check_cost,
    check_memory,
    check_sums,
    checked_weights,
    is_finite,
    listed,
    not_finite,
)
from clafusion.transport.exact import transport_exactly
from clafusion.transport.plan import TransportPlan
from clafusion.transport.sinkhorn import sinkhorn
from clafusion.transport.solution import CompactSolution, TransportSolution

__all__ = ["LARGEST_EXACT", "solve_compactly", "solve_transport"]


LARGEST_EXACT = 4096 * 4096
"""Entries of a cost matrix beyond which ``"auto"`` takes Sinkhorn: the network simplex needs
minutes there. An assignment of 8,192 channels needs seconds."""


def solve_transport(
    costs: Sequence[Tensor],
    source_weights: Sequence[Tensor] | None = None,
    target_weights: Sequence[Tensor] | None = None,
    *,
    solver: Solver | str = "auto",
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
        A solver of :mod:`clafusion.config`, or its name for its defaults:
        ``Assignment``: one partner each (Jonker and Volgenant, Computing 1987), all problems in
        parallel; needs equal sizes and uniform weights.
        ``Exact``: POT's network simplex, any sizes and weights, all problems in parallel.
        ``Sinkhorn``: soft plans, see :func:`sinkhorn`.
        ``Unbalanced``: Sinkhorn with soft marginals; the plan is scaled to the mass of the source
        weights.
        ``Auto``: ``Assignment`` where it applies, else ``Exact``, but for more than 4096 x 4096
        entries ``Sinkhorn``.

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
    solutions = solve_compactly(costs, source_weights, target_weights, solver=solver)
    return [one.dense() for one in solutions]


def solve_compactly(
    costs: Sequence[Tensor],
    source_weights: Sequence[Tensor] | None = None,
    target_weights: Sequence[Tensor] | None = None,
    *,
    solver: Solver | str = "auto",
) -> list[CompactSolution]:
    """Solve problems as :func:`solve_transport` does; no plan is a matrix unless it is full."""
    settings = Solver.parse(solver, "solver")
    if isinstance(settings, Zip):
        raise InputError(
            "solver 'zip' also compares the channels within each network, of which these costs "
            "say nothing; it is for clafusion.fuse, and for clafusion.matching.zipping.zip_channels"
        )
    if isinstance(settings, Orthogonal):
        raise InputError(
            "solver 'orthogonal' rotates the streams of networks, of which these costs say "
            "nothing; it is for clafusion.fuse"
        )
    if not isinstance(settings, (Assignment, Auto, Exact, Sinkhorn, Unbalanced)):
        raise InputError(
            f"solver {settings.name!r} is unknown: solvers of your own are not supported. Take "
            "'auto', 'assignment', 'exact', 'sinkhorn' or 'unbalanced'"
        )
    problems = listed(costs, "costs")
    for i, cost in enumerate(problems):
        if not isinstance(cost, Tensor) or cost.ndim != 2:
            raise InputError(f"costs[{i}] must be a tensor (num_source, num_target)")
        check_cost(cost, f"costs[{i}]", any_device=True)
    check_memory(problems)
    given = [cost.detach() for cost in problems]
    problems = [cost.cpu() for cost in given]
    for i, cost in enumerate(problems):
        if not is_finite(cost):
            raise InputError(not_finite(f"costs[{i}]", cost))
    shapes = [tuple(cost.shape) for cost in problems]
    sources = checked_weights(
        source_weights, "source_weights", [n for n, _ in shapes], False, False
    )
    targets = checked_weights(
        target_weights, "target_weights", [m for _, m in shapes], False, False
    )
    if not isinstance(settings, Unbalanced):
        check_sums(sources, targets, False)
    chosen = [
        _choose(cost, a, b) if isinstance(settings, Auto) else settings.name
        for cost, a, b in zip(problems, sources, targets, strict=True)
    ]
    solutions: dict[int, CompactSolution] = {}
    soft = [i for i, name in enumerate(chosen) if name in ("sinkhorn", "unbalanced")]
    if soft:
        masses = [(sources[i], targets[i]) for i in soft]
        solved = _solve_softly([given[i] for i in soft], masses, settings)
        solutions.update(zip(soft, solved, strict=True))
    matched = [i for i, name in enumerate(chosen) if name == "assignment"]
    for i in matched:
        if not is_assignable(problems[i], sources[i], targets[i]):
            raise InputError(
                f"solver 'assignment' needs equal sizes and uniform weights; costs[{i}] has "
                f"shape {shapes[i]}: use solver='exact'"
            )
    assigned = assign([problems[i] for i in matched], [sources[i].sum() for i in matched])
    solutions.update(zip(matched, assigned, strict=True))
    exact = [i for i, name in enumerate(chosen) if name == "exact"]
    solved = transport_exactly([(problems[i], sources[i], targets[i]) for i in exact])
    solutions.update(zip(exact, solved, strict=True))
    return [solutions[i] for i in range(len(problems))]


def _solve_softly(
    costs: Sequence[Tensor],
    masses: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    settings: Solver,
) -> list[CompactSolution]:
    """Solve problems by Sinkhorn's iteration, on a GPU where costs are on one; return to the CPU.

    Plans are scaled to the mass of the source weights.
    """
    gpu = next((cost.device for cost in costs if cost.device.type == "cuda"), None)
    use_gpu = gpu is not None and bool(_native.cuda_devices()[0])
    solved = sinkhorn(
        [cost.to(gpu if use_gpu else "cpu", torch.float32) for cost in costs],
        [torch.from_numpy(source) for source, _ in masses],
        [torch.from_numpy(target) for _, target in masses],
        epsilon=getattr(settings, "epsilon", Sinkhorn().epsilon),
        marginal_relaxation=getattr(settings, "marginal_relaxation", None),
    )
    solutions = []
    for solution, (source, _) in zip(solved, masses, strict=True):
        found: dict[str, Any] = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in vars(solution).items()
        }
        plan: Tensor = found["plan"]
        scale = float(source.sum() / plan.numpy().sum(dtype=np.float64))
        found["plan"] = TransportPlan.from_dense(plan, scale)
        solutions.append(CompactSolution(**found))
    return solutions


def _choose(cost: Tensor, source: NDArray[np.float64], target: NDArray[np.float64]) -> str:
    if is_assignable(cost, source, target):
        return "assignment"
    return "sinkhorn" if cost.numel() > LARGEST_EXACT else "exact"
