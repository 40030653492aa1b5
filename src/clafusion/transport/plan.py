r"""Transport plans that take no more memory than what they say.

A plan ``T (num_source, num_target)`` has two normalisations. Going out of a group (rows of a
weight, biases, norms) every target channel is an average of source channels,
``T_out = T / column sums``. Going into a group (columns of the next weight) the source's channel is
an average of target channels, ``x_source ~ T_in x_target`` with ``T_in = T / row sums``, so that
the weights of duplicated channels add up. For equal widths both agree. With a single normalisation,
a width ratio r would scale every layer by 1 / r.

As a matrix a plan of 8,192 channels takes 537 MB. Yet an assignment moves each channel to one
other, and exact transport of ``n`` channels to ``m`` has at most ``n + m - 1`` masses that are not
zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clafusion.errors import InputError
from clafusion.threads import one_thread

__all__ = ["Entries", "TransportPlan"]

_AT_ONCE = 1 << 22  # numbers that are held at a time, besides a plan and what it moves
_IN_CACHE = 1 << 18  # the same, where the memory is what takes time

# A term of a sparse product takes about as long as so many of a dense one.
_DENSE_PER_SPARSE = 32


class Entries(NamedTuple):
    """The masses of a plan that are not zero: by column, and within a column by row.

    Attributes
    ----------
    rows, columns
        Source and target channels, int32.
    masses
        float64.
    """

    rows: Tensor
    columns: Tensor
    masses: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class TransportPlan:
    """How much mass moves from each source channel to each target channel.

    It is held as its masses that are not zero; as a matrix if it has many; and as its size alone if
    it leaves every channel where it is. ``plan.dense()`` is the matrix.

    Attributes
    ----------
    shape
        ``(num_source, num_target)``.
    """

    shape: tuple[int, int]
    _entries: Entries | None = None  # without these and a matrix: the identity
    _matrix: Tensor | None = None  # of the type in which the solver found it
    _scale: float = 1.0  # what the matrix is multiplied by

    # --- how plans are made ---------------------------------------------------------------------

    @classmethod
    def identity(cls, size: int) -> TransportPlan:
        """Return the plan that leaves each of ``size`` channels, of mass 1, where it is."""
        return cls((size, size))

    @classmethod
    def from_rows(cls, rows: Tensor, num_source: int, mass: float = 1.0) -> TransportPlan:
        """Return the plan by which each target channel gets its mass from one source channel."""
        columns = torch.arange(len(rows), dtype=torch.int32)
        masses = torch.full((len(rows),), mass, dtype=torch.float64)
        return cls((num_source, len(rows)), Entries(rows.to(columns), columns, masses))

    @classmethod
    def from_columns(cls, columns: Tensor, num_target: int, mass: float = 1.0) -> TransportPlan:
        """Return the plan by which each source channel brings its mass to one target channel."""
        rows = columns.cpu().argsort(stable=True)
        masses = torch.full((len(columns),), mass, dtype=torch.float64)
        entries = Entries(rows.int(), columns.cpu()[rows].int(), masses)
        return cls((len(columns), num_target), entries)

    @classmethod
    def from_entries(
        cls, shape: tuple[int, int], rows: Tensor, columns: Tensor, masses: Tensor
    ) -> TransportPlan:
        """Return the plan of masses, in any order, that are not zero."""
        rows, columns, masses = rows.cpu(), columns.cpu(), masses.cpu().double()
        if len(masses) > _most_entries(shape):
            matrix = torch.zeros(shape, dtype=torch.float64)
            matrix[rows.long(), columns.long()] = masses
            return cls(shape, None, matrix)
        order = (columns.long() * shape[0] + rows.long()).argsort()
        return cls(shape, Entries(rows[order].int(), columns[order].int(), masses[order]))

    @classmethod
    def from_dense(cls, matrix: Tensor, scale: float = 1.0) -> TransportPlan:
        """Return the plan of a matrix, times ``scale``; it is kept only if few masses are zero."""
        matrix = matrix.detach().cpu()
        num_source, num_target = matrix.shape
        if int(matrix.count_nonzero()) > _most_entries((num_source, num_target)):
            if matrix.untyped_storage().nbytes() > matrix.nbytes:
                matrix = matrix.clone()  # else it would keep what lies around it
            return cls((num_source, num_target), None, matrix, scale)
        columns, rows = matrix.T.nonzero().unbind(1)
        masses = matrix[rows, columns].double() * scale
        return cls((num_source, num_target), Entries(rows.int(), columns.int(), masses))

    @classmethod
    def from_heads(
        cls,
        plans: Mapping[tuple[int, int], TransportPlan],
        masses: Mapping[tuple[int, int], float],
        counts: tuple[int, int],
    ) -> TransportPlan:
        """Return the plan of channels that move as wholes, head after head.

        Parameters
        ----------
        plans
            Source and target head -> the plan within them, all of one shape.
        masses
            By what each is multiplied.
        counts
            How many heads the source and the target have.
        """
        inner = next(iter(plans.values())).shape
        rows, columns, parts = [], [], []
        for (i, j), plan in plans.items():
            entries = plan.entries
            rows.append(entries.rows.long() + i * inner[0])
            columns.append(entries.columns.long() + j * inner[1])
            parts.append(entries.masses * masses[i, j])
        shape = counts[0] * inner[0], counts[1] * inner[1]
        return cls.from_entries(shape, torch.cat(rows), torch.cat(columns), torch.cat(parts))

    # --- what they say --------------------------------------------------------------------------

    @property
    def entries(self) -> Entries:
        """The masses that are not zero."""
        if self._entries is not None:
            return self._entries
        if self._matrix is not None:
            columns, rows = self._matrix.T.nonzero().unbind(1)
            masses = self._matrix[rows, columns].double() * self._scale
            return Entries(rows.int(), columns.int(), masses)
        diagonal = torch.arange(self.shape[0], dtype=torch.int32)
        return Entries(diagonal, diagonal, torch.ones(self.shape[0], dtype=torch.float64))

    def dense(self) -> Tensor:
        """Return the matrix ``(num_source, num_target)``, float64."""
        return self._columns(0, self.shape[1])

    @cached_property
    def row_sums(self) -> Tensor:
        """``(num_source,)``: the mass of each source channel, float64."""
        return self._sums(1)

    @cached_property
    def column_sums(self) -> Tensor:
        """``(num_target,)``: the mass of each target channel, float64."""
        return self._sums(0)

    @property
    def covered(self) -> Tensor:
        """``(num_target,)``: whether any mass moves into a target channel."""
        return self.column_sums > 0

    @cached_property
    def is_identity(self) -> bool:
        """Whether every channel stays where it is, with mass 1."""
        if self._matrix is not None or self.shape[0] != self.shape[1]:
            return False  # a matrix has more masses than the identity
        if self._entries is None:
            return True
        rows, columns, masses = self._entries
        return (
            len(rows) == self.shape[0] and torch.equal(rows, columns) and bool((masses == 1).all())
        )

    def copied_rows(self, *, leaves: bool) -> Tensor | None:
        """Return for each target channel the source's that it copies; None if one is a mixture.

        ``leaves`` says which normalisation counts: ``T_out``, or else ``T_in``.
        """
        return self._copied_out if leaves else self._copied_in

    def distance(self, other: TransportPlan, *, averages: bool = False) -> float:
        """Return the sum of how far the masses of two plans are apart.

        With ``averages`` it is that of both ``T_out``.
        """
        if self is other:
            return 0.0
        if self._matrix is None and other._matrix is None:
            parts = [
                one._weights(leaves=True) if averages else one.entries for one in (self, other)
            ]
            places = torch.cat([one.columns.long() * self.shape[0] + one.rows for one in parts])
            _, index = places.unique(return_inverse=True)
            apart = torch.zeros(len(places), dtype=torch.float64)
            apart.index_add_(0, index, torch.cat([parts[0].masses, -parts[1].masses]))
            return float(apart.abs().sum())
        total = 0.0
        for start, stop in _ranges(self.shape[1], self.shape[0], _AT_ONCE):
            ones = [one._columns(start, stop, leaves=averages or None) for one in (self, other)]
            total += float((ones[0] - ones[1]).abs().sum())
        return total

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TransportPlan):
            return NotImplemented
        return self.shape == other.shape and self.distance(other) == 0.0

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        held = "identity"
        if self._entries is not None:
            held = f"{len(self._entries.masses)} entries"
        elif self._matrix is not None:
            held = "dense"
        return f"TransportPlan({self.shape[0]} -> {self.shape[1]}, {held})"

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    # --- what they do ---------------------------------------------------------------------------

    def outgoing(self, values: Tensor, axis: int = 0) -> Tensor:
        """Return what leaves the channels on an axis, ``T_out^T x``: averages of the source's.

        A copy has the same bytes. Sums are taken in float64, in an order that depends on nothing
        else.
        """
        return self._moved(values, axis, leaves=True)

    def incoming(self, values: Tensor, axis: int = 0) -> Tensor:
        """Return what reads the channels on an axis, ``x^T T_in``: copies divide a weight."""
        return self._moved(values, axis, leaves=False)

    def transposed(self) -> TransportPlan:
        """Return the plan from the target to the source."""
        num_source, num_target = self.shape
        if self._matrix is not None:
            return TransportPlan((num_target, num_source), None, self._matrix.T, self._scale)
        if self._entries is None:
            return self
        rows, columns, masses = self._entries
        order = rows.argsort(stable=True)
        entries = Entries(columns[order], rows[order], masses[order])
        return TransportPlan((num_target, num_source), entries)

    # --- how ------------------------------------------------------------------------------------

    @cached_property
    def _copied_out(self) -> Tensor | None:
        return self._copied(leaves=True)

    @cached_property
    def _copied_in(self) -> Tensor | None:
        return self._copied(leaves=False)

    def _copied(self, *, leaves: bool) -> Tensor | None:
        if self._matrix is not None:
            return None  # it has more masses than columns
        rows, columns, weights = self._weights(leaves=leaves)
        every = torch.arange(self.shape[1], dtype=columns.dtype)
        is_copy = torch.equal(columns, every) and bool((weights == 1).all())
        return rows.long() if is_copy else None

    def _weights(self, *, leaves: bool) -> Entries:
        """Return the entries of ``T_out``, or of ``T_in``."""
        rows, columns, masses = self.entries
        sums = self.column_sums[columns.long()] if leaves else self.row_sums[rows.long()]
        return Entries(rows, columns, masses / torch.where(sums > 0, sums, 1.0))

    def _sums(self, axis: int) -> Tensor:
        sums = torch.zeros(self.shape[1 - axis], dtype=torch.float64)
        if self._matrix is None:
            entries = self.entries
            return sums.index_add_(0, entries[1 - axis].long(), entries.masses)
        for start, stop in _ranges(self.shape[0], self.shape[1], _AT_ONCE):
            part = self._matrix[start:stop].double().sum(axis)
            if axis == 0:
                sums += part
            else:
                sums[start:stop] = part
        return sums * self._scale

    def _columns(self, start: int, stop: int, *, leaves: bool | None = None) -> Tensor:
        """Return some columns of the matrix; with ``leaves`` those of ``T_out`` or ``T_in``."""
        if self._matrix is not None:
            part = self._matrix[:, start:stop].double() * self._scale
        else:
            rows, columns, masses = self.entries
            first, last = torch.searchsorted(columns, columns.new_tensor([start, stop])).tolist()
            part = torch.zeros(self.shape[0], stop - start, dtype=torch.float64)
            part[rows[first:last].long(), columns[first:last].long() - start] = masses[first:last]
        if leaves is None:
            return part
        sums = self.column_sums[start:stop] if leaves else self.row_sums[:, None]
        return part.div_(torch.where(sums > 0, sums, 1.0))

    def _moved(self, values: Tensor, axis: int, *, leaves: bool) -> Tensor:
        if values.size(axis) != self.shape[0]:
            raise InputError(
                f"values must have one entry for each of {self.shape[0]} source channels in axis "
                f"{axis}; got shape {tuple(values.shape)}: give the axis of the channels"
            )
        rows = self.copied_rows(leaves=leaves)
        if rows is not None:
            return values.index_select(axis, rows.to(values.device))
        axis %= values.dim()
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        flat = values.reshape(math.prod(before), self.shape[0], math.prod(after))
        found = flat.new_empty(flat.size(0), self.shape[1], flat.size(2))
        is_sparse = self._is_sparse
        product = (self._sparse if is_sparse else self._dense)(values.device, leaves=leaves)
        at_once = _IN_CACHE if is_sparse else _AT_ONCE
        for lead, trail in _pieces(flat.size(0), max(self.shape), flat.size(2), at_once):
            found[lead, :, trail] = product(flat[lead, :, trail].double()).to(found)
        return found.view(*before, self.shape[1], *after)

    @property
    def _is_sparse(self) -> bool:
        if self._matrix is not None:
            return False
        return len(self.entries.masses) * _DENSE_PER_SPARSE <= self.shape[0] * self.shape[1]

    def _sparse(self, device: torch.device, *, leaves: bool) -> Callable[[Tensor], Tensor]:
        """Return what moves ``(lead, num_source, trail)`` to the target's channels by entries."""
        terms = [
            Entries(*(part.to(device) for part in one))
            for one in _terms(self._weights(leaves=leaves), self.shape[1])
        ]
        return lambda x: _sparse_product(x, terms, self.shape[1])

    def _dense(self, device: torch.device, *, leaves: bool) -> Callable[[Tensor], Tensor]:
        """Return what moves ``(lead, num_source, trail)`` to the target's channels by a matrix."""

        def weights(start: int, stop: int) -> Tensor:
            return self._columns(start, stop, leaves=leaves).to(device)

        ranges = list(_ranges(self.shape[1], self.shape[0], _AT_ONCE))
        if len(ranges) == 1:
            whole = weights(*ranges[0])
            return lambda x: _dense_product(x, whole)
        return lambda x: torch.cat([_dense_product(x, weights(*one)) for one in ranges], 1)


