"""The GPU's inner loops, compiled for the host: the very same code, teams made of threads."""

import numpy as np
import pytest

from clafusion.transport.sinkhorn import sinkhorn
from tests.support.transport_problems import problem, sinkhorn_ref, weights

TEAMS = {
    "a thread": {},
    "2 warps of 4": {"threads": 8, "lanes": 4},
    "3 blocks of 2 warps of 2": {"threads": 4, "lanes": 2, "peers": 3},
    "stream": {"stream": True},
    "stream, 3 threads": {"stream": True, "threads": 3},
    "stream, more columns than registers": {"stream": True, "wide": True, "threads": 2},
}


class Solution:
    def __init__(self, compiled, cost, a, b, initial=None, **options):
        cost = np.ascontiguousarray(cost, dtype=np.float32)
        a, b = np.ascontiguousarray(a, float), np.ascontiguousarray(b, float)
        n, m = cost.shape
        self.plan = np.full((n, m), np.nan, dtype=np.float32)
        self.f, self.g = np.full(n, np.nan), np.full(m, np.nan)
        reals, whole = np.full(2, np.nan), np.full(2, -1)
        assert compiled.solve(
            options.get("stream", False),
            options.get("wide", False),
            options.get("threads", 1),
            options.get("lanes", 1),
            options.get("peers", 1),
            cost.ctypes.data,
            n,
            m,
            a.ctypes.data,
            b.ctypes.data,
            None if initial is None else initial.ctypes.data,
            options.get("epsilon", 0.05),
            options.get("tolerance", 1e-6),
            options.get("max_iterations", 10_000),
            options.get("relaxation", np.inf),
            self.plan.ctypes.data,
            self.f.ctypes.data,
            self.g.ctypes.data,
            reals.ctypes.data,
            reals.ctypes.data + 8,
            whole.ctypes.data,
            whole.ctypes.data + 8,
        )
        self.cost, self.error = reals
        self.iterations, self.status = whole


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (13, 15), (37, 16)])
@pytest.mark.parametrize("epsilon", [0.05, pytest.param(1e-3, marks=pytest.mark.nightly)])
def test_equals_the_reference(compiled, team, shape, epsilon):
    cost = problem(*shape).numpy()
    a, b = weights(shape[0], 1).numpy(), weights(shape[1], 2).numpy()
    # Close to exact transport the reference needs more iterations than a test may take.
    tolerance = 1e-6 if epsilon > 0.01 else 1e-5
    found = Solution(compiled, cost, a, b, epsilon=epsilon, tolerance=tolerance, **TEAMS[team])
    assert found.status == 1
    error = np.abs(found.plan.sum(1) - a).sum() + np.abs(found.plan.sum(0) - b).sum()
    assert error <= tolerance + 2e-7  # float32 rounds each entry by 6e-8 of itself
    expected = sinkhorn_ref(cost.astype(float), a, b, epsilon * cost.max(), iterations=200_000)
    # Off by the marginal error over one minus the contraction, and by 1e-7 / epsilon.
    assert np.abs(found.plan - expected).sum() < 100 * tolerance + 1e-6 / epsilon
    exponent = found.f[:, None] + found.g - cost
    unit = epsilon * cost.max() if cost.max() > 0 else epsilon
    assert np.abs(np.exp(exponent / unit) - found.plan).sum() < 1e-6 / epsilon
    assert found.cost == pytest.approx((found.plan * cost.astype(float)).sum(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("relaxation", [1.0, 0.05])
def test_soft_marginals(compiled, team, relaxation):
    cost = problem(13, 16).numpy()
    a, b = 3 * weights(13, 1).numpy(), 2 * weights(16, 2).numpy()
    found = Solution(compiled, cost, a, b, epsilon=0.02, relaxation=relaxation, **TEAMS[team])
    assert found.status == 1
    unit = float(cost.max())
    expected = sinkhorn_ref(cost.astype(float), a, b, 0.02 * unit, relaxation * unit)
    assert np.abs(found.plan - expected).sum() < 1e-4 * expected.sum()


@pytest.mark.parametrize("team", TEAMS)
def test_zero_weights_and_any_mass(compiled, team):
    cost = problem(13, 15).numpy()
    a, b = weights(13, 1).numpy(), weights(15, 2).numpy()
    a[[0, 7]] = b[[3, 14]] = 0.0
    a *= 1e6 / a.sum()
    b *= 1e6 / b.sum()
    found = Solution(compiled, cost, a, b, epsilon=0.01, **TEAMS[team])
    assert found.status == 1
    assert np.isneginf(found.f[[0, 7]]).all()
    assert np.isneginf(found.g[[3, 14]]).all()
    assert found.plan[[0, 7]].sum() == found.plan[:, [3, 14]].sum() == 0.0
    rows, columns = a > 0, b > 0
    expected = sinkhorn_ref(
        cost[rows][:, columns].astype(float),
        a[rows] / 1e6,
        b[columns] / 1e6,
        0.01 * float(cost.max()),
    )
    assert np.abs(found.plan[rows][:, columns] / 1e6 - expected).sum() < 1e-4


@pytest.mark.parametrize("team", TEAMS)
def test_a_warm_start_and_one_from_far_away(compiled, team):
    cost = problem(13, 15).numpy()
    a, b = np.full(13, 1 / 13), np.full(15, 1 / 15)
    options = {"epsilon": 0.01, **TEAMS[team]}
    cold = Solution(compiled, cost, a, b, **options)
    warm = Solution(compiled, cost, a, b, cold.g, **options)
    assert warm.iterations <= 3 < cold.iterations
    far = 500 * float(cost.max()) * np.random.default_rng(0).normal(size=15)
    started = Solution(compiled, cost, a, b, far, **options)
    for other in (warm, started):
        assert other.status == 1
        assert np.abs(other.plan - cold.plan).sum() < 2e-5


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("most", [1, 2, 3, 5, 20])
def test_stopped_anywhere_the_error_is_the_plans(compiled, team, most):
    cost = problem(13, 15).numpy()
    a, b = weights(13, 1).numpy(), weights(15, 2).numpy()
    found = Solution(compiled, cost, a, b, epsilon=1e-3, max_iterations=most, **TEAMS[team])
    assert found.iterations == most
    assert found.status == 0
    error = np.abs(found.plan.sum(1) - a).sum() + np.abs(found.plan.sum(0) - b).sum()
    assert found.error == pytest.approx(error, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_told(compiled, team, bad):
    cost = problem(13, 15).numpy()
    cost[11, 3] = bad
    found = Solution(compiled, cost, np.ones(13) / 13, np.ones(15) / 15, **TEAMS[team])
    assert found.status == 2


@pytest.mark.parametrize("team", TEAMS)
def test_costs_of_any_size_and_shift(compiled, team):
    cost = problem(13, 15).numpy()
    a, b = weights(13, 1).numpy(), weights(15, 2).numpy()
    plain = Solution(compiled, cost, a, b, **TEAMS[team])
    scaled = Solution(compiled, cost * np.float32(2.0**90), a, b, **TEAMS[team])
    assert np.array_equal(scaled.plan, plain.plan)  # a power of 2 rounds nothing
    nothing = Solution(compiled, np.zeros((13, 15)), a, b, **TEAMS[team])
    assert nothing.plan == pytest.approx(np.outer(a, b), rel=1e-5)
    shifted = cost - 2 * cost.max()
    epsilon = 0.05 * float(cost.max()) / float(np.abs(shifted).max())
    negative = Solution(compiled, shifted, a, b, epsilon=epsilon, **TEAMS[team])
    assert np.abs(negative.plan - plain.plan).sum() < 1e-4


@pytest.mark.parametrize("team", ["2 warps of 4", "3 blocks of 2 warps of 2", "stream, 3 threads"])
def test_the_same_bytes_each_time(compiled, team):
    cost = problem(13, 15).numpy()
    a, b = weights(13, 1).numpy(), weights(15, 2).numpy()
    first, second = (Solution(compiled, cost, a, b, epsilon=0.01, **TEAMS[team]) for _ in range(2))
    assert first.plan.tobytes() == second.plan.tobytes()
    assert first.iterations == second.iterations


@pytest.mark.parametrize("stream", [False, True])
def test_equals_the_cpus_solver(compiled, stream):
    cost = problem(90, 60)
    a, b = weights(90, 1), weights(60, 2)
    ours = sinkhorn(cost, a, b, epsilon=0.01)
    found = Solution(compiled, cost, a.numpy(), b.numpy(), epsilon=0.01, stream=stream)
    # Both meet the tolerance; the plans' distance is it over one minus the contraction.
    assert np.abs(ours.plan.numpy() - found.plan).sum() < 2e-5
    assert found.cost == pytest.approx(float(ours.cost), rel=1e-5)


FIELDS = ["kernel", "columns", "peers", "threads", "shared_bytes", "workspace_bytes"]
HOPPER, AMPERE = (232_448 - 2048, 8), (101_376 - 2048, 1)


def plan(compiled, n, m, device):
    found = np.full(6, -1)
    assert compiled.plan(n, m, *device, found.ctypes.data)
    return dict(zip(FIELDS, found.tolist(), strict=True))


def test_small_problems_stay_in_shared_memory_and_large_ones_stream(compiled):
    small = plan(compiled, 128, 128, HOPPER)
    assert small == {
        "kernel": 0,
        "columns": 4,
        "peers": 1,
        "threads": 256,
        # The matrix, 3 numbers a row, 4 a column, and 8 warps' and 2 more sums for each column
        # and one more; 8 bytes for the cost.
        "shared_bytes": 8 + 4 * (128 * 128 + 3 * 128 + 4 * 128 + 10 * 129),
        "workspace_bytes": 0,
    }
    assert plan(compiled, 1, 1, HOPPER)["kernel"] == 0
    cluster = plan(compiled, 512, 512, HOPPER)
    assert (cluster["kernel"], cluster["peers"]) == (0, 8)
    assert plan(compiled, 512, 512, AMPERE)["kernel"] == 1
    assert plan(compiled, 200, 200, AMPERE)["kernel"] == 1
    large = plan(compiled, 4096, 4096, HOPPER)
    assert (large["kernel"], large["columns"], large["threads"]) == (1, 8, 512)
    assert large["workspace_bytes"] >= 256 * 4097 * 4  # 256 stripes' column sums
    wide = plan(compiled, 3, 100_000, HOPPER)
    assert (wide["kernel"], wide["columns"]) == (1, 0)


@pytest.mark.parametrize("device", [HOPPER, AMPERE, (47_000, 1)])
def test_every_shape_has_a_kernel_that_holds_it(compiled, device):
    sides = [1, 2, 31, 32, 33, 100, 127, 128, 129, 256, 257, 500, 512, 513, 1024, 1025, 5000, 10**6]
    for n in sides:
        for m in sides:
            launch = plan(compiled, n, m, device)
            assert launch["threads"] % 32 == 0
            assert launch["threads"] <= 512
            if launch["kernel"] == 0:
                assert launch["columns"] * 32 >= m
                assert 4 * n * m / launch["peers"] < launch["shared_bytes"] <= device[0]
                assert launch["peers"] in (1, 2, 4, 8)
                assert launch["peers"] <= device[1]
            else:
                assert launch["columns"] in (0, 8)
                assert launch["columns"] == 0 or launch["columns"] * launch["threads"] >= m
                assert launch["workspace_bytes"] % 256 == 0


def test_shapes_that_are_none_are_refused(compiled):
    for shape in [(0, 5), (5, 0), (-1, 3), (2**31, 1), (1, 2**40)]:
        assert not compiled.plan(*shape, *HOPPER, np.empty(6, np.int64).ctypes.data)
