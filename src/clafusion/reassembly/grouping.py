"""Blocks of several models -> groups of blocks that can stand for each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clafusion.reassembly.blocks import Block

__all__ = ["block_distances", "grouped"]

_ROUNDS = 100


def block_distances(into: NDArray[np.float64], out: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``1 / (CKA of the inputs + CKA of the outputs)`` of all pairs (arXiv 2308.08643)."""
    return np.asarray(1.0 / np.maximum(into + out, 1e-6))


def grouped(
    blocks: Sequence[Block], distances: NDArray[np.float64], count: int
) -> tuple[tuple[int, ...], ...]:
    """Return ``count`` groups of blocks, in the order in which a network passes them.

    The blocks that begin a model are the first group and those that end one the last, for nothing
    else can stand there. The others are parted by their medoids: at first those of the first model,
    then in turn each block goes to the nearest medoid, and each group takes that of its blocks as
    its medoid that is nearest to all of them.

    Parameters
    ----------
    blocks
        All blocks; each model has ``count``.
    distances
        Of every two.
    count
        How many groups.
    """
    first = tuple(i for i, one in enumerate(blocks) if one.start is None)
    last = tuple(i for i, one in enumerate(blocks) if one.end is None)
    inner = [i for i in range(len(blocks)) if i not in first and i not in last]
    medoids = inner[: count - 2]
    member = np.zeros(len(inner), dtype=int)
    for _ in range(_ROUNDS):
        member = distances[np.ix_(inner, medoids)].argmin(1) if medoids else member
        for place, medoid in enumerate(medoids):  # a group is never empty
            member[inner.index(medoid)] = place
        found = []
        for place in range(len(medoids)):
            own = [one for one, of in zip(inner, member, strict=True) if of == place]
            found.append(own[int(distances[np.ix_(own, own)].sum(1).argmin())])
        if found == medoids:
            break
        medoids = found
    parts = [
        tuple(one for one, of in zip(inner, member, strict=True) if of == place)
        for place in range(len(medoids))
    ]
    parts.sort(key=lambda own: float(np.mean([blocks[one].index for one in own])))
    return (first, *parts, last)
