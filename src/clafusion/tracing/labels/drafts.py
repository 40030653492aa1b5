"""What a run on labels notes on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

__all__ = ["DraftPin", "DraftUse"]


@dataclass
class DraftUse:
    """A parameter view whose axes carry ids; it becomes a ``ParameterUse``.

    ``node`` is the operation that reads it first.
    """

    name: str
    role: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    axes: dict[int, Tensor] = field(default_factory=dict)
    directions: dict[int, Literal["out", "in"]] = field(default_factory=dict)
    node: fx.Node | None = None


@dataclass(frozen=True)
class DraftPin:
    """Channels that a rule does not follow, though they might change places.

    Attributes
    ----------
    atoms
        The atoms.
    node
        The operation.
    why
        What it does with them.
    as_wholes
        Whether the channels themselves can change places, but not the sets of them that it takes.
    with_elements
        Whether elements of parameters that no weight writes are meant, too.
    """

    atoms: Tensor
    node: fx.Node
    why: str
    as_wholes: bool = False
    with_elements: bool = False
