"""Layer costs and layer alignment beside what a user would write instead."""

from __future__ import annotations

import numpy as np

from benchmarks.row import Row
from clafusion import align_layers_batch


def numpy_alignment(cost):
    """Run the recursion, a deep unit at a time over all shallow units."""
    m, n = cost.shape
    matched = np.zeros((m, n), dtype=bool)
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    for deep in range(m):
        match = best[:-1] + cost[deep]
        matched[deep] = match < best[1:]
        best[1:] = np.where(matched[deep], match, best[1:])
    deep_to_shallow = np.full(m, -1)
    k = n
    for deep in range(m - 1, -1, -1):
        if k and matched[deep, k - 1]:
            k -= 1
            deep_to_shallow[deep] = k
    return deep_to_shallow


def scalar_alignment(cost):
    """Run the recursion cell by cell, as it is written."""
    m, n = cost.shape
    best = np.full((n + 1, m + 1), np.inf)
    best[0] = 0.0
    matched = np.zeros((n + 1, m + 1), dtype=bool)
    for k in range(1, n + 1):
        for deep in range(k, m + 1):
            match = best[k - 1, deep - 1] + cost[deep - 1, k - 1]
            stay = best[k, deep - 1]
            matched[k, deep] = match < stay
            best[k, deep] = min(match, stay)
    deep_to_shallow = np.full(m, -1)
    k = n
    for deep in range(m, 0, -1):
        if k and matched[k, deep]:
            k -= 1
            deep_to_shallow[deep - 1] = k
    return deep_to_shallow


def _alignments(name, peer, count, target):
    def make():
        costs = np.random.default_rng(0).random((10_000, 34, 18))

        def check(theirs, ours):
            np.testing.assert_array_equal(theirs, ours[:count])

        return Row(
            name,
            lambda: np.stack([peer(cost) for cost in costs[:count]]),
            lambda: align_layers_batch(costs).deep_to_shallow,
            check,
            target,
            peer_share=count / 10_000,
        )

    return make


MAKERS = [
    _alignments(
        "10,000 alignments of 34 x 18 | NumPy loop of the recursion (100 timed)",
        scalar_alignment,
        100,
        1000,
    ),
    _alignments(
        "10,000 alignments of 34 x 18 | NumPy loop, vectorised over columns (1000 timed)",
        numpy_alignment,
        1000,
        100,
    ),
]
