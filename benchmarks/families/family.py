"""A family of networks: members of any depth and width, made from a library's own classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["EXACT", "PAIRS", "Family", "Inputs", "Size", "images", "tokens", "values"]

Inputs = tuple[Tensor, ...]

Size = tuple[int, int]
"""How many layers more than the smallest, and how many times its channels (1 or 2)."""

PAIRS: dict[str, tuple[Size, Size]] = {
    "depth": ((1, 1), (0, 1)),
    "width": ((0, 2), (0, 1)),
    "both": ((1, 1), (0, 2)),
}
"""What differs in a pair, and the sizes of its two networks. The first has the deeper structure."""

EXACT = 1e-4
"""How far outputs may be apart by rounding, relative to the largest."""


@dataclass(frozen=True)
class Family:
    """Networks of one family.

    ``make(depth, width)`` returns a network of a :data:`Size`, in eval mode with random weights,
    and its inputs.
    """

    library: str
    name: str
    make: Callable[[int, int], tuple[nn.Module, Inputs]]


def tokens(seed: int = 0, length: int = 12, vocabulary: int = 48) -> Tensor:
    """Return sentences of tokens none of which is special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocabulary, (4, length), generator=generator)


def values(*shape: int) -> Tensor:
    """Return normal values; the first axis is the batch."""
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))


def images(size: int = 32) -> Tensor:
    """Return square images of three channels."""
    return values(3, size, size)
