"""Transport solvers against POT, a log-domain reference and answers known by construction."""

import os
import signal
import threading
import time
import warnings

import numpy as np
import ot
import pytest
import torch

from clafusion import ConvergenceWarning, InputError, Sinkhorn, _core, _native
from clafusion.transport.sinkhorn import sinkhorn
from clafusion.transport.solve import LARGEST_EXACT, _choose, solve_transport
from tests.support.transport_problems import problem, sinkhorn_ref, weights


def assert_marginals(solution, a, b, bound):
    plan = solution.plan.double()
    error = (plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()
    # float32 rounds each entry of the plan by 6e-8 of itself, on top of the reported error.
    assert float(error) <= bound + 2e-7
    assert float(error) == pytest.approx(float(solution.marginal_error), abs=2e-7)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (31, 33), (64, 32), (130, 257)])
@pytest.mark.parametrize("epsilon", [0.2, 0.03])
def test_sinkhorn_equals_the_reference(shape, epsilon):
    n, m = shape
    cost, a, b = problem(n, m), weights(n, 1), weights(m, 2)
    found = sinkhorn(cost, a, b, epsilon=epsilon)
    expected = sinkhorn_ref(
        cost.double().numpy(), a.numpy(), b.numpy(), epsilon * float(cost.max())
    )
    assert bool(found.converged)
    assert found.status == "converged"
    assert_marginals(found, a, b, 1e-6)
    # A marginal error of 1e-6 leaves the plan that far off, times the iteration's slowness.
    assert np.abs(found.plan.numpy() - expected).sum() < 5e-5
    assert float(found.cost) == pytest.approx((cost.numpy() * expected).sum(), rel=1e-4)


@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_sinkhorn_equals_pot(epsilon):
    cost, a, b = problem(80, 60), weights(80, 3), weights(60, 4)
    expected = ot.sinkhorn(
        a.numpy(),
        b.numpy(),
        cost.double().numpy(),
        epsilon * float(cost.max()),
        method="sinkhorn_log",
        stopThr=1e-10,
        numItermax=20_000,
    )
    found = sinkhorn(cost, a, b, epsilon=epsilon)
    assert np.abs(found.plan.numpy() - expected).sum() < 5e-5


def test_a_large_epsilon_gives_the_outer_product():
    a, b = weights(20, 1), weights(30, 2)
    found = sinkhorn(problem(20, 30), a, b, epsilon=1e5)
    # Entries deviate by the factor e^(2 / epsilon) at most.
    torch.testing.assert_close(found.plan.double(), torch.outer(a, b), rtol=3e-5, atol=0)


def test_a_small_epsilon_finds_a_permutation():
    order = np.random.default_rng(0).permutation(50)
    cost = torch.ones(50, 50)
    cost[torch.arange(50), order] = 0.0
    found = sinkhorn(cost, epsilon=1e-3)
    expected = torch.zeros(50, 50)
    expected[torch.arange(50), order] = 1 / 50
    torch.testing.assert_close(found.plan, expected, rtol=0, atol=1e-7)  # e^-1000 is 0
    assert float(found.cost) == pytest.approx(0.0, abs=1e-6)


def test_epsilon_of_a_thousandth_is_stable_and_close_to_exact():
    cost = problem(64, 64)
    found = sinkhorn(cost, epsilon=1e-3, max_iterations=100_000)
    exact = solve_transport([cost], solver="exact")[0]
    assert bool(found.converged)
    # The entropy's share: at most epsilon * log(n m) above the exact cost.
    excess = float(found.cost - exact.cost)
    assert -1e-5 * float(cost.max()) < excess < 1e-3 * float(cost.max()) * np.log(64 * 64)


def test_a_transposed_problem_has_the_transposed_plan():
    cost, a, b = problem(40, 70), weights(40, 1), weights(70, 2)
    one = sinkhorn(cost, a, b, epsilon=0.05)
    other = sinkhorn(cost.T, b, a, epsilon=0.05)
    assert float((one.plan - other.plan.T).abs().sum()) < 2e-5


