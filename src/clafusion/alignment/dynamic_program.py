"""Cost matrix -> which layers of two networks match, by exact dynamic programming.

Of the two networks of one alignment, the *deep* one has the rows of the cost matrix, the *shallow*
one its columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clafusion import _native
from clafusion.alignment.layer_alignment import (
    MODES,
    AlignmentMode,
    LayerAlignment,
    LayerAlignmentBatch,
)
from clafusion.errors import AlignmentError, InputError, check_listed, check_type

__all__ = [
    "AlignmentMode",
    "LayerAlignment",
    "LayerAlignmentBatch",
    "align_layers",
    "align_layers_batch",
]


def align_layers(
    cost: ArrayLike,
    *,
    skip: ArrayLike | None = None,
    skip_shallow: ArrayLike | None = None,
    mode: AlignmentMode = "layer",
    pin_first: bool = False,
    pin_last: bool = False,
    seed: int = 0,
) -> LayerAlignment:
    r"""Match every layer of a shallow network with layers of a deep one, in order, at least cost.

    With ``F[0, 0] = 0``, over the first ``k`` shallow and ``l`` deep layers, mode ``"layer"``
    (CLAFusion, arXiv 2110.15538, section 3.2) solves

    .. math:: F[k, l] = \min(F[k, l-1] + skip[l],\; F[k-1, l-1] + C[l, k])

    and mode ``"segment"`` (arXiv 2501.00061), where every deep layer belongs to a segment of
    consecutive layers that match the same shallow layer,

    .. math:: F[k, l] = \min(F[k, l-1],\; F[k-1, l-1]) + C[l, k].

    With ``skip_shallow`` mode ``"layer"`` has gaps on both sides (Needleman and Wunsch, J. Mol.
    Biol. 1970): a third choice is ``F[k-1, l] + skip_shallow[k]``. Either network may then have
    more layers, in all or in any of the stages.

    Mode ``"chain"`` takes the earliest feasible alignment and ``"random"`` a uniformly random
    feasible alignment. Both depend only on which costs are finite, and serve as baselines. Ties go
    to the earliest deep layer.

    Parameters
    ----------
    cost
        ``(m, n)``, deep by shallow, smaller is closer; ``inf`` forbids a pair.
    skip
        ``(m,)``: the cost of leaving a deep layer unmatched; ``inf`` forbids it. Default 0.
        Mode ``"segment"`` skips no layer.
    skip_shallow
        ``(n,)``: the cost of leaving a shallow layer unmatched; ``inf`` forbids it. Default: every
        shallow layer matches. A cost above that of all pairs together leaves as few unmatched as
        possible.
    mode
        ``"layer"``, ``"segment"``, ``"chain"`` or ``"random"``.
    pin_first, pin_last
        Force the first (last) layers of both networks to match each other.
    seed
        Seed of mode ``"random"``.

    Raises
    ------
    InputError
        ``mode`` is unknown; ``cost``, ``skip`` or ``skip_shallow`` has a wrong shape, NaN or
        ``-inf``; there are more shallow than deep layers and all have to match; or
        ``skip_shallow`` comes with another mode than ``"layer"``.
    AlignmentError
        No alignment satisfies the constraints; the message names the layer that can match none.
    """
    return align_layers_batch(
        [cost],
        skips=None if skip is None else [skip],
        skips_shallow=None if skip_shallow is None else [skip_shallow],
        mode=mode,
        pin_first=pin_first,
        pin_last=pin_last,
        seed=seed,
    )[0]


def align_layers_batch(
    costs: Sequence[ArrayLike] | NDArray[np.floating],
    *,
    skips: Sequence[ArrayLike] | NDArray[np.floating] | None = None,
    skips_shallow: Sequence[ArrayLike] | None = None,
    mode: AlignmentMode = "layer",
    pin_first: bool = False,
    pin_last: bool = False,
    seed: int = 0,
) -> LayerAlignmentBatch:
    """Solve many problems of :func:`align_layers` in one call, on all threads.

    Parameters and errors are those of :func:`align_layers`. ``costs``, ``skips`` and
    ``skips_shallow`` hold an array for each problem, of any shapes. Without ``skips_shallow``,
    ``costs`` and ``skips`` may also be single arrays ``(count, m, n)`` and ``(count, m)``, which
    is fastest.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise InputError(f"mode must be one of {MODES}; got {mode!r}")
    for name, pins in (("pin_first", pin_first), ("pin_last", pin_last)):
        check_type(pins, (bool, np.bool_), name, "True or False")
    for name, given in (("costs", costs), ("skips", skips), ("skips_shallow", skips_shallow)):
        if given is not None or name == "costs":
            check_listed(given, name, "a list with an array per problem")
    if skips is not None and len(skips) != len(costs):
        raise InputError(f"skips must have one entry per problem: {len(costs)}, got {len(skips)}")
    if skips_shallow is not None:
        if mode != "layer":
            raise InputError(f"skip_shallow needs mode='layer'; got mode={mode!r}")
        if len(skips_shallow) != len(costs):
            raise InputError(
                "skips_shallow must have one entry per problem: "
                f"{len(costs)}, got {len(skips_shallow)}"
            )
    elif isinstance(costs, np.ndarray) and costs.ndim == 3 and costs.size and mode in _EXACT:
        return _align_equal(costs, skips, mode, pin_first, pin_last)
    if len(costs) == 0:
        return LayerAlignmentBatch((), np.empty(0), (), (), mode, pin_first, pin_last)
    count, gaps = len(costs), skips_shallow is not None
    cost_arrays = [_checked_cost(cost, i, count, tall=not gaps) for i, cost in enumerate(costs)]
    skip_arrays = [
        _checked_skip(None if skips is None else skips[i], len(cost), i, count)
        for i, cost in enumerate(cost_arrays)
    ]
    shallow_arrays = [
        _checked_skip(skips_shallow[i], cost.shape[1], i, count, side="shallow")
        for i, cost in enumerate(cost_arrays)
        if skips_shallow is not None
    ]
    solutions: list[NDArray[np.int64]]
    if mode == "random":
        rng = np.random.default_rng(seed)
        solutions = [
            _random_alignment(cost, skip, pin_first, pin_last, rng)
            for cost, skip in zip(cost_arrays, skip_arrays, strict=True)
        ]
    elif mode == "chain":
        solutions = _earliest_alignments(cost_arrays, skip_arrays, pin_first, pin_last)
    else:
        solutions = _solve(cost_arrays, skip_arrays, mode, pin_first, pin_last, shallow_arrays)[0]
    totals = [
        _total_cost(cost_arrays[i], skip_arrays[i], solution, *shallow_arrays[i : i + 1])
        for i, solution in enumerate(solutions)
    ]
    return LayerAlignmentBatch(
        tuple(solutions),
        np.array(totals, dtype=np.float64),
        tuple(cost_arrays),
        tuple(skip_arrays),
        mode,
        pin_first,
        pin_last,
        tuple(shallow_arrays) if gaps else None,
    )


