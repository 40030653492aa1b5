"""The CUDA source itself, run on the host: launches, shuffles and block sums as fibers.

What this cannot show: races that only threads side by side have (test_sinkhorn_block.py looks for
those under ThreadSanitizer), and what a GPU's arithmetic rounds.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from clafusion.transport.sinkhorn import sinkhorn
from tests.support.transport_problems import problem, weights

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
AMPERE, TINY = 101_376, 8_000  # bytes of shared memory; with few of them nearly all is streamed


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("host") / "host.so"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    shared = ["sinkhorn/cuda/launch_plan.cpp", "sinkhorn/validation.cpp"]
    sources = [HERE / "sinkhorn_cuda_on_host.cpp", *map(CSRC.joinpath, shared)]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, *flags, f"-I{HERE / 'host_cuda'}", f"-I{CSRC}", "-o", path, *sources],
        check=True,
    )
    return ctypes.CDLL(str(path))


def address(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


class Solved:
    def __init__(self, library, shapes, initial=None, **options):
        self.costs = [problem(*shape) for shape in shapes]
        self.a = [weights(n, 1) for n, _ in shapes]
        self.b = [weights(m, 2) for _, m in shapes]
        self.settings = {
            "epsilon": options.get("epsilon", 0.05),
            "tolerance": options.get("tolerance", 1e-6),
            "max_iterations": options.get("max_iterations", 10_000),
            "marginal_relaxation": options.get("relaxation"),
        }
        sizes = np.array(shapes, dtype=np.int64).reshape(-1, 2)
        cost = np.concatenate([np.empty(0, np.float32), *(c.numpy().ravel() for c in self.costs)])
        a, b = (np.concatenate([np.empty(0), *(x.numpy() for x in s)]) for s in (self.a, self.b))
        plan = np.full(cost.size, np.nan, dtype=np.float32)
        self.f, self.g = np.full(a.size, np.nan), np.full(b.size, np.nan)
        self.totals, self.errors = np.full((2, len(shapes)), np.nan)
        self.iterations, self.status = np.full((2, len(shapes)), -1)
        launches, message = ctypes.c_int(), ctypes.create_string_buffer(200)
        relaxation = self.settings["marginal_relaxation"]
        failed = library.solve_on_host(
            ctypes.c_int64(len(shapes)),
            *map(address, (sizes, cost, a, b, initial)),
            ctypes.c_double(self.settings["epsilon"]),
            ctypes.c_double(self.settings["tolerance"]),
            ctypes.c_int64(self.settings["max_iterations"]),
            ctypes.c_double(np.inf if relaxation is None else relaxation),
            options.get("shared_bytes", AMPERE),
            options.get("capability", 8),
            options.get("failing_launch", -1),
            *map(address, (plan, self.f, self.g, self.totals, self.errors)),
            *map(address, (self.iterations, self.status)),
            ctypes.byref(launches),
            message,
        )
        if failed:
            raise RuntimeError(message.value.decode())
        self.launches = launches.value
        parts = np.split(plan, np.cumsum(sizes.prod(1)))[:-1]
        self.plans = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def assert_equal_to_the_cpu(self):
        expected = sinkhorn(self.costs, self.a, self.b, **self.settings)
        assert self.status.tolist() == [1] * len(expected)
        for i, one in enumerate(expected):
            # Both meet the tolerance of 1e-6; apart by that over one minus the contraction.
            assert np.abs(one.plan.numpy() - self.plans[i]).sum() < 5e-5
            assert self.totals[i] == pytest.approx(float(one.cost), rel=1e-4)
            assert self.errors[i] <= 1e-6
        assert np.isfinite(self.f).all()
        assert np.isfinite(self.g).all()


RAGGED = [(20, 30), (5, 5), (40, 33), (3, 300), (9, 70), (1, 1)]


@pytest.mark.parametrize("shared_bytes", [AMPERE, TINY])
@pytest.mark.parametrize(("epsilon", "relaxation"), [(0.05, None), (0.05, 0.5)])
def test_a_ragged_batch_equals_the_cpus(library, shared_bytes, epsilon, relaxation):
    options = {"epsilon": epsilon, "relaxation": relaxation, "shared_bytes": shared_bytes}
    Solved(library, RAGGED, **options).assert_equal_to_the_cpu()


def test_one_launch_for_all_problems_of_a_kind(library):
    small = Solved(library, [(20, 30), (5, 5), (40, 33)] * 3)
    assert small.launches == 1
    small.assert_equal_to_the_cpu()
    # Lanes with 4, 8, 16 and 32 columns.
    kinds = Solved(library, [(5, 100), (5, 200), (5, 400), (5, 800), (5, 100)])
    assert kinds.launches == 4
    kinds.assert_equal_to_the_cpu()


@pytest.mark.slow
def test_more_columns_than_registers(library):
    wide = Solved(library, [(2, 4100), (20, 30)], epsilon=0.2)
    wide.assert_equal_to_the_cpu()


@pytest.mark.parametrize("shared_bytes", [AMPERE, TINY])
def test_bytes_depend_on_the_problem_alone(library, shared_bytes):
    together = Solved(library, RAGGED, shared_bytes=shared_bytes)
    for i, shape in enumerate(RAGGED[:4]):
        alone = Solved(library, [shape], shared_bytes=shared_bytes)
        assert alone.plans[0].tobytes() == together.plans[i].tobytes()


@pytest.mark.parametrize("shared_bytes", [AMPERE, TINY])
def test_a_warm_start_and_a_limit(library, shared_bytes):
    cold = Solved(library, [(20, 30), (9, 70)], epsilon=0.01, shared_bytes=shared_bytes)
    warm = Solved(library, [(20, 30), (9, 70)], cold.g, epsilon=0.01, shared_bytes=shared_bytes)
    assert max(warm.iterations) <= 3
    warm.assert_equal_to_the_cpu()
    short = Solved(
        library, [(20, 30), (9, 70)], epsilon=1e-3, max_iterations=5, shared_bytes=shared_bytes
    )
    assert short.status.tolist() == [0, 0]
    assert short.iterations.tolist() == [5, 5]


@pytest.mark.parametrize("relaxation", [None, pytest.param(0.5, marks=pytest.mark.nightly)])
def test_clusters_of_blocks(library, relaxation):
    # 2 to 8 blocks of 16 kB, the last of which have a row less or none.
    shapes = [(90, 40), (101, 50), (150, 70), (9, 250)]
    options = {"relaxation": relaxation, "shared_bytes": 16_000, "capability": 9}
    found = Solved(library, shapes, **options)
    assert found.launches <= 4  # streaming takes more
    found.assert_equal_to_the_cpu()
    assert Solved(library, shapes[2:3], **options).plans[0].tobytes() == found.plans[2].tobytes()


def test_an_empty_batch_launches_nothing(library):
    assert Solved(library, []).launches == 0


@pytest.mark.parametrize(
    ("launch", "kernel"),
    [
        (0, "sinkhorn_resident"),
        (1, "sinkhorn_look"),
        (2, "sinkhorn_start"),
        (3, "sinkhorn_stripe"),
        (4, "sinkhorn_tile"),
        (5, "sinkhorn_judge"),
        (51, "sinkhorn_write"),
        (52, "sinkhorn_finish"),
    ],
)
def test_a_launch_that_fails_names_its_kernel(library, launch, kernel):
    with pytest.raises(RuntimeError, match=f"CUDA kernel {kernel}: cudaErrorLaunchFailure"):
        Solved(library, [(5, 5), (20, 90)], epsilon=0.5, shared_bytes=TINY, failing_launch=launch)


def test_costs_that_are_not_finite_are_told(library, monkeypatch):
    bad = torch.ones(20, 90)
    bad[7, 8] = float("nan")
    monkeypatch.setitem(globals(), "problem", lambda n, m: bad if m == 90 else torch.ones(n, m))
    for shared_bytes in (AMPERE, TINY):
        found = Solved(library, [(5, 5), (20, 90)], shared_bytes=shared_bytes)
        assert found.status.tolist() == [1, 2]
