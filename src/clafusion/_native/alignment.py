"""The dynamic program over layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clafusion import _core

__all__ = ["align_equal_layers", "align_layers"]

_ALIGNMENT_MODES = {"layer": 0, "segment": 1}


def align_layers(
    costs: Sequence[NDArray[np.float64]],
    skips: Sequence[NDArray[np.float64]],
    skips_shallow: Sequence[NDArray[np.float64]] = (),
    *,
    mode: str,
    pin_first: bool,
    pin_last: bool,
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64], NDArray[np.int64]]:
    """Solve a ragged batch of alignment problems.

    Without ``skips_shallow`` no shallow layer may go unmatched. Returns one ``deep_to_shallow``
    array per problem, the total costs ``(count,)`` and how far each search reached ``(count, 2)``
    (deep, shallow), which explains an infinite total.
    """
    shapes = np.array([cost.shape for cost in costs], dtype=np.int64).reshape(len(costs), 2)
    flat_costs = np.concatenate([np.ravel(cost) for cost in costs]).astype(np.float64, copy=False)
    flat_skips = np.concatenate(list(skips)).astype(np.float64, copy=False)
    flat_shallow = np.concatenate([np.empty(0), *skips_shallow])
    solutions, totals, reached = _align_flat(
        flat_costs, flat_skips, flat_shallow, shapes, mode, pin_first, pin_last
    )
    return np.split(solutions, np.cumsum(shapes[:-1, 0])), totals, reached


def align_equal_layers(
    costs: NDArray[np.float64],
    skips: NDArray[np.float64] | None,
    *,
    mode: str,
    pin_first: bool,
    pin_last: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Solve alignment problems of one shape: ``costs`` ``(count, m, n)``, ``skips`` ``(count, m)``.

    Without ``skips`` leaving a layer unmatched costs nothing. As :func:`align_layers`, with
    ``deep_to_shallow`` as one array ``(count, m)``. Raises ValueError for NaN or ``-inf``.
    """
    count, deep, shallow = costs.shape
    shapes = np.tile(np.array([deep, shallow], dtype=np.int64), (count, 1))
    solutions, totals, reached = _align_flat(
        costs.reshape(-1),
        np.empty(0) if skips is None else skips.reshape(-1),
        np.empty(0),
        shapes,
        mode,
        pin_first,
        pin_last,
    )
    return solutions.reshape(count, deep), totals, reached


def _align_flat(
    costs: NDArray[np.float64],
    skips: NDArray[np.float64],
    skips_shallow: NDArray[np.float64],
    shapes: NDArray[np.int64],
    mode: str,
    pin_first: bool,
    pin_last: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    deep_to_shallow = np.empty(shapes[:, 0].sum(), dtype=np.int64)
    totals = np.empty(len(shapes), dtype=np.float64)
    reached = np.empty((len(shapes), 2), dtype=np.int64)
    mode_number = _ALIGNMENT_MODES[mode]
    _core.align_layers(
        costs,
        skips,
        skips_shallow,
        shapes,
        mode_number,
        pin_first,
        pin_last,
        deep_to_shallow,
        totals,
        reached,
    )
    return deep_to_shallow, totals, reached