_EXACT = ("layer", "segment")


def _align_equal(
    costs: NDArray[np.floating],
    skips: Sequence[ArrayLike] | NDArray[np.floating] | None,
    mode: AlignmentMode,
    pin_first: bool,
    pin_last: bool,
) -> LayerAlignmentBatch:
    """Solve problems of the same shape, given as a single array, in the compiled kernel alone."""
    count, deep = costs.shape[:2]
    _checked_cost(costs[0], 0, count)  # the shape and type, for all
    array = np.ascontiguousarray(costs, dtype=np.float64)
    try:
        skip_array = (
            np.broadcast_to(0.0, (count, deep))
            if skips is None
            else np.ascontiguousarray(skips, dtype=np.float64)
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"skips must be an array of real numbers: {error}") from error
    if skip_array.shape != (count, deep):
        raise InputError(
            "skips must have one entry per problem and deep layer, shape "
            f"({count}, {deep}); got shape {skip_array.shape}"
        )
    try:
        solutions, totals, reached = _native.align_equal_layers(
            array,
            None if skips is None else skip_array,
            mode=mode,
            pin_first=pin_first,
            pin_last=pin_last,
        )
    except ValueError:  # the kernel met NaN or -inf: raise an error that names the place
        for i in range(count):
            _checked_cost(array[i], i, count)
            _checked_skip(skip_array[i], deep, i, count)
        raise
    _check_feasible(array, totals, reached)
    return LayerAlignmentBatch(solutions, totals, array, skip_array, mode, pin_first, pin_last)


def _solve(
    costs: list[NDArray[np.float64]],
    skips: list[NDArray[np.float64]],
    mode: str,
    pin_first: bool,
    pin_last: bool,
    skips_shallow: Sequence[NDArray[np.float64]] = (),
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64]]:
    """Solve by the compiled dynamic program; raise where no alignment exists."""
    solutions, totals, reached = _native.align_layers(
        costs, skips, skips_shallow, mode=mode, pin_first=pin_first, pin_last=pin_last
    )
    _check_feasible(costs, totals, reached)
    return solutions, totals


def _check_feasible(
    costs: Sequence[NDArray[np.float64]] | NDArray[np.float64],
    totals: NDArray[np.float64],
    reached: NDArray[np.int64],
) -> None:
    """Raise for the first problem that has no alignment; ``reached`` shows how far each got."""
    for i in map(int, np.flatnonzero(np.isinf(totals))):
        deep, shallow = (int(count) for count in reached[i])
        if (deep, shallow) == costs[i].shape:
            raise InputError(f"{_name('cost', i, len(costs))} is so large that sums overflow")
        message = _infeasible(costs[i], deep, shallow, i, len(costs))
        raise AlignmentError(message, deep, shallow)


