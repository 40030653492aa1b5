"""What a transport solver returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from clafusion.transport.plan import TransportPlan

__all__ = ["CompactSolution", "TransportSolution", "optimal"]

Plan = TypeVar("Plan", Tensor, TransportPlan)


@dataclass(frozen=True)
class _Solution(Generic[Plan]):
    plan: Plan
    source_potential: Tensor
    target_potential: Tensor
    cost: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    status: str


@dataclass(frozen=True)
class TransportSolution(_Solution[Tensor]):
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


@dataclass(frozen=True)
class CompactSolution(_Solution[TransportPlan]):
    """The same, with a plan that takes no more memory than what it says."""

    def dense(self) -> TransportSolution:
        """Return the solution with its plan as a matrix."""
        return TransportSolution(**{**vars(self), "plan": self.plan.dense()})


def optimal(
    plan: TransportPlan, f: Tensor, g: Tensor, total: Tensor, error: float
) -> CompactSolution:
    """Return the solution of an exact solver."""
    return CompactSolution(
        plan=plan,
        source_potential=f,
        target_potential=g,
        cost=total,
        marginal_error=torch.tensor(error, dtype=torch.float64),
        iterations=torch.tensor(0),
        converged=torch.tensor(True),
        status="optimal",
    )