def test_potentials_give_the_plan():
    cost = problem(30, 40).double()
    found = sinkhorn(cost, epsilon=0.05)
    unit = 0.05 * float(cost.max())
    f, g = found.source_potential, found.target_potential
    plan = torch.exp((f[:, None] + g - cost) / unit)
    # Exponents of some 20 in float32 are off by 2e-6.
    torch.testing.assert_close(found.plan, plan, rtol=2e-5, atol=1e-30)
    assert found.plan.dtype == torch.float64
    assert f.dtype == torch.float64


def test_the_unit_of_costs_and_masses_does_not_matter():
    cost, a, b = problem(30, 40), weights(30, 1), weights(40, 2)
    plain = sinkhorn(cost, a, b)
    scaled = sinkhorn(cost * 2.0**60, a * 1e6, b * 1e6)
    torch.testing.assert_close(scaled.plan / 1e6, plain.plan, rtol=1e-5, atol=1e-30)
    negative = cost - 2 * cost.max()
    epsilon = 0.05 * float(cost.max() / negative.abs().max())
    negated = sinkhorn(negative, a, b, epsilon=epsilon)
    assert float((negated.plan - plain.plan).abs().sum()) < 2e-5
    zero = sinkhorn(torch.zeros(30, 40), a, b)
    torch.testing.assert_close(zero.plan.double(), torch.outer(a, b), rtol=1e-6, atol=0)


def test_zero_weights_move_nothing_and_change_nothing():
    cost, a, b = problem(40, 50), weights(40, 1), weights(50, 2)
    a[[0, 7, 39]] = 0.0
    b[[3, 49]] = 0.0
    a, b = a / a.sum(), b / b.sum()
    found = sinkhorn(cost, a, b, epsilon=0.02)
    rows, columns = a > 0, b > 0
    assert float(found.plan[~rows].abs().sum() + found.plan[:, ~columns].abs().sum()) == 0.0
    assert bool((found.source_potential[~rows] == -torch.inf).all())
    assert bool((found.target_potential[~columns] == -torch.inf).all())
    assert_marginals(found, a, b, 1e-6)
    scale = float(cost.max() / cost[rows][:, columns].max())
    alone = sinkhorn(cost[rows][:, columns], a[rows], b[columns], epsilon=0.02 * scale)
    assert float((alone.plan - found.plan[rows][:, columns]).abs().sum()) < 2e-5


