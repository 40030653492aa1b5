"""The weights that a proof runs with: a model's own or redrawn ones, made when they are read."""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from clafusion.execution.call import State
from clafusion.tracing.moves import Moves, moved, moved_rows

__all__ = ["MovedWeights", "TrialWeights"]

_POOL = 1_000_003  # random numbers; a prime, so that no two rows of a matrix get the same ones
_KEPT = 4  # tensors: side by side, several walks read the same ones


class TrialWeights(Mapping[str, Tensor]):
    """Weights of a model in the type of a trial.

    Redrawn weights are random, for zero gates and tiny scales would hide mistakes: uniform and
    scaled by the number of inputs, or in [0.5, 1.5) for vectors. They come out of one pool of
    random numbers, each tensor's from a place that its name decides, so that any rows of it can be
    made alone.

    Parameters
    ----------
    own
        Parameters, buffers and constants by name.
    dtype
        What floating-point tensors become; None to leave them.
    redrawn
        The names of those that are drawn anew.
    seed
        Seed of the pool.
    """

    def __init__(
        self, own: State, dtype: torch.dtype | None, redrawn: frozenset[str], seed: int
    ) -> None:
        self._own, self._dtype, self._redrawn = own, dtype, redrawn
        self._last: OrderedDict[str, Tensor] = OrderedDict()
        generator = torch.Generator().manual_seed(seed)
        self._pool = (
            torch.rand(_POOL, generator=generator, dtype=torch.float64) if redrawn else None
        )

    def __getitem__(self, name: str) -> Tensor:
        if name in self._last:
            self._last.move_to_end(name)
            return self._last[name]
        own = self._own[name]
        shape = tuple(own.shape)
        if name in self._redrawn:
            value = self._scaled(self._drawn(name, 0, math.prod(shape)).view(shape), shape)
            value = value.to(own.device, self._dtype or own.dtype)
        else:
            value = self._typed(own)
        self._last[name] = value
        if len(self._last) > _KEPT:
            self._last.popitem(last=False)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._own[name].shape)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows ``rows`` of a tensor; those of a redrawn one are drawn alone."""
        own = self._own[name]
        if name not in self._redrawn:
            return self._typed(own[rows])
        shape = tuple(own.shape)
        width = math.prod(shape[1:])
        first = int(rows[0]) if len(rows) else 0
        if torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device)):
            drawn = self._drawn(name, first * width, len(rows) * width)
        else:
            drawn = torch.cat([self._drawn(name, row * width, width) for row in rows.tolist()])
        value = self._scaled(drawn.view(-1, *shape[1:]), shape)
        return value.to(own.device, self._dtype or own.dtype)

    def _typed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor

    def _drawn(self, name: str, first: int, count: int) -> Tensor:
        """Return numbers of the pool, from place ``first`` of a tensor on."""
        assert self._pool is not None
        start = (zlib.crc32(name.encode()) + first) % _POOL
        parts = []
        while count > 0:
            parts.append(self._pool[start : start + count])
            count, start = count - len(parts[-1]), 0
        return parts[0] if len(parts) == 1 else torch.cat([self._pool[:0], *parts])

    @staticmethod
    def _scaled(drawn: Tensor, shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 2:
            return drawn + 0.5
        return (2 * drawn - 1) * (6 / max(math.prod(shape[1:]), 1)) ** 0.5


class MovedWeights(Mapping[str, Tensor]):
    """Weights after some moves, each made when it is read."""

    def __init__(self, weights: TrialWeights, moves: Moves) -> None:
        self._weights, self._moves = weights, moves

    def __getitem__(self, name: str) -> Tensor:
        steps = self._moves.get(name, ())
        return moved(self._weights[name], steps) if steps else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._weights.shape(name)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows ``rows`` of a tensor after the moves."""
        steps = self._moves.get(name, ())
        wanted: Tensor | None = moved_rows(
            lambda before: self._weights.rows(name, before), self.shape(name), rows, steps
        )
        if wanted is None:
            wanted = self[name][rows]
        return wanted
