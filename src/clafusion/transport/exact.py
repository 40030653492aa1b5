"""Exact optimal transport by POT's network simplex."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _native
from clafusion.errors import ConvergenceWarning, warn
from clafusion.transport.plan import TransportPlan
from clafusion.transport.solution import CompactSolution, optimal

__all__ = ["transport_exactly"]


def transport_exactly(
    problems: list[tuple[Tensor, NDArray[np.float64], NDArray[np.float64]]],
) -> list[CompactSolution]:
    """Solve problems by the network simplex, all in parallel."""
    if not problems:
        return []
    import ot  # here, for with all that it imports it takes as long as torch

    def solve(
        problem: tuple[Tensor, NDArray[np.float64], NDArray[np.float64]],
    ) -> tuple[CompactSolution, str | None]:
        cost, source, target = problem
        values = cost.double().numpy()
        # POT has absolute tolerances: bring costs to [0, 1), by a power of two, to round none.
        low = values.min()
        exponent = int(np.frexp(values.max() - low)[1])
        scaled = values - low
        np.ldexp(scaled, -exponent, out=scaled)
        found, log = ot.emd(source, target, scaled, numItermax=10_000_000, log=True)
        del scaled
        # Centred, so that each takes half of the shift.
        u, v = (np.ldexp(np.asarray(log[name]), exponent) + low / 2 for name in ("u", "v"))
        error = np.abs(found.sum(1) - source).sum() + np.abs(found.sum(0) - target).sum()
        plan = TransportPlan.from_dense(torch.from_numpy(found))
        rows, columns, masses = plan.entries
        total = (masses * torch.from_numpy(values)[rows.long(), columns.long()]).sum()
        dual = torch.from_numpy(u), torch.from_numpy(v)
        return optimal(plan, *dual, total, float(error / source.sum())), log["warning"]

    # Threads: POT's network simplex runs without the GIL. Its warnings are said as our own.
    with warnings.catch_warnings(), ThreadPoolExecutor(_native.num_threads()) as threads:
        warnings.simplefilter("ignore")
        answers = list(threads.map(solve, problems))
    solutions = []
    for solution, warning in answers:
        if warning is not None:
            status = f"the network simplex stopped early ({warning}); use solver='sinkhorn'"
            warn(status, ConvergenceWarning)
            solution = replace(solution, converged=torch.tensor(False), status=status)
        solutions.append(solution)
    return solutions
