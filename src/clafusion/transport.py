"""Costs -> transport plans: which channel moves where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["Solver", "TransportSolution", "solve_transport"]

Solver = Literal["auto", "assignment", "exact", "sinkhorn"]


@dataclass(frozen=True)
class TransportSolution:
    """A transport plan ``(num_source, num_target)`` that sums to 1."""

    plan: Tensor


def solve_transport(
    costs: Sequence[Tensor], *, solver: Solver = "auto", epsilon: float = 0.05
) -> list[TransportSolution]:
    """Solve one optimal transport problem with uniform marginals for each cost matrix."""
    return [TransportSolution(_solve(cost.double().cpu(), solver, epsilon)) for cost in costs]


def _solve(cost: Tensor, solver: Solver, epsilon: float) -> Tensor:
    n, m = cost.shape
    if solver == "assignment" or (solver == "auto" and n == m):
        rows, columns = linear_sum_assignment(cost.numpy())
        plan = torch.zeros(n, m, dtype=torch.float64)
        plan[rows, columns] = 1 / n
        return plan
    source, target = np.full(n, 1 / n), np.full(m, 1 / m)
    if solver == "sinkhorn":
        scale = max(float(cost.abs().max()), 1e-30)
        found = ot.sinkhorn(source, target, cost.numpy(), epsilon * scale, method="sinkhorn_log")
        return torch.from_numpy(found)
    return torch.from_numpy(ot.emd(source, target, cost.numpy()))