@pytest.mark.parametrize("relaxation", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_soft_marginals_equal_the_reference_and_pot(relaxation, epsilon):
    cost, a, b = problem(30, 40), weights(30, 1), 1.7 * weights(40, 2)
    found = sinkhorn(cost, a, b, epsilon=epsilon, marginal_relaxation=relaxation, tolerance=1e-6)
    largest = float(cost.max())
    exact = cost.double().numpy()
    expected = sinkhorn_ref(exact, a.numpy(), b.numpy(), epsilon * largest, relaxation * largest)
    # The stop at 1e-6 leaves the plan off by that over one minus the contraction.
    bound = 3e-6 * (1 + relaxation / epsilon)
    assert bool(found.converged)
    assert np.abs(found.plan.numpy() - expected).sum() < bound
    if epsilon == 0.05:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that "entropy" has no reference plan
            pot = ot.unbalanced.sinkhorn_stabilized_unbalanced(
                a.numpy(),
                b.numpy(),
                exact,
                epsilon * largest,
                relaxation * largest,
                reg_type="entropy",
                stopThr=1e-12,
                numItermax=100_000,
            )
        assert np.abs(found.plan.numpy() - pot).sum() < bound


def test_a_batch_equals_its_problems_byte_by_byte():
    batch = torch.stack([problem(33, 47, seed) for seed in range(6)])
    a = torch.stack([weights(33, seed) for seed in range(6)])
    b = torch.stack([weights(47, seed) for seed in range(6, 12)])
    together = sinkhorn(batch, a, b, epsilon=0.02)
    listed = sinkhorn(list(batch), list(a), list(b), epsilon=0.02)
    assert together.plan.shape == (6, 33, 47)
    assert together.source_potential.shape == (6, 33)
    for i in range(6):
        alone = sinkhorn(batch[i], a[i], b[i], epsilon=0.02)
        for one in (listed[i], alone):
            assert torch.equal(one.plan, together.plan[i])
            assert torch.equal(one.source_potential, together.source_potential[i])
            assert torch.equal(one.target_potential, together.target_potential[i])
            assert torch.equal(one.cost, together.cost[i])
            assert torch.equal(one.iterations, together.iterations[i])
    assert len(set(together.iterations.tolist())) > 1  # each stops for itself


def test_a_ragged_list_takes_every_shape():
    shapes = [(1, 5), (300, 200), (17, 17)]
    costs = [problem(n, m) for n, m in shapes]
    found = sinkhorn(costs)
    for cost, solution in zip(costs, found, strict=True):
        assert torch.equal(solution.plan, sinkhorn(cost).plan)
    assert sinkhorn([]) == []
    assert solve_transport([]) == []


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_number_of_threads_does_not_change_a_byte(count):
    costs = torch.stack([problem(600, 500, seed) for seed in range(count)])
    found = []
    try:
        for threads in (1, 2, 5):
            _native.set_num_threads(threads)
            found.append(sinkhorn(costs, epsilon=0.01))
    finally:
        _native.set_num_threads(0)
    for other in found[1:]:
        assert torch.equal(found[0].plan, other.plan)
        assert torch.equal(found[0].cost, other.cost)
        assert torch.equal(found[0].source_potential, other.source_potential)


def test_a_warm_start_saves_iterations():
    cost = problem(100, 100)
    cold = sinkhorn(cost, epsilon=0.01)
    warm = sinkhorn(cost, epsilon=0.01, initial_potential=cold.target_potential)
    assert int(warm.iterations) <= 3
    assert float((warm.plan - cold.plan).abs().sum()) < 2e-5
    listed = sinkhorn([cost], epsilon=0.01, initial_potential=[cold.target_potential])[0]
    assert torch.equal(listed.plan, warm.plan)
    # Any start leads there, also one that is far out of float's range.
    far = 500 * float(cost.max()) * torch.from_numpy(np.random.default_rng(0).normal(size=100))
    started = sinkhorn(cost, epsilon=0.01, initial_potential=far)
    assert float((started.plan - cold.plan).abs().sum()) < 2e-5


def test_inputs_may_be_strided_read_only_and_need_gradients():
    cost = problem(40, 60)
    expected = sinkhorn(cost).plan
    assert torch.equal(sinkhorn(cost.T.contiguous().T).plan, expected)
    wide = torch.zeros(40, 120)
    wide[:, ::2] = cost
    assert torch.equal(sinkhorn(wide[:, ::2]).plan, expected)
    assert torch.equal(sinkhorn(cost.clone().requires_grad_()).plan, expected)
    frozen = cost.numpy().copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the read-only array
        assert torch.equal(sinkhorn(torch.from_numpy(frozen)).plan, expected)


def test_no_convergence_warns_and_says_what_to_change():
    with pytest.warns(ConvergenceWarning, match="raise epsilon, tolerance or max_iterations"):
        found = sinkhorn(problem(100, 100), epsilon=1e-3, max_iterations=5)
    assert not bool(found.converged)
    assert int(found.iterations) == 5
    assert "did not converge in 5 iterations" in found.status
    assert bool(torch.isfinite(found.plan).all())


@pytest.mark.filterwarnings("ignore::clafusion.ConvergenceWarning")
@pytest.mark.parametrize("epsilon", [1e-3, 0.05])
def test_stopped_anywhere_the_plan_is_one_for_this_epsilon_and_its_error_is_told(epsilon):
    cost = problem(40, 30)
    for most in range(1, 60):
        found = sinkhorn(cost, epsilon=epsilon, max_iterations=most)
        plan = found.plan.double()
        rows, columns = plan.sum(1) - 1 / 40, plan.sum(0) - 1 / 30
        error = float(rows.abs().sum() + columns.abs().sum())
        # float32 sums of 30 terms
        assert float(found.marginal_error) == pytest.approx(error, rel=1e-3, abs=2e-6)
        assert bool(found.converged) == (float(found.marginal_error) <= 1e-6)
        assert int(found.iterations) <= most
        exponent = found.source_potential[:, None] + found.target_potential - cost
        again = torch.exp(exponent / (epsilon * float(cost.max())))
        # float32 potentials in units of epsilon: 1e-7 / epsilon
        assert float((plan - again).abs().sum()) < 1e-3


def test_auto_is_assignment_exact_or_sinkhorn():
    square, wide = problem(12, 12), problem(12, 15)
    uniform = np.full(12, 1 / 12)
    assert _choose(square, uniform, uniform) == "assignment"
    assert _choose(square, uniform, weights(12, 0).numpy()) == "exact"
    assert _choose(wide, uniform, np.full(15, 1 / 15)) == "exact"
    large = torch.zeros(1).expand(LARGEST_EXACT + 1, 1)
    assert _choose(large, uniform, uniform) == "sinkhorn"
    size = LARGEST_EXACT**0.5 + 1
    even = np.full(int(size), 1 / size)
    assert _choose(torch.zeros(1).expand(len(even), len(even)), even, even) == "assignment"
    both = solve_transport([square, wide])
    assert [s.status for s in both] == ["optimal", "optimal"]
    assert torch.equal(both[0].plan, solve_transport([square], solver="assignment")[0].plan)
    assert torch.equal(both[1].plan, solve_transport([wide], solver="exact")[0].plan)


def test_assignment_and_exact_agree_and_equal_pot():
    for seed in range(5):
        cost = problem(30, 30, seed)
        uniform = np.full(30, 1 / 30)
        assigned = solve_transport([cost], solver="assignment")[0]
        exact = solve_transport([cost], solver="exact")[0]
        best = ot.emd2(uniform, uniform, cost.double().numpy())
        for solution in (assigned, exact):
            assert float(solution.cost) == pytest.approx(best, rel=1e-9)
            assert float((cost * solution.plan).sum()) == pytest.approx(best, rel=1e-9)
            assert solution.plan.dtype == torch.float64
        assert bool(((assigned.plan * 30).round() == assigned.plan * 30).all())


def test_many_assignments_come_back_in_order_with_their_dual():
    costs = [problem(n, n, n) for n in (40, 3, 70, 1)]
    a = [torch.full((len(cost),), 2.0 / len(cost)) for cost in costs]
    exact = [problem(5, 6)]
    found = solve_transport([*costs, *exact], [*a, torch.ones(5) / 5], [*a, torch.ones(6) / 6])
    for cost, solution in zip(costs, found, strict=False):
        slack = cost - solution.source_potential[:, None] - solution.target_potential
        # Feasible, and tight where mass moves: that proves the plan optimal.
        assert float(slack.min()) > -1e-12
        assert float((slack * solution.plan).sum()) == pytest.approx(0.0, abs=1e-12)
        # The weights are float32.
        assert float(solution.plan.sum()) == pytest.approx(2.0, abs=1e-6)
        assert float((cost * solution.plan).sum()) == pytest.approx(float(solution.cost))
    assert found[4].plan.shape == (5, 6)


@pytest.mark.parametrize("shift", [-0.5, 0.0, 1.0])
@pytest.mark.parametrize("unit", [1e-15, 1.0, 1e15])
def test_the_exact_dual_certifies_the_plan_in_any_unit(unit, shift):
    cost, a, b = (problem(20, 35).double() + shift) * unit, weights(20, 1), weights(35, 2)
    found = solve_transport([cost], [a], [b], solver="exact")[0]
    slack = (cost - found.source_potential[:, None] - found.target_potential) / unit
    assert float(slack.min()) > -1e-12
    assert float((slack * found.plan).sum()) == pytest.approx(0.0, abs=1e-12)
    assert float(found.cost) == pytest.approx(float((cost * found.plan).sum()))


def test_equal_costs_are_solved_exactly():
    found = solve_transport([torch.full((3, 5), 2.0)], solver="exact")[0]
    assert float(found.cost) == pytest.approx(2.0)
    assert float(found.source_potential[0] + found.target_potential[0]) == pytest.approx(2.0)


@pytest.mark.parametrize("solver", ["assignment", "exact", "sinkhorn", "unbalanced"])
def test_every_solver_keeps_the_mass(solver):
    found = solve_transport([problem(30, 30), problem(8, 8)], solver=solver)
    for solution in found:
        assert solution.plan.dtype == torch.float64
        assert float(solution.plan.sum()) == pytest.approx(1.0, abs=1e-6)
    if solver not in ("assignment",):
        wide = solve_transport([problem(10, 25)], solver=solver)[0]
        assert float(wide.plan.sum()) == pytest.approx(1.0, abs=1e-6)


COST = torch.rand(4, 5)
NAN = COST.clone().fill_(float("nan"))
INFINITE = COST.clone()
INFINITE[1, 2] = float("inf")
NEGATIVE = torch.tensor([0.5, 0.5, 0.5, -0.5])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((NAN,), {}, r"costs must be finite; got NaN at \[0, 0\]"),
        ((INFINITE,), {}, r"costs must be finite; .* at \[1, 2\]"),
        (([COST, INFINITE],), {}, r"costs\[1\] must be finite; .* at \[1, 2\]"),
        ((COST.double() * 1e300,), {}, "beyond float32"),
        ((COST.int(),), {}, "costs must be float32 or float64; got torch.int32"),
        ((COST.half(),), {}, "costs must be float32 or float64; got torch.float16"),
        ((COST.to("meta"),), {}, "costs must be on the CPU"),
        ((COST[0],), {}, "costs must be one problem"),
        ((torch.zeros(0, 5),), {}, "at least one source and one target"),
        ((torch.zeros(2, 3, 0),), {}, "at least one source and one target"),
        ((torch.zeros(1).expand(2**20, 2**20),), {}, "costs need about 16384.0 GiB"),
        ((COST.numpy(),), {}, "costs must be a list of tensors"),
        (("costs",), {}, "costs must be a list of tensors"),
        (([COST.numpy()],), {}, r"costs\[0\] must be a tensor"),
        ((COST, NEGATIVE), {}, "source_weights must not be negative; got -0.5"),
        ((COST, torch.full((4,), torch.nan)), {}, "source_weights must be finite; got nan"),
        ((COST, torch.zeros(4)), {}, "source_weights must have a positive sum"),
        ((COST, torch.ones(5)), {}, r"source_weights must have shape \(4,\); got \(5,\)"),
        ((COST, torch.ones(4, dtype=torch.int64)), {}, "source_weights must be float32"),
        ((COST, None, torch.ones(5)), {}, "must have the same sum; got 1 and 5"),
        (([COST], torch.ones(4)), {}, "source_weights must be a list"),
        ((COST, [torch.ones(4)]), {}, "source_weights must be a tensor"),
        (([COST], [torch.ones(4)] * 2), {}, "source_weights must have one entry per problem"),
        ((COST,), {"epsilon": 0.0}, "epsilon must be a positive number; got 0.0"),
        ((COST,), {"epsilon": -1.0}, "epsilon must be a positive number"),
        ((COST,), {"epsilon": float("nan")}, "epsilon must be a positive number"),
        ((COST,), {"epsilon": 1e-9}, "epsilon must be at least 1e-6"),
        ((COST,), {"epsilon": "0.1"}, "epsilon must be a positive number"),
        ((COST,), {"tolerance": 0.0}, "tolerance must be a positive number"),
        ((COST,), {"tolerance": 1e-9}, "tolerance must be at least 1e-7"),
        ((COST,), {"max_iterations": 0}, "max_iterations must be positive"),
        ((COST,), {"max_iterations": 2.5}, "max_iterations must be an integer"),
        ((COST,), {"marginal_relaxation": 0.0}, "marginal_relaxation must be a positive"),
        ((COST,), {"initial_potential": torch.zeros(4)}, "initial_potential must have shape"),
        (
            (COST,),
            {"initial_potential": torch.full((5,), torch.inf)},
            "initial_potential must be finite",
        ),
    ],
)
def test_bad_input_is_refused_by_name(arguments, settings, message):
    with pytest.raises(InputError, match=message):
        sinkhorn(*arguments, **settings)