def _most_entries(shape: tuple[int, int]) -> int:
    """Return with how many entries a plan takes little memory, and moves as fast as a matrix."""
    return max(sum(shape), shape[0] * shape[1] // _DENSE_PER_SPARSE)


def _ranges(count: int, size: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of ``count`` rows of ``size`` numbers each, of few enough to be held."""
    step = max(at_once // max(size, 1), 1)
    yield from ((start, min(start + step, count)) for start in range(0, count, step))


def _pieces(lead: int, size: int, trail: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Yield where the parts of a tensor ``(lead, size, trail)`` lie that are moved at a time."""
    for first, last in _ranges(trail, size, at_once):
        for start, stop in _ranges(lead, size * (last - first), at_once):
            yield slice(start, stop), slice(first, last)


def _terms(weights: Entries, num_target: int) -> list[Entries]:
    """Return the first terms of all columns, then the second ones, and so on."""
    rows, columns, factors = (one.long() if i < 2 else one for i, one in enumerate(weights))
    counts = torch.bincount(columns, minlength=num_target)
    turns = torch.arange(len(columns)) - (counts.cumsum(0) - counts)[columns]
    order = turns.argsort(stable=True)
    sizes = torch.bincount(turns).tolist()
    parts = [one[order].split(sizes) for one in (rows, columns, factors)]
    return [Entries(*one) for one in zip(*parts, strict=True)]


def _sparse_product(x: Tensor, terms: list[Entries], num_target: int) -> Tensor:
    """Return the sums over the middle axis; each column's terms are added in their order."""
    if x.size(2) == 1 < x.size(0):  # whole rows are taken and added much faster than single numbers
        return _sparse_product(x.transpose(0, 2).contiguous(), terms, num_target).transpose(0, 2)
    found = x.new_zeros(x.size(0), num_target, x.size(2))
    for rows, columns, factors in terms:  # no column twice: on a GPU too, nothing is added at once
        found.index_add_(1, columns, x.index_select(1, rows).mul_(factors[:, None]))
    return found


def _dense_product(x: Tensor, weights: Tensor) -> Tensor:
    """Return the sums over the middle axis: the same bytes for any threads and any axis."""
    rows = x.transpose(1, 2)
    with one_thread():
        found = rows.reshape(-1, rows.size(2)) @ weights
    return found.view(*rows.shape[:2], -1).transpose(1, 2)
