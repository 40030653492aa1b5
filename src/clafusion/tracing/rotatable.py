"""Channel groups that admit any orthogonal map, and what such a map does to the weights.

A residual stream that is read through norms only may be rotated, for the mean square over its
channels stays as it is. First whatever tells its channels apart is *folded* into its neighbours,
which changes nothing that the network computes: gains and biases of norms go into the layers that
read them. A LayerNorm also takes off the mean over the channels. The writers put out none any
longer once it is projected out of them, and only maps that keep the vector of ones come into
question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.execution.call import State
from clafusion.execution.lazy import LazyState

__all__ = [
    "NormReader",
    "ReadNorm",
    "RotatableGroup",
    "ScaledWriter",
    "folded_state",
    "random_rotation",
    "rotated_state",
    "rotation_basis",
    "with_kept_directions",
]


@dataclass(frozen=True)
class NormReader:
    """A linear layer that reads what a norm puts out.

    Attributes
    ----------
    weight, axis
        Its weight, and the axis of that along which the channels enter.
    bias
        Its bias, where it has one.
    """

    weight: str
    axis: int
    bias: str | None


@dataclass(frozen=True)
class ReadNorm:
    """A norm over a channel group, and the layers that read what it puts out.

    Attributes
    ----------
    gain
        The parameter by which it multiplies the channels.
    offset
        What is added to that parameter: 1 where the norm multiplies by ``1 + gain``, else 0.
    bias
        The parameter that it adds, where it has one.
    readers
        All that read it.
    """

    gain: str
    offset: float
    bias: str | None
    readers: tuple[NormReader, ...]


@dataclass(frozen=True)
class ScaledWriter:
    """A linear layer whose outputs a parameter multiplies before they join the stream.

    Attributes
    ----------
    scale
        That parameter.
    weight, axis
        The layer's weight, and the axis of that along which the channels leave.
    bias
        Its bias, where it has one.
    """

    scale: str
    weight: str
    axis: int
    bias: str | None


@dataclass(frozen=True)
class RotatableGroup:
    """A channel group that admits any orthogonal map once its norms are folded.

    Attributes
    ----------
    name, atoms
        Those of the channel group.
    places
        The axes of parameters that a map moves.
    writers
        Those of them along which the channels leave.
    norms
        The norms to fold.
    scales
        The scales of writers to fold.
    is_centred
        Whether some norm takes off the mean over the channels, so that a map must keep that mean.
    """

    name: str
    atoms: Tensor
    places: tuple[tuple[str, int], ...]
    writers: tuple[tuple[str, int], ...]
    norms: tuple[ReadNorm, ...]
    scales: tuple[ScaledWriter, ...]
    is_centred: bool

    @property
    def size(self) -> int:
        """How many channels there are."""
        return len(self.atoms)


_Change = Callable[[Tensor], Tensor]


def folded_state(state: State, groups: Sequence[RotatableGroup]) -> LazyState[str]:
    """Return the weights of the same function with gains of 1, no biases of norms, and no means."""
    changes: dict[str, list[_Change]] = {}

    def change(name: str, *steps: _Change) -> None:
        changes.setdefault(name, []).extend(steps)

    for group in groups:
        for norm in group.norms:
            for reader in norm.readers:
                if norm.bias is not None and reader.bias is not None:
                    change(reader.bias, _plus_read(state, reader, norm.bias))
                change(reader.weight, _times(state, norm.gain, norm.offset, reader.axis))
            change(norm.gain, _filled(1.0 - norm.offset))
            if norm.bias is not None:
                change(norm.bias, _filled(0.0))
    # A scale multiplies what a bias has taken from a norm before, whichever group that is of.
    for group in groups:
        for scale in group.scales:
            change(scale.weight, _times(state, scale.scale, 0.0, scale.axis))
            if scale.bias is not None:
                change(scale.bias, _times(state, scale.scale, 0.0, 0))
            change(scale.scale, _filled(1.0))
    for group in groups:
        if group.is_centred:
            for name, axis in group.writers:
                change(name, _without_mean(axis))
    return _changed(state, changes)


def rotated_state(
    state: State, rotations: Sequence[tuple[RotatableGroup, Tensor]]
) -> LazyState[str]:
    """Return folded weights whose channels ``x`` of each group have become ``x @ rotation``."""
    changes: dict[str, list[_Change]] = {}
    for group, rotation in rotations:
        for name, axis in group.places:
            changes.setdefault(name, []).append(_rotated(rotation, axis))
    return _changed(state, changes)


def _changed(state: State, changes: dict[str, list[_Change]]) -> LazyState[str]:
    def make(name: str) -> Tensor:
        value = state[name]
        if name not in changes:
            return value
        result = value.double()
        for step in changes[name]:
            result = step(result)
        return result.to(value.dtype).contiguous()

    return LazyState(state, make)


def _times(state: State, gain: str, offset: float, axis: int) -> _Change:
    def step(value: Tensor) -> Tensor:
        return (value.movedim(axis, -1) * (state[gain].double().flatten() + offset)).movedim(
            -1, axis
        )

    return step


def _plus_read(state: State, reader: NormReader, bias: str) -> _Change:
    def step(value: Tensor) -> Tensor:
        weight = state[reader.weight].double().movedim(reader.axis, -1)
        return value + (weight @ state[bias].double().flatten()).view(value.shape)

    return step


def _filled(number: float) -> _Change:
    return lambda value: torch.full_like(value, number)


def _without_mean(axis: int) -> _Change:
    return lambda value: value - value.mean(axis, keepdim=True)


def _rotated(rotation: Tensor, axis: int) -> _Change:
    return lambda value: (value.movedim(axis, -1) @ rotation.to(value)).movedim(-1, axis)


def rotation_basis(size: int, *, is_centred: bool) -> Tensor:
    """Return an orthonormal basis, as columns, of the directions that a map is free to turn.

    Those are all, or with ``is_centred`` those orthogonal to the vector of ones.
    """
    identity = torch.eye(size, dtype=torch.float64)
    if not is_centred:
        return identity
    # The reflection that takes the first unit vector to that of ones; its first column is that.
    normal = identity[0] - torch.full((size,), size**-0.5, dtype=torch.float64)
    return (identity - 2 * torch.outer(normal, normal) / normal.square().sum())[:, 1:]


def random_rotation(group: RotatableGroup, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix that the group admits."""
    basis = rotation_basis(group.size, is_centred=group.is_centred)
    free = basis.size(1)
    drawn = torch.randn(free, free, generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(drawn)[0]
    return with_kept_directions(turned, basis)


def with_kept_directions(turned: Tensor, basis: Tensor) -> Tensor:
    """Return the map that turns the directions of a basis, and leaves all others as they are."""
    rotation: Tensor = basis @ turned @ basis.T - basis @ basis.T
    return rotation + torch.eye(len(basis)).to(basis)
