"""The elements of label tensors: atoms (>= 0) and fixed ids (< 0), and how ids are made.

A fixed id names a value that moves with no channel. Ids are hashes: equal values get equal ids
without a table. They have 50 bits, so that a float64 holds them exactly.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "collapse",
    "combine",
    "fixed_ids",
    "mix",
    "salt",
    "sequence_ids",
    "value_ids",
    "varies_along",
]


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def salt(text: str) -> NDArray[np.uint64]:
    """Return a word ``(1,)`` that stands for a text."""
    return mix(np.array([zlib.crc32(text.encode())], dtype=np.uint64))


def _words(ids: Tensor) -> NDArray[np.uint64]:
    """Return ids as the 64-bit words that :func:`mix` takes."""
    return ids.numpy().view(np.uint64) if ids.is_contiguous() else _words(ids.contiguous())


def _as_fixed(words: NDArray[np.uint64]) -> Tensor:
    """Return words as fixed ids: negative, and exact in a float64."""
    return -1 - torch.from_numpy((words >> np.uint64(14)).view(np.int64))


def fixed_ids(text: str, shape: Sequence[int]) -> Tensor:
    """Return a different fixed id for every element of ``shape``, made from ``text``."""
    count = int(np.prod(shape, dtype=np.int64))
    words = mix(np.arange(count, dtype=np.uint64) + salt(text))
    return _as_fixed(words).reshape(tuple(shape))


def value_ids(values: Tensor) -> Tensor:
    """Return fixed ids that are equal where the values are equal."""
    if values.is_complex():
        parts = torch.view_as_real(values)
        return combine("complex", [value_ids(parts[..., 0]), value_ids(parts[..., 1])])
    words = values.detach().to("cpu", torch.float64).contiguous().numpy().view(np.uint64)
    return _as_fixed(mix(np.array(words, ndmin=1))).reshape(values.shape)


def combine(text: str, operands: Sequence[Tensor]) -> Tensor:
    """Return the fixed ids of the elementwise function ``text`` of fixed elements.

    The operands broadcast. Equal ids in give equal ids out.
    """
    broadcast = torch.broadcast_tensors(*operands)
    words = np.broadcast_to(salt(text), (broadcast[0].numel(),))
    for ids in broadcast:
        words = mix(words ^ _words(ids.reshape(-1)))
    return _as_fixed(words).reshape(broadcast[0].shape)


def sequence_ids(ids: Tensor) -> Tensor:
    """Return one fixed id for each row ``(..., k)``, equal where the rows are equal."""
    ranks = mix(np.arange(ids.size(-1), dtype=np.uint64))
    sums = np.asarray(mix(_words(ids) ^ ranks).sum(-1, dtype=np.uint64))
    return _as_fixed(sums.reshape(-1)).reshape(ids.shape[:-1])


def collapse(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Broadcast tensors; shrink to size 1 every axis along which none of them varies."""
    collapsed = torch.broadcast_tensors(*tensors)
    if collapsed[0].numel() == 0:
        return tuple(collapsed)
    for axis in reversed(range(collapsed[0].dim())):
        if not any(varies_along(ids, axis) for ids in collapsed):
            collapsed = tuple(ids.narrow(axis, 0, 1) for ids in collapsed)
    return tuple(collapsed)


def varies_along(ids: Tensor, axis: int) -> bool:
    """Return whether any two elements that differ only in their place on ``axis`` are unequal."""
    if ids.size(axis) == 1 or ids.stride(axis) == 0:
        return False
    # torch.equal stops at the first difference; comparing with != would go through all elements.
    return not torch.equal(ids, ids.narrow(axis, 0, 1).expand_as(ids))
