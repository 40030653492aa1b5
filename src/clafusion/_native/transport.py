"""Assignment, and Sinkhorn on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clafusion import _core

__all__ = ["assign", "sinkhorn"]


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
