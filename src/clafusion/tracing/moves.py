"""Moves of channels within parameters, as indices: where each part of a tensor comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from clafusion.execution.call import State
from clafusion.tracing.model import ChannelGroup, ParameterUse
from clafusion.tracing.ties import identity_of

__all__ = [
    "Move",
    "Moves",
    "Place",
    "joined",
    "moved",
    "moved_rows",
    "moves_between",
    "origin_of",
    "permutation_moves",
    "permute_channels",
    "replacements",
]

Place: TypeAlias = "tuple[ParameterUse, int, Tensor]"
"""Positions on an axis of a parameter view."""


@dataclass(frozen=True)
class Move:
    """A view of a tensor is taken from a view of the same tensor, indexed along some axes.

    Attributes
    ----------
    target, source
        The views. Heads of a grouped convolution are views of their own, and change places. Where
        they are of two parameters, the whole of one becomes the other: see :func:`origin_of`.
    indices
        For each axis that is indexed: the position of the source for each position of the target.
    """

    target: ParameterUse
    source: ParameterUse
    indices: Mapping[int, Tensor]

    @property
    def is_whole(self) -> bool:
        """Whether the view is the whole parameter, which moves within itself."""
        target = self.target
        expected, whole = 1, target == self.source and target.offset == 0
        for size, stride in zip(reversed(target.size), reversed(target.stride), strict=True):
            whole = whole and (stride == expected or size == 1)
            expected *= size
        return whole

    def taken(self, view: Tensor) -> Tensor:
        """Return a copy of ``view``, of the source's shape, as the target's."""
        for axis, index in self.indices.items():
            view = _taken(view, axis, index)
        return view


Moves: TypeAlias = Mapping[str, tuple[tuple[Move, ...], ...]]
"""For each parameter what moves, step by step; the moves of one step touch disjoint parts."""


def moves_between(pairs: Iterable[tuple[Place, Place]]) -> dict[str, tuple[tuple[Move, ...], ...]]:
    """Return the moves, in one step, that bring to each first place what is at the second."""
    by_use: dict[ParameterUse, tuple[ParameterUse, dict[int, Tensor]]] = {}
    for (target, axis, places), (source, _, sources) in pairs:
        _, indices = by_use.setdefault(target, (source, {}))
        index = indices.setdefault(axis, torch.arange(target.size[axis]))
        index[places.reshape(-1)] = sources.reshape(-1)
    by_name: dict[str, list[Move]] = {}
    for target, (source, indices) in by_use.items():
        by_name.setdefault(target.parameter, []).append(Move(target, source, indices))
    return {name: (tuple(moves),) for name, moves in by_name.items()}


def replacements(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Moves:
    """Return the moves, in one step, by which each parameter becomes another one of its shape.

    ``names`` has that other one for each.
    """

    def whole(name: str) -> ParameterUse:
        return ParameterUse(name, "whole", shapes[name], (), 0, -1)

    return {name: ((Move(whole(name), whole(other), {}),),) for name, other in names.items()}


def origin_of(name: str, steps: Sequence[Sequence[Move]]) -> str:
    """Return the parameter that a parameter is before some moves: itself, or another one."""
    return steps[0][0].source.parameter if _starts_elsewhere(steps) else name


def _starts_elsewhere(steps: Sequence[Sequence[Move]]) -> bool:
    return bool(steps) and steps[0][0].source.parameter != steps[0][0].target.parameter


def joined(*several: Moves) -> dict[str, tuple[tuple[Move, ...], ...]]:
    """Return the moves of several changes that come one after another."""
    result: dict[str, tuple[tuple[Move, ...], ...]] = {}
    for moves in several:
        before = dict(result)
        for name, steps in moves.items():
            if _starts_elsewhere(steps):
                (start,), *rest = steps
                other = start.source.parameter
                earlier = before.get(other, ())
                if _starts_elsewhere(earlier):
                    start = replace(start, source=earlier[0][0].source)
                    earlier = earlier[1:]
                back = start.source.parameter == name
                result[name] = (*(() if back else ((start,),)), *earlier, *rest)
            else:
                result[name] = (*before.get(name, ()), *steps)
    return result


def permutation_moves(
    groups: Sequence[ChannelGroup], permutations: Sequence[Tensor]
) -> dict[str, tuple[tuple[Move, ...], ...]]:
    """Return the moves that bring channel ``permutation[i]`` of each group to place ``i``."""
    return moves_between(
        (
            (one.use, one.axis, one.positions),
            (one.use, one.axis, one.positions[permutation.cpu()]),
        )
        for group, permutation in zip(groups, permutations, strict=True)
        for one in group.axes
    )


def moved(tensor: Tensor, steps: Sequence[Sequence[Move]]) -> Tensor:
    """Return a contiguous tensor after some moves, contiguous as well; it stays as it is.

    ``tensor`` is the parameter that :func:`origin_of` names.
    """
    for moves in steps[_starts_elsewhere(steps) :]:
        if len(moves) == 1 and moves[0].is_whole and moves[0].target.size == tuple(tensor.shape):
            tensor = moves[0].taken(tensor)
            continue
        result = tensor.clone()
        for move in moves:
            move.target.view(result).copy_(move.taken(move.source.view(tensor)))
        tensor = result
    return tensor


def moved_rows(
    rows_of: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    rows: Tensor,
    steps: Sequence[Sequence[Move]],
) -> Tensor | None:
    """Return some rows of a tensor after some moves; None where only the whole can be moved.

    Parameters
    ----------
    rows_of
        Returns those rows of the tensor before the moves.
    shape
        The tensor's shape.
    rows
        Which rows, counted after the moves.
    steps
        The moves.
    """
    steps = steps[_starts_elsewhere(steps) :]
    wholes = [moves[0] for moves in steps if len(moves) == 1 and moves[0].is_whole]
    if len(wholes) < len(steps) or any(one.target.size != shape for one in wholes):
        return None
    for move in reversed(wholes):
        rows = move.indices[0][rows.cpu()].to(rows) if 0 in move.indices else rows
    values = rows_of(rows)
    for move in wholes:
        for axis, index in move.indices.items():
            values = values if axis == 0 else _taken(values, axis, index)
    return values


def _taken(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Return ``tensor.index_select(axis, index)``, by NumPy where that is faster."""
    if tensor.is_cpu and tensor.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.take(tensor.detach().numpy(), index.numpy(), axis))
    return tensor.index_select(axis, index.to(tensor.device))


def permute_channels(
    state: State, groups: Sequence[ChannelGroup], permutations: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return a copy of ``state`` in which channel ``permutation[i]`` has moved to place ``i``.

    Parameters
    ----------
    state
        Parameters and buffers by name. Entries that are one tensor, as a state dict has of tied
        parameters, move together.
    groups
        The groups to permute.
    permutations
        For each group a permutation ``(size,)``.
    """
    moves = permutation_moves(groups, permutations)
    names = {identity_of(state[name]): name for name in moves}
    permuted = {
        name: moved(tensor.detach().contiguous(), moves[name])
        if name in moves
        else tensor.detach().clone()
        for name, tensor in state.items()
    }
    for name, tensor in state.items():
        moved_as = names.get(identity_of(tensor))
        if moved_as is not None:
            permuted[name] = permuted[moved_as]
    return permuted
