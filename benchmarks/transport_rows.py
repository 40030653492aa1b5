"""Sinkhorn and assignment beside POT."""

from __future__ import annotations

import numpy as np
import ot
import torch

from benchmarks.row import Row
from clafusion.transport.sinkhorn import sinkhorn
from clafusion.transport.solve import solve_transport

# How far two plans that both meet the tolerance may lie apart, in L1: each is off by its marginal
# error times the inverse of one minus the iteration's contraction.
PLANS_APART = 1e-3


def _costs(count, size):
    """Squared distances of Gaussian points in 16 dimensions, as between neurons' activations."""
    draw = torch.Generator().manual_seed(0)
    source = torch.randn(count, size, 16, generator=draw)
    target = torch.randn(count, size, 16, generator=draw)
    return torch.cdist(source, target).square()


def _one_by_one(costs, epsilon, method, convert):
    """POT's own loop, one problem after another, to 1e-6 in L2: more lenient than our L1."""
    size = costs.shape[-1]
    weights = convert(torch.full((size,), 1 / size, dtype=torch.float64))
    problems = [convert(cost.double()) for cost in costs]
    scaled = [epsilon * float(cost.abs().max()) for cost in costs]

    def solve():
        return [
            ot.sinkhorn(
                weights, weights, cost, own, method=method, stopThr=1e-6, numItermax=100_000
            )
            for cost, own in zip(problems, scaled, strict=True)
        ]

    return solve


def _batched(costs, epsilon):
    """POT's batch solver, which has one epsilon and one stop for all: costs are scaled to 1."""
    count, size, _ = costs.shape
    scaled = costs / costs.abs().amax((1, 2), keepdim=True)
    weights = torch.full((count, size), 1 / size)

    def solve():
        return ot.batch.solve_batch(
            scaled, epsilon, weights, weights, max_iter=100_000, tol=1e-6
        ).plan

    return solve


_PEERS = {
    "POT sinkhorn": lambda c, e: _one_by_one(c, e, "sinkhorn", lambda x: x.numpy()),
    "POT sinkhorn, torch float32": lambda c, e: _one_by_one(c, e, "sinkhorn", lambda x: x.float()),
    "POT sinkhorn_log": lambda c, e: _one_by_one(c, e, "sinkhorn_log", lambda x: x.numpy()),
    "POT batch": _batched,
}


def _sinkhorn(count, size, epsilon, peer, target):
    def make():
        costs = _costs(count, size)

        def check(theirs, ours):
            assert bool(ours.converged.all())
            for their, our in zip(theirs, ours.plan, strict=True):
                apart = np.abs(np.asarray(their, dtype=np.float64) - our.double().numpy()).sum()
                assert apart < PLANS_APART, apart

        def iterations_alone(seconds):
            count_ = int(sinkhorn(costs, epsilon=epsilon).iterations.sum())
            rate = count_ * size * size / seconds / 1e9
            return f"{count_} iterations, {rate:.1f} kernel entries a nanosecond"

        return Row(
            f"Sinkhorn, {count} of {size} x {size}, epsilon {epsilon} | {peer}",
            _PEERS[peer](costs, epsilon),
            lambda: sinkhorn(costs, epsilon=epsilon),
            check,
            target,
            note=iterations_alone,
        )

    return make


def _assignment(name, sizes, target):
    """Layers of so many neurons."""

    def make():
        draw = torch.Generator().manual_seed(0)
        costs = []
        for size in sizes:
            source, target_ = torch.randn(2, size, 64, generator=draw)
            costs.append(torch.cdist(source, target_).double())

        def peer():
            plans = []
            for cost in costs:
                weights = np.full(len(cost), 1 / len(cost))
                plans.append(ot.emd(weights, weights, cost.numpy()))
            return plans

        def check(theirs, ours):
            for cost, their, our in zip(costs, theirs, ours, strict=True):
                best = float((cost.numpy() * their).sum())
                assert abs(float(our.cost) - best) <= 1e-9 * best

        return Row(
            f"{name} | POT emd, one by one",
            peer,
            lambda: solve_transport(costs),
            check,
            target,
        )

    return make


MAKERS = [
    *(
        _sinkhorn(count, size, epsilon, peer, target)
        for count, size, epsilon, least in [
            (64, 256, 0.05, 5),
            (64, 256, 0.01, 5),
            (1, 1024, 0.05, 3),
            (1, 1024, 0.01, 3),
        ]
        for peer in _PEERS
        # The batch solver would take minutes at the smaller epsilon.
        if peer != "POT batch" or epsilon == 0.05
        for target in [10 if "log" in peer and count > 1 else least]
    ),
    _assignment("50 assignments of 64 to 512 neurons", [64, 128, 256, 384, 512] * 10, 3),
    _assignment("2 assignments of 2048 neurons", [2048] * 2, 3),
]