def _total_cost(
    cost: NDArray[np.float64],
    skip: NDArray[np.float64],
    deep_to_shallow: NDArray[np.int64],
    skip_shallow: NDArray[np.float64] | None = None,
) -> float:
    matched = deep_to_shallow >= 0
    total = float(cost[matched, deep_to_shallow[matched]].sum() + skip[~matched].sum())
    if skip_shallow is not None:
        total += float(np.delete(skip_shallow, deep_to_shallow[matched]).sum())
    return total


def _earliest_alignments(
    costs: Sequence[NDArray[np.float64]],
    skips: Sequence[NDArray[np.float64]],
    pin_first: bool,
    pin_last: bool,
) -> list[NDArray[np.int64]]:
    """Return the feasible alignments whose matched deep layers come earliest."""
    earliest = [
        np.where(np.isfinite(cost), np.arange(len(cost), dtype=np.float64)[:, None], np.inf)
        for cost in costs
    ]
    free = [np.where(np.isfinite(skip), 0.0, np.inf) for skip in skips]
    return _solve(earliest, free, "layer", pin_first, pin_last)[0]


def _random_alignment(
    cost: NDArray[np.float64],
    skip: NDArray[np.float64],
    pin_first: bool,
    pin_last: bool,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw a feasible alignment, all equally likely."""
    allowed = np.isfinite(cost)
    skippable = np.isfinite(skip)
    if pin_first:
        allowed[0, 1:] = False
        skippable[0] = False
    if pin_last:
        allowed[-1, :-1] = False
        skippable[-1] = False
    m, n = cost.shape
    # ways[l][k]: the number of alignments of the first l deep with the first k shallow layers. It
    # grows like a binomial coefficient, so it takes Python's integers.
    ways = [[1] + [0] * n]
    for deep in range(m):
        before = ways[-1]
        ways.append(
            [
                before[k] * int(skippable[deep])
                + (before[k - 1] * int(allowed[deep, k - 1]) if k else 0)
                for k in range(n + 1)
            ]
        )
    if ways[m][n] == 0:  # the exact solver explains why
        _solve([cost], [skip], "layer", pin_first, pin_last)
    deep_to_shallow = np.full(m, -1, dtype=np.int64)
    k = n
    for deep in range(m - 1, -1, -1):
        matched = ways[deep][k - 1] * int(allowed[deep, k - 1]) if k else 0
        if matched and rng.random() < matched / ways[deep + 1][k]:
            k -= 1
            deep_to_shallow[deep] = k
    return deep_to_shallow


def _name(argument: str, index: int, count: int) -> str:
    return argument if count == 1 else f"{argument}s[{index}]"


def _checked_cost(
    cost: ArrayLike, index: int, count: int, *, tall: bool = True
) -> NDArray[np.float64]:
    name = _name("cost", index, count)
    array = _as_float64(cost, name)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"{name} must be a matrix (deep layers, shallow layers) with at least one of each; "
            f"got shape {array.shape}"
        )
    if tall and array.shape[0] < array.shape[1]:
        raise InputError(
            f"{name} has {array.shape[0]} deep but {array.shape[1]} shallow layers; rows are the "
            "deep network's layers, so transpose it, swap the networks or give skip_shallow"
        )
    return array


def _checked_skip(
    skip: ArrayLike | None, layers: int, index: int, count: int, side: str = "deep"
) -> NDArray[np.float64]:
    if skip is None:
        return np.zeros(layers)
    name = _name("skip", index, count) if side == "deep" else f"skip_shallow of problem {index}"
    array = _as_float64(skip, name)
    if array.shape != (layers,):
        raise InputError(
            f"{name} must have one entry per {side} layer, shape ({layers},); got shape "
            f"{array.shape}"
        )
    return array


def _as_float64(values: ArrayLike, name: str) -> NDArray[np.float64]:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array of real numbers: {error}") from error
    wrong = np.isnan(array) | (array == -np.inf)
    if wrong.any():
        position = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"{name} holds {array[position]} at {position}; use inf to forbid, and finite "
            "numbers elsewhere"
        )
    return array


def _infeasible(
    cost: NDArray[np.float64], reached_deep: int, reached_shallow: int, index: int, count: int
) -> str:
    """Return a message that names the layer which keeps every alignment from being feasible."""
    where = "" if count == 1 else f" in problem {index}"
    m, n = cost.shape
    if reached_shallow < n:
        blocked = f"shallow layer {reached_shallow} finds no partner"
        if reached_deep < m:
            blocked += (
                f" (after {reached_shallow} matched layers the search ends at deep layer "
                f"{reached_deep}, which can neither match it nor be skipped)"
            )
        else:
            blocked += " among the deep layers that are left"
    else:
        blocked = f"deep layer {reached_deep} can neither be matched nor skipped"
    return (
        f"no alignment exists{where}: {blocked}. Allow more pairs (finite costs) or skips, or "
        "release the pins"
    )
