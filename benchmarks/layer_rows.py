"""Layer costs and layer alignment beside what a user would write instead."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from benchmarks.peak import multiply_add_peak
from benchmarks.row import Row
from clafusion import _native, align_layers_batch
from clafusion.alignment.layer_costs import cka

SAMPLES = 400


def numpy_alignment(cost):
    """Run the recursion, a deep layer at a time over all shallow layers."""
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


def _median(work):
    times = []
    for _ in range(15):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


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
            note=lambda _: f"NumPy's sum over the costs alone: {1e3 * _median(costs.sum):.1f} ms",
        )

    return make


def _gram():
    x = torch.randn(SAMPLES, 65_536, generator=torch.Generator().manual_seed(0))

    def note(seconds):
        # The triangle's multiply-adds only: what a kernel that computes both does twice.
        rate = SAMPLES * (SAMPLES + 1) * x.size(1) / seconds
        peak = multiply_add_peak()
        return (
            f"{rate / 1e9:.0f} GFLOP/s on the triangle, {100 * rate / peak:.0f} % of the peak of "
            f"{peak / 1e9:.0f} measured after it (target 60 %), at which it would take "
            f"{1e3 * seconds * rate / peak:.1f} ms"
        )

    return Row(
        f"Gram matrix, {SAMPLES} x 65,536 | torch.mm",
        lambda: torch.mm(x, x.T),
        lambda: _native.gram(x),
        # float32 sums of 65,536 squares near 1
        lambda theirs, ours: np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-4, atol=0.5),
        5,
        note=note,
    )


def _resnets():
    """Make activations shaped as those of ResNet-34's and ResNet-18's convolutions on CIFAR."""
    generator = torch.Generator().manual_seed(0)
    # Layers share what they have in common, as layers do, so that the answers differ.
    common = torch.randn(SAMPLES, 65_536, generator=generator)
    stages = (65_536, 32_768, 16_384, 8_192)
    networks = []
    for depth, counts in enumerate([(7, 8, 12, 6), (5, 4, 4, 4)]):
        features = [size for size, count in zip(stages, counts, strict=True) for _ in range(count)]
        layers = []
        for i, size in enumerate(features):
            layer = torch.randn(SAMPLES, size, generator=generator)
            layer *= 0.2 + (i + depth) / len(features)
            layers.append(torch.relu_(layer.add_(common[:, :size])))
        networks.append(layers)
    return networks


def _centred(gram):
    return gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()


def _our_cka(deep, shallow):
    return cka([_native.gram(x) for x in deep], [_native.gram(x) for x in shallow])


def _cka_once():
    deep, shallow = _resnets()

    def peer():
        a, b = (
            torch.stack([_centred(torch.mm(x, x.T)).flatten() for x in one])
            for one in (deep, shallow)
        )
        return a @ b.T / (a.norm(dim=1)[:, None] * b.norm(dim=1))

    return Row(
        "CKA of all layers, ResNet-34 x ResNet-18 | a torch.mm for each layer, one product",
        peer,
        lambda: _our_cka(deep, shallow),
        lambda theirs, ours: np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4),
        4,
    )


def _cka_pairwise():
    deep, shallow = _resnets()
    # Every 32nd pair: 32 and 17 have no common divisor, so that all sizes meet.
    pairs = [(i, k) for i in range(len(deep)) for k in range(len(shallow))][::32]

    def pair(x, y):
        k, m = _centred(torch.mm(x, x.T)), _centred(torch.mm(y, y.T))
        return float((k * m).sum() / (k.norm() * m.norm()))

    def check(theirs, ours):
        np.testing.assert_allclose(theirs, [ours[one] for one in pairs], atol=1e-4)

    return Row(
        "CKA of all layers, ResNet-34 x ResNet-18 | two torch.mm for each pair (1/32 timed)",
        lambda: [pair(deep[i], shallow[k]) for i, k in pairs],
        lambda: _our_cka(deep, shallow),
        check,
        60,
        peer_share=len(pairs) / (len(deep) * len(shallow)),
    )


MAKERS = [
    _gram,
    _cka_once,
    _cka_pairwise,
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
