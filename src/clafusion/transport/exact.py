"""Exact optimal transport by POT's network simplex."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion import _native
from clafusion.errors import ConvergenceWarning, warn
from clafusion.transport.solution import TransportSolution, optimal

__all__ = ["transport_exactly"]


def transport_exactly(
    problems: list[tuple[Tensor, NDArray[np.float64], NDArray[np.float64]]],
) -> list[TransportSolution]:
    """Solve problems by the network simplex, all in parallel."""
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
        solution = optimal(
            plan,
            torch.from_numpy(log["u"]),
            torch.from_numpy(log["v"]),
            (plan * cost).sum(),
            float(error / source.sum()),
        )
        if log["warning"] is not None:
            status = f"the network simplex stopped early ({log['warning']}); use solver='sinkhorn'"
            warn(status, ConvergenceWarning)
            solution = replace(solution, converged=torch.tensor(False), status=status)
        solutions.append(solution)
    return solutions
