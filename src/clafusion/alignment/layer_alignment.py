"""Which layers of two networks match: the results of the dynamic program.

Of the two networks of one alignment, the *deep* one has the rows of the cost matrix, the *shallow*
one its columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from clafusion import _native
from clafusion.config import ALIGNMENT_MODES

__all__ = ["MODES", "AlignmentMode", "LayerAlignment", "LayerAlignmentBatch"]

MODES = (*ALIGNMENT_MODES, "segment")
"""The option's modes, and one that is for :func:`clafusion.align_layers` only."""

AlignmentMode: TypeAlias = str
"""One of ``MODES``."""


@dataclass(frozen=True)
class LayerAlignment:
    """Which of a deep network's ``m`` layers match which of a shallow network's ``n`` layers.

    Attributes
    ----------
    deep_to_shallow
        The shallow layer that each of the ``m`` deep layers matches, -1 where it matches none.
        In mode ``"segment"`` several consecutive deep layers match the same shallow layer.
    total_cost
        The sum of the matched pairs' costs and the unmatched layers' skip costs.
    cost, skip, mode, pin_first, pin_last, skip_shallow
        The problem: costs ``(m, n)``, skip costs ``(m,)`` and ``(n,)``, and how it was solved.
    """

    deep_to_shallow: tuple[int, ...]
    total_cost: float
    cost: NDArray[np.float64]
    skip: NDArray[np.float64]
    mode: AlignmentMode
    pin_first: bool
    pin_last: bool
    skip_shallow: NDArray[np.float64] | None = None

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The matched pairs ``(deep, shallow)``, in order."""
        return tuple((deep, k) for deep, k in enumerate(self.deep_to_shallow) if k >= 0)

    def __repr__(self) -> str:
        m, n = self.cost.shape
        return f"<LayerAlignment of {m} layers with {n}, total cost {self.total_cost:.4g}>"

    @property
    def unmatched(self) -> tuple[int, ...]:
        """The deep layers that match none."""
        return tuple(deep for deep, k in enumerate(self.deep_to_shallow) if k < 0)

    @property
    def unmatched_shallow(self) -> tuple[int, ...]:
        """The shallow layers that match none; only ``skip_shallow`` allows such layers."""
        matched = set(self.deep_to_shallow)
        return tuple(k for k in range(self.cost.shape[1]) if k not in matched)

    @property
    def matched_cost(self) -> float:
        """The sum of the matched pairs' costs, without skip costs."""
        return math.fsum(float(self.cost[pair]) for pair in self.pairs)

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """All layers of both networks in order: ``(deep, shallow)``, with -1 for no match."""
        steps: list[tuple[int, int]] = []
        next_deep, next_shallow = 0, 0
        for deep, shallow in (*self.pairs, self.cost.shape):
            steps += [(skipped, -1) for skipped in range(next_deep, deep)]
            steps += [(-1, skipped) for skipped in range(next_shallow, shallow)]
            steps.append((deep, shallow))
            next_deep, next_shallow = deep + 1, shallow + 1
        return tuple(steps[:-1])

    @cached_property
    def forced(self) -> bool:
        """Whether the constraints admit this alignment only, so that the costs decided nothing.

        Every other alignment lacks at least one of this one's pairs. So there is no other, exactly
        if none exists without each of the pairs. An alignment that leaves more shallow layers
        unmatched does not count as an alternative.
        """
        free = np.where(np.isfinite(self.cost), 0.0, np.inf)
        skip = np.where(np.isfinite(self.skip), 0.0, np.inf)
        gaps = []
        if self.skip_shallow is not None:
            gaps.append(np.where(np.isfinite(self.skip_shallow), 1.0, np.inf))
        own = len(self.unmatched_shallow)
        for pair in self.pairs:
            without = free.copy()
            without[pair] = np.inf
            _, (total,), _ = _native.align_layers(
                [without],
                [skip],
                gaps,
                mode="segment" if self.mode == "segment" else "layer",
                pin_first=self.pin_first,
                pin_last=self.pin_last,
            )
            if total <= own:
                return False
        return True


@dataclass(frozen=True)
class LayerAlignmentBatch(Sequence[LayerAlignment]):
    """The alignments of many problems, as arrays; indexing makes a :class:`LayerAlignment`.

    Attributes
    ----------
    deep_to_shallow
        ``(count, m)`` where the costs were a single array, else an array ``(m,)`` for each
        problem; -1 where a deep layer matches none.
    total_costs
        ``(count,)``: for each problem as in :class:`LayerAlignment`.
    costs, skips, mode, pin_first, pin_last, skips_shallow
        The problems. A single array of costs is not copied: do not change it while this lives.
    """

    deep_to_shallow: NDArray[np.int64] | tuple[NDArray[np.int64], ...]
    total_costs: NDArray[np.float64]
    costs: NDArray[np.float64] | tuple[NDArray[np.float64], ...]
    skips: NDArray[np.float64] | tuple[NDArray[np.float64], ...]
    mode: AlignmentMode
    pin_first: bool
    pin_last: bool
    skips_shallow: tuple[NDArray[np.float64], ...] | None = None

    def __len__(self) -> int:
        return len(self.total_costs)

    @overload
    def __getitem__(self, index: int) -> LayerAlignment: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerAlignment, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerAlignment | tuple[LayerAlignment, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return LayerAlignment(
            tuple(self.deep_to_shallow[index].tolist()),
            float(self.total_costs[index]),
            self.costs[index],
            self.skips[index],
            self.mode,
            self.pin_first,
            self.pin_last,
            None if self.skips_shallow is None else self.skips_shallow[index],
        )
