"""What a GPU makes of Sinkhorn and layer costs: ``python -m benchmarks.gpu_rows``.

Peers and ours work on tensors that are on the GPU already; times are CUDA events', answers are
compared. The figures go to ``benchmarks/results/gpu.json``. ``--small`` solves one small problem by
each kernel instead and compares with the CPU: for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ot
import torch

import clafusion
from benchmarks.results import write_results
from benchmarks.row import Row, measure
from clafusion._native import cuda_devices
from clafusion.alignment.layer_costs import cka, linear_cka
from clafusion.transport.sinkhorn import sinkhorn
from clafusion.transport.solve import solve_transport

TOLERANCE = 1e-4
EPSILON = 0.05

# Both stop by a marginal error; plans are apart by that over one minus the contraction, and POT's
# error is the L2 norm of one marginal: up to sqrt(4096) times smaller than ours.
PLANS_APART = 5e-2

# A warp's lanes with 4, 8, 16 and 32 columns, a cluster, stripes of few and of many columns, wide.
SMALL = [(20, 30), (40, 200), (20, 400), (20, 1000), (260, 260), (700, 720), (120, 2000), (6, 5000)]


def gpu_clock(work: Callable[[], Any]) -> float:
    """Run once and return the seconds between two CUDA events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def costs_of(count: int, size: int, device: torch.device) -> torch.Tensor:
    """Squared distances of Gaussian points in 16 dimensions, as between neurons' activations."""
    draw = torch.Generator().manual_seed(0)
    source = torch.randn(count, size, 16, generator=draw)
    target = torch.randn(count, size, 16, generator=draw)
    return torch.cdist(source, target).square().to(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes, the best of some."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = [gpu_clock(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.numel() * 4 / min(times)


def _one_by_one(costs, method):
    size = costs.shape[-1]
    weights = torch.full((size,), 1 / size, device=costs.device)
    scaled = [EPSILON * float(cost.max()) for cost in costs]

    def solve():
        return [
            ot.sinkhorn(
                weights, weights, cost, own, method=method, stopThr=TOLERANCE, numItermax=10_000
            )
            for cost, own in zip(costs, scaled, strict=True)
        ]

    return solve


def _batched(costs):
    count, size, _ = costs.shape
    scaled = costs / costs.amax((1, 2), keepdim=True)
    weights = torch.full((count, size), 1 / size, device=costs.device)

    def solve():
        return ot.batch.solve_batch(
            scaled, EPSILON, weights, weights, max_iter=10_000, tol=TOLERANCE
        ).plan

    return solve


def _by_ott(costs):
    """The problems mapped over by JAX, in one program compiled at the first call."""
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    solver = Sinkhorn(threshold=TOLERANCE, max_iterations=10_000)

    @jax.jit
    @jax.vmap
    def plan(cost):
        return solver(LinearProblem(Geometry(cost, epsilon=EPSILON * cost.max()))).matrix

    given = jax.dlpack.from_dlpack(costs)
    return lambda: torch.from_dlpack(plan(given).block_until_ready())


def sinkhorn_row(device, count, size, peer, target, *, share=None, bandwidth=None):
    """Ours beside POT or OTT; of a loop one part of the problems stands for all."""
    costs = costs_of(count, size, device)
    given = costs[: share or count]
    makers = {"batch": _batched, "ott-jax vmap": _by_ott}
    work = makers[peer](given) if peer in makers else _one_by_one(given, peer)
    name = peer if peer == "ott-jax vmap" else f"POT {peer}"
    note = f", {len(given)} of them" if len(given) < count else ""

    def check(theirs, ours):
        assert bool(ours.converged.all())
        for their, our in zip(theirs, ours.plan, strict=False):
            apart = float((their.double() - our.double()).abs().sum())
            assert apart < PLANS_APART, apart
        marginals = (ours.plan.double().sum(2) - 1 / size).abs().sum(1)
        assert float(marginals.max()) < 1.1 * TOLERANCE

    def solve():
        return sinkhorn(costs, epsilon=EPSILON, tolerance=TOLERANCE)

    def read(seconds):
        iterations = int(solve().iterations.sum())
        rate = 4 * iterations * size * size / seconds
        shown = f"{iterations} iterations, each over its costs once: {rate / 1e9:.0f} GB/s"
        return shown if bandwidth is None else f"{shown}, {rate / bandwidth:.0%} of a copy's"

    return Row(
        f"Sinkhorn, {count} of {size} x {size} | {name}{note}",
        work,
        solve,
        check,
        target,
        peer_share=len(given) / count,
        note=read,
    )


def cka_row(device, samples, target):
    """All pairs of ResNet-34's and ResNet-18's blocks on CIFAR images."""
    draw = torch.Generator(device=device).manual_seed(0)

    def layers(blocks):
        shapes = [64 * 32 * 32 >> i for i, count in enumerate(blocks) for _ in range(count)]
        return [torch.randn(samples, size, generator=draw, device=device) for size in shapes]

    deep, shallow = layers([3, 4, 6, 3]), layers([2, 2, 2, 2])

    def peer():
        def centred(layers):
            grams = torch.stack([x @ x.T for x in layers])
            grams -= grams.mean(1, keepdim=True)
            grams -= grams.mean(2, keepdim=True)
            flat = grams.flatten(1)
            return flat / flat.norm(dim=1, keepdim=True)

        return centred(deep) @ centred(shallow).T

    def check(theirs, ours):
        apart = abs(theirs.cpu().numpy() - ours).max()
        assert apart < 1e-3, apart  # float32 sums over up to 65,536 features

    return Row(
        f"CKA of ResNet-34 and -18, {samples} samples | one Gram a layer, one product, in torch",
        peer,
        lambda: linear_cka(deep, shallow),
        check,
        target,
    )


def assignment_row(device, count, size, target):
    """What stays on the host: copied there, solved by the compiled solver."""
    from scipy.optimize import linear_sum_assignment

    costs = list(costs_of(count, size, device))

    def peer():
        return [linear_sum_assignment(cost.double().cpu().numpy()) for cost in costs]

    def check(theirs, ours):
        for cost, (rows, columns), our in zip(costs, theirs, ours, strict=True):
            best = float(cost.double().cpu()[rows, columns].sum()) / size
            assert math.isclose(float(our.cost), best, rel_tol=1e-9)

    return Row(
        f"{count} assignments of {size} neurons, costs on the GPU | SciPy on the host",
        peer,
        lambda: solve_transport(costs, solver="assignment"),
        check,
        target,
    )


def makers(device: torch.device) -> list[Callable[[], Row]]:
    """Every row, made when it is its turn: together they would not fit."""
    bandwidth = copy_bandwidth(device)
    ott = []
    if importlib.util.find_spec("ott") is not None:
        ott = [
            lambda: sinkhorn_row(device, 1024, 128, "ott-jax vmap", 10),
            lambda: sinkhorn_row(device, 64, 512, "ott-jax vmap", 5),
        ]
    return [
        *ott,
        lambda: sinkhorn_row(device, 1024, 128, "sinkhorn", 10, share=16),
        lambda: sinkhorn_row(device, 1024, 128, "sinkhorn_log", 10, share=8),
        lambda: sinkhorn_row(device, 1024, 128, "batch", 10),
        lambda: sinkhorn_row(device, 64, 512, "sinkhorn", 5, share=16),
        lambda: sinkhorn_row(device, 64, 512, "batch", 5),
        lambda: sinkhorn_row(device, 1, 4096, "sinkhorn", 2, bandwidth=bandwidth),
        lambda: cka_row(device, 2048, 1.5),
        lambda: assignment_row(device, 16, 256, 1),
        lambda: assignment_row(device, 4, 1024, 1),
    ]


def run_small(device: torch.device) -> None:
    """Solve a problem by each kernel, beside the CPU."""
    for n, m in SMALL:
        draw = torch.Generator().manual_seed(n + m)
        cost = torch.rand(n, m, generator=draw)
        expected = sinkhorn(cost, epsilon=0.1)
        found = sinkhorn(cost.to(device), epsilon=0.1)
        apart = float((found.plan.cpu() - expected.plan).abs().sum())
        assert bool(found.converged)
        assert apart < 1e-4, (n, m, apart)
        print(f"{n} x {m}: {int(found.iterations)} iterations, plans {apart:.1e} apart")
    grams = [torch.rand(40, 40, generator=draw).to(device) for _ in range(2)]
    cka([one @ one.T for one in grams], [grams[0] @ grams[0].T])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one small problem by each kernel")
    arguments = parser.parse_args()
    names, reason = cuda_devices()
    if not names or not torch.cuda.is_available():
        raise SystemExit(f"gpu_rows: no GPU can be used: {reason or 'PyTorch finds none'}")
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.small:
        run_small(device)
        return
    results = []
    print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}\n")
    print("| work and peer | peer | ours | ratio | target |\n|---|---|---|---|---|")
    for make in makers(device):
        torch.cuda.empty_cache()
        found = measure(make(), clock=gpu_clock)
        results.append(asdict(found))
        print(
            f"| {found.name.replace(' | ', ' beside ')} | {1e3 * found.peer_seconds:.2f} ms "
            f"| {1e3 * found.our_seconds:.2f} ms | {found.ratio:.1f}x | {found.target:g}x |"
            + (f" {found.note}" if found.note else ""),
            flush=True,
        )
    build = clafusion.build_info()
    driver = torch.cuda.get_device_properties(device)
    about = {
        "device": driver.name,
        "multiprocessors": driver.multi_processor_count,
        "torch_cuda": torch.version.cuda,
        "pot": ot.__version__,
        "copy_bytes_a_second": copy_bandwidth(device),
    }
    write_results("gpu", {"gpu": about, "build": build, "rows": results})


if __name__ == "__main__":
    main()