def test_solve_transport_refuses_bad_input_by_name():
    for settings, message in [
        ({"solver": "magic"}, "solver must be one of"),
        ({"solver": "assignment"}, "needs equal sizes and uniform weights"),
        (
            {"solver": Sinkhorn(0.1).to_dict() | {"epsilon": 0.0}},
            "solver.epsilon must be a positive",
        ),
        ({"source_weights": [NEGATIVE]}, "source_weights\\[0\\] must not be negative"),
    ]:
        with pytest.raises(InputError, match=message):
            solve_transport([COST], **settings)
    with pytest.raises(InputError, match="costs must be a list of tensors"):
        solve_transport(COST)
    with pytest.raises(InputError, match=r"costs\[0\] must be finite; got NaN"):
        solve_transport([NAN])


def compiled_arguments(**changes):
    arguments = {
        "costs": [np.ones((4, 5), dtype=np.float32)],
        "source_weights": np.full(4, 0.25),
        "target_weights": np.full(5, 0.2),
        "initial_potential": None,
        "epsilon": 0.05,
        "tolerance": 1e-6,
        "max_iterations": 100,
        "marginal_relaxation": float("inf"),
        "plans": [np.empty((4, 5), dtype=np.float32)],
        "source_potentials": np.empty(4),
        "target_potentials": np.empty(5),
        "totals": np.empty(1),
        "errors": np.empty(1),
        "iterations": np.empty(1, dtype=np.int64),
        "converged": np.empty(1, dtype=np.int64),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"costs": [np.full((4, 5), np.nan, dtype=np.float32)]}, ValueError),
        ({"costs": [np.full((4, 5), -np.inf, dtype=np.float32)]}, ValueError),
        ({"costs": [np.ones((4, 5))]}, TypeError),
        ({"costs": [np.ones((4, 10), dtype=np.float32)[:, ::2]]}, TypeError),
        ({"costs": [np.ones(20, dtype=np.float32)]}, ValueError),
        ({"costs": [np.ones((5, 4), dtype=np.float32)]}, ValueError),
        ({"costs": []}, ValueError),
        (
            {
                "costs": [np.ones((0, 5), dtype=np.float32)],
                "plans": [np.ones((0, 5), dtype=np.float32)],
                "source_weights": np.empty(0),
                "source_potentials": np.empty(0),
            },
            ValueError,
        ),
        ({"source_weights": np.full(3, 0.25)}, ValueError),
        ({"source_weights": np.array([1.0, 1.0, -1.0, 1.0])}, ValueError),
        ({"source_weights": np.zeros(4)}, ValueError),
        ({"target_weights": np.full(5, np.nan)}, ValueError),
        ({"target_weights": np.full(6, 0.2)}, ValueError),
        ({"target_weights": np.full(5, 0.4)}, ValueError),
        ({"initial_potential": np.zeros(4)}, ValueError),
        ({"initial_potential": np.full(5, np.nan)}, ValueError),
        ({"initial_potential": np.zeros(5, dtype=np.float32)}, TypeError),
        ({"epsilon": 0.0}, ValueError),
        ({"epsilon": np.nan}, ValueError),
        ({"tolerance": -1.0}, ValueError),
        ({"max_iterations": 0}, ValueError),
        ({"marginal_relaxation": 0.0}, ValueError),
        ({"plans": []}, ValueError),
        ({"plans": [np.empty((5, 4), dtype=np.float32)]}, ValueError),
        ({"source_potentials": np.empty(3)}, ValueError),
        ({"target_potentials": np.empty(9)}, ValueError),
        ({"totals": np.empty(2)}, ValueError),
        ({"iterations": np.empty(1)}, TypeError),
    ],
)
def test_the_compiled_door_refuses_too(changes, error):
    with pytest.raises(error):
        _core.sinkhorn(**compiled_arguments(**changes))


def test_the_compiled_door_refuses_read_only_outputs():
    plan = np.empty((4, 5), dtype=np.float32)
    plan.setflags(write=False)
    with pytest.raises(ValueError, match="not writeable"):
        _core.sinkhorn(**compiled_arguments(plans=[plan]))
    _core.sinkhorn(**compiled_arguments())


def test_a_keyboard_interrupt_stops_a_long_run():
    costs = [problem(500, 500, seed) for seed in range(4)]

    def interrupt():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell that started the tests in the background may have had the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        # Without the interrupt this runs for hours.
        with pytest.raises(KeyboardInterrupt):
            sinkhorn(costs, epsilon=1e-5, max_iterations=10**12)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert bool(sinkhorn(costs[0]).converged)


def test_threads_may_call_at_once():
    costs = [problem(90, 80, seed) for seed in range(8)]
    expected = [sinkhorn(cost, epsilon=0.01).plan for cost in costs]
    found = [None] * 8

    def solve(i):
        found[i] = sinkhorn(costs[i], epsilon=0.01).plan

    threads = [threading.Thread(target=solve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
