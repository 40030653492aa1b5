"""What a transport solver returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TransportSolution", "optimal"]


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
        ``plan = exp((f[:, None] + g - cost) / epsilon)``, in units of the cost, ``-inf`` where
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


def optimal(plan: Tensor, f: Tensor, g: Tensor, total: Tensor, error: float) -> TransportSolution:
    """Return the solution of an exact solver."""
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
