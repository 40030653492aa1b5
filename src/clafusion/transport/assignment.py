"""The best permutation: optimal transport between equal numbers of equal masses."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _native
from clafusion.transport.plan import TransportPlan
from clafusion.transport.solution import CompactSolution, optimal

__all__ = ["assign", "is_assignable"]


def is_assignable(cost: Tensor, source: NDArray[np.float64], target: NDArray[np.float64]) -> bool:
    """Say whether both sides have equal numbers of equal masses."""
    return (
        cost.shape[0] == cost.shape[1]
        and np.ptp(source) <= 1e-12 * source.max()
        and np.ptp(target) <= 1e-12 * target.max()
    )


def assign(costs: list[Tensor], masses: list[float]) -> list[CompactSolution]:
    """Solve problems by the best permutation, all in parallel (Jonker and Volgenant)."""
    found = _native.assign([cost.numpy() for cost in costs])
    solutions = []
    for target, f, g, total, mass in zip(*found, masses, strict=True):
        n = len(target)
        plan = TransportPlan.from_columns(torch.from_numpy(target), n, mass / n)
        cost = torch.tensor(total * mass / n, dtype=torch.float64)
        dual = torch.from_numpy(f), torch.from_numpy(g)
        solutions.append(optimal(plan, *dual, cost, 0.0))
    return solutions
