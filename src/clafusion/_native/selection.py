"""Which channels of networks that stand side by side are kept."""

from __future__ import annotations

from torch import Tensor

from clafusion import _core

__all__ = ["keep_lower", "lose_channels"]


def lose_channels(
    inverse: Tensor,
    products: Tensor,
    blocks: Tensor,
    read: Tensor,
    settled: Tensor,
    logs: Tensor,
    left: Tensor,
    lost: Tensor,
    count: int,
    *,
    cancelled: float,
) -> None:
    """Take away the channels that are missed least, in place: see ``csrc/selection/selection.hpp``.

    Matrices are contiguous, float64 and on the CPU; ``logs`` are ``(4, num_rows, num_features)``,
    ``left`` flags, ``lost`` int64. ``products`` are ``(num_features, num_features)``, or of few
    outputs the two sides of that product, ``(2, num_outputs, num_features)``.
    """
    _core.lose_channels(
        inverse.numpy(),
        products.numpy(),
        blocks.numpy(),
        read.numpy(),
        settled.numpy(),
        logs.numpy(),
        left.numpy(),
        lost.numpy(),
        count,
        cancelled,
    )


def keep_lower(matrix: Tensor, kept: Tensor) -> Tensor:
    """Return some rows and columns of a symmetric matrix, in its own memory.

    ``matrix`` is contiguous, float64 and on the CPU, ``kept`` int64 and ascending. The lower
    triangle is read and written; what stands above is of no use.
    """
    _core.keep_lower(matrix.numpy(), kept.numpy())
    return matrix.view(-1)[: len(kept) ** 2].view(len(kept), len(kept))
