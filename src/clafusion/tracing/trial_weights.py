"""The weights that a proof runs with: a model's own or redrawn ones, made when they are read."""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from clafusion.execution.call import State
from clafusion.tracing.moves import Moves, moved, moved_rows, origin_of

__all__ = ["BaseWeights", "TrialWeights"]

_POOL = 1_000_003  # random numbers; a prime, so that no two rows of a matrix get the same ones
_KEPT = 2  # tensors: side by side, several walks read the same ones


class TrialWeights(Mapping[str, Tensor]):
    """Weights of a model in the type of a trial, after some moves.

    Redrawn weights are random, for zero gates and tiny scales would hide mistakes: uniform and
    scaled by the number of inputs, or in [0.5, 1.5) for vectors. They come out of one pool of
    random numbers, each tensor's from a place that its name decides, so that any rows of it can be
    made alone.

    Parameters
    ----------
    base
        What the weights are before the moves.
    dtype
        What floating-point tensors become; None to leave them.
    moves
        The moves.
    """

    def __init__(self, base: BaseWeights, dtype: torch.dtype | None, moves: Moves) -> None:
        self._base, self._dtype, self._moves = base, dtype, moves

    def __getitem__(self, name: str) -> Tensor:
        steps = self._moves.get(name, ())
        whole = self._base.whole(origin_of(name, steps))
        return self._typed(moved(whole, steps) if steps else whole)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base.own)

    def __len__(self) -> int:
        return len(self._base.own)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._base.own[name].shape)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows ``rows`` of a tensor, without making the others where that can be."""
        steps = self._moves.get(name, ())
        before = partial(self._base.rows, origin_of(name, steps))
        values = moved_rows(before, self.shape(name), rows, steps)
        return self[name][rows] if values is None else self._typed(values)

    def _typed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor


class BaseWeights:
    """A model's own weights, some of them drawn anew when they are read.

    Parameters
    ----------
    own
        Parameters, buffers and constants by name.
    redrawn
        The names of those that are drawn anew.
    seed
        Seed of the pool.
    """

    def __init__(self, own: State, redrawn: frozenset[str], seed: int) -> None:
        self.own, self._redrawn = own, redrawn
        self._last: OrderedDict[str, Tensor] = OrderedDict()
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.rand(_POOL, generator=generator) if redrawn else torch.empty(0)
        self._ring = torch.empty(0)  # the pool, and its beginning once more

    def whole(self, name: str) -> Tensor:
        """Return a tensor."""
        own = self.own[name]
        if name not in self._redrawn:
            return own
        if name not in self._last:
            while len(self._last) >= _KEPT:  # before another one is made
                self._last.popitem(last=False)
            self._last[name] = self._drawn(name, 0, own.numel()).view(own.shape)
        return self._last[name]

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows ``rows`` of a tensor; those of a redrawn one are drawn alone."""
        own = self.own[name]
        if name not in self._redrawn:
            return own[rows]
        width = math.prod(own.shape[1:])
        first = int(rows[0]) if len(rows) else 0
        if torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device)):
            drawn = self._drawn(name, first * width, len(rows) * width)
        else:
            starts = (zlib.crc32(name.encode()) + rows.cpu() * width) % _POOL
            drawn = self._scaled(name, self._from_pool(starts, width))
        return drawn.view(-1, *own.shape[1:])

    def _from_pool(self, starts: Tensor, width: int) -> Tensor:
        """Return as many random numbers from each of some places of the pool on, in new memory."""
        if len(self._ring) < _POOL + width - 1:
            times = -(-width // _POOL)
            self._ring = torch.cat([self._pool] * times + [self._pool[: width - 1]])
        return torch.index_select(self._ring.unfold(0, width, 1), 0, starts)

    def _drawn(self, name: str, first: int, count: int) -> Tensor:
        """Return ``count`` random elements of a tensor, from place ``first`` on."""
        drawn = torch.empty(count)
        start, done = (zlib.crc32(name.encode()) + first) % _POOL, 0
        while done < count:
            part = self._pool[start : start + count - done]
            drawn[done : done + len(part)] = part
            start, done = 0, done + len(part)
        return self._scaled(name, drawn)

    def _scaled(self, name: str, drawn: Tensor) -> Tensor:
        """Bring random numbers in [0, 1), in place, to where those of a tensor lie."""
        own = self.own[name]
        if own.dim() < 2:
            drawn += 0.5
        else:
            drawn = drawn.sub_(0.5).mul_(2 * (6 / max(math.prod(own.shape[1:]), 1)) ** 0.5)
        return drawn.to(own.device, own.dtype)
