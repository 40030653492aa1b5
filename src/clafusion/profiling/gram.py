"""Inner products of layers' outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clafusion import _native

__all__ = ["add_products", "gram_matrix", "gram_of_parts", "is_constant"]

_BLOCK_FEATURES = 4096
_CONSTANT = 1e-12  # of the squared length: less is rounding
_WIDE = 1 << 24  # numbers of a layer's outputs that are copied at once


def gram_matrix(flat: Tensor) -> Tensor:
    """Return ``X X^T`` of samples ``(num_samples, num_features)`` in float64, where they are.

    On the CPU by :func:`clafusion._native.gram`. Elsewhere PyTorch multiplies blocks of features in
    float32 and adds them up in float64; it is for PyTorch's settings to say whether TF32 may stand
    in for float32.
    """
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    add_products(total, flat)
    return total


def add_products(total: Tensor, flat: Tensor) -> None:
    """Add the inner products of all samples with the first ones to ``total``.

    ``total`` is ``(num_samples, num_leading)``, in float64. It becomes the first columns of what
    :func:`gram_matrix` returns.
    """
    if flat.device.type == "cpu":
        _native.gram(flat, leading=total.size(1), out=total.numpy())
        return
    for block in flat.split(_BLOCK_FEATURES, dim=1):
        block = block.float()
        total += block @ block[: total.size(1)].T


def gram_of_parts(flat: Sequence[Tensor]) -> Tensor:
    """Return :func:`gram_matrix` of samples in parts, of which no second copy is made.

    The bytes are the same: the kernel adds up blocks of so many features anyway.
    """
    features = flat[0].size(1)
    if flat[0].device.type != "cpu" or sum(one.numel() for one in flat) <= _WIDE:
        return gram_matrix(torch.cat(list(flat)))
    count = sum(len(one) for one in flat)
    total = np.zeros((count, count))
    width = max(_WIDE // (count * _BLOCK_FEATURES), 1) * _BLOCK_FEATURES
    for start in range(0, features, width):
        block = torch.cat([one[:, start : start + width] for one in flat])
        total = _native.gram(block, out=total)
    return torch.from_numpy(total)


def is_constant(products: Tensor) -> bool:
    """Say whether values are the same for all inputs, given their inner products, or are NaN."""
    total = float(products.trace())
    spread = total - float(products.sum()) / len(products)
    return not spread > _CONSTANT * total
