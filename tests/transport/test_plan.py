"""Compact plans against their matrices, and how much memory they take."""

import pickle
from itertools import product

import pytest
import torch

from clafusion import InputError
from clafusion.matching.weight_costs import index_plan, is_at_rest
from clafusion.transport import plan as plan_module
from clafusion.transport.plan import TransportPlan
from clafusion.transport.solve import solve_compactly, solve_transport
from tests.support.memory import LiveTensors


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(shape, solver, seed=0, weights=(None, None)):
    lists = [None if one is None else [one] for one in weights]
    return solve_compactly([drawn(*shape, seed=seed)], *lists, solver=solver)[0].plan


def unequal_masses(count, seed):
    mass = drawn(count, seed=seed) + 0.1
    return mass / mass.sum()


def of_two_heads():
    within = {(0, 1): solved((4, 5), "exact"), (1, 0): solved((4, 5), "exact", 1)}
    return TransportPlan.from_heads(within, {(0, 1): 0.25, (1, 0): 0.75}, (2, 3))


ORDER = torch.tensor([3, 0, 4, 1, 2])
PLANS = {
    "identity": TransportPlan.identity(6),
    "permutation": TransportPlan.from_columns(ORDER, 5, 0.2),
    "copies": TransportPlan.from_rows(torch.tensor([2, 0, 0, 1, 2, 2]), 3, 1 / 6),
    "merged": TransportPlan.from_columns(torch.tensor([1, 0, 1, 3, 3]), 4, 0.2),
    "some, elsewhere": TransportPlan.from_entries(
        (4, 5), torch.tensor([3, 0]), torch.tensor([0, 4]), torch.ones(2).double()
    ),
    "nothing": TransportPlan.from_entries((2, 3), *torch.zeros(2, 0).long(), torch.zeros(0)),
    "assignment": solved((9, 9), "assignment"),
    "exact": solved((70, 45), "exact"),
    "exact, of masses": solved(
        (40, 90), "exact", weights=(unequal_masses(40, 1), unequal_masses(90, 2))
    ),
    "in order": index_plan(64, 96),
    "in order, many to few": index_plan(200, 3),
    "heads": of_two_heads(),
    "sinkhorn": solved((30, 20), "sinkhorn"),
    "unbalanced": solved((20, 30), "unbalanced"),
    "one channel": TransportPlan.from_dense(torch.full((1, 1), 0.5)),
}


def averages(matrix, axis):
    sums = matrix.sum(axis, keepdim=True)
    return matrix / torch.where(sums > 0, sums, 1.0)


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]


@pytest.fixture(params=[None, 64], ids=["whole", "in pieces"])
def pieces(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(plan_module, "_AT_ONCE", request.param)
        monkeypatch.setattr(plan_module, "_IN_CACHE", request.param)


def test_says_what_its_matrix_says(plan):
    matrix = plan.dense()
    assert matrix.dtype == torch.float64
    assert tuple(matrix.shape) == plan.shape
    torch.testing.assert_close(plan.row_sums, matrix.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.column_sums, matrix.sum(0), rtol=1e-12, atol=0)
    assert torch.equal(plan.covered, (matrix > 0).any(0))
    assert plan.is_identity == (
        plan.shape[0] == plan.shape[1] and torch.equal(matrix, torch.eye(plan.shape[0]).double())
    )
    rows, columns, masses = plan.entries
    assert torch.equal(torch.stack([columns, rows], 1), matrix.T.nonzero().int())
    assert torch.equal(matrix[rows.long(), columns.long()], masses)
    assert torch.equal(plan.transposed().dense(), matrix.T)
    for leaves in (True, False):
        weights = averages(matrix, 0 if leaves else 1)
        is_copy = bool((((weights == 0) | (weights == 1)).all(0) & (weights.sum(0) == 1)).all())
        found = plan.copied_rows(leaves=leaves)
        assert (found is not None) == is_copy
        assert found is None or torch.equal(found, weights.argmax(0))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moves_what_its_matrix_moves(plan, dtype):
    size, wanted = plan.shape
    for shape, axis in (
        ((size,), 0),
        ((size, 7), 0),
        ((7, size), 1),
        ((7, size), -1),
        ((3, size, 5), 1),
        ((3, 2, size), -1),
        ((0, size), 1),
    ):
        values = (drawn(*shape, seed=5) - 0.5).to(dtype)
        for move, sums in ((plan.outgoing, 0), (plan.incoming, 1)):
            found = move(values, axis)
            assert found.dtype == dtype
            assert found.size(axis) == wanted
            weights = averages(plan.dense(), sums)
            expected = (values.double().movedim(axis, -1) @ weights).movedim(-1, axis)
            bound = 1e-14 if dtype == torch.float64 else 1e-7
            torch.testing.assert_close(found, expected.to(dtype), rtol=bound, atol=bound)


def test_copies_have_the_same_bytes():
    for name in ("permutation", "copies", "assignment"):
        plan = PLANS[name]
        values = torch.randn(plan.shape[0], 6)
        assert torch.equal(plan.outgoing(values), values[plan.dense().argmax(0)])
    values = torch.randn(6, 4)
    assert torch.equal(PLANS["identity"].incoming(values), values)
    plan = PLANS["some, elsewhere"]  # no copy, for three channels get nothing
    assert plan.copied_rows(leaves=True) is None
    values = torch.randn(4, 6)
    assert torch.equal(plan.outgoing(values)[[0, 4]], values[[3, 0]])


def test_another_number_of_channels_is_refused():
    for name in ("identity", "copies", "sinkhorn"):
        plan = PLANS[name]
        message = (
            rf"one entry for each of {plan.shape[0]} source channels in axis 1; got .*\(9, 4\)"
        )
        with pytest.raises(InputError, match=message):
            plan.outgoing(torch.randn(9, 4), 1)


def test_sums_do_not_depend_on_pieces_or_threads(monkeypatch):
    threads = torch.get_num_threads()
    for name in ("exact", "in order, many to few", "sinkhorn"):
        plan = PLANS[name]
        values = torch.randn(400, plan.shape[0])
        try:
            torch.set_num_threads(1)
            expected = plan.outgoing(values, 1)
            torch.set_num_threads(2)
            assert torch.equal(plan.outgoing(values, 1), expected)
        finally:
            torch.set_num_threads(threads)
        if name != "sinkhorn":
            monkeypatch.setattr(plan_module, "_IN_CACHE", 1000)
            assert torch.equal(plan.outgoing(values, 1), expected)
            assert torch.equal(plan.outgoing(values.T.contiguous()), expected.T)


@pytest.mark.usefixtures("pieces")
def test_distances_are_those_of_the_matrices(plan):
    others = [one for one in PLANS.values() if one.shape == plan.shape]
    rolled = TransportPlan.from_dense(plan.dense().roll(1, 0))
    for one in (*others, rolled):
        apart = float((plan.dense() - one.dense()).abs().sum())
        assert plan.distance(one) == pytest.approx(apart, rel=1e-12, abs=1e-15)
        assert (plan == one) == (apart == 0.0)
        apart = float((averages(plan.dense(), 0) - averages(one.dense(), 0)).abs().sum())
        found = plan.distance(one, averages=True)
        assert found == pytest.approx(apart, rel=1e-12, abs=1e-14)
    assert is_at_rest(plan, plan)


def test_equal_plans_may_be_held_otherwise():
    assert TransportPlan.from_columns(torch.arange(6), 6) == PLANS["identity"]
    assert TransportPlan.from_dense(PLANS["exact"].dense()) == PLANS["exact"]
    assert TransportPlan.from_dense(PLANS["sinkhorn"].dense()) == PLANS["sinkhorn"]
    assert PLANS["identity"] != TransportPlan.identity(7)
    assert PLANS["identity"] != TransportPlan.from_columns(torch.arange(6), 6, 1 / 6)
    assert PLANS["identity"] != torch.eye(6)


def test_small_changes_leave_a_plan_at_rest():
    before = PLANS["sinkhorn"]
    noise = before.dense() * 1e-6 * drawn(*before.shape, seed=8)
    assert is_at_rest(before, TransportPlan.from_dense(before.dense() + noise))
    assert not is_at_rest(before, TransportPlan.from_dense(before.dense() + 1e3 * noise))
    before, after = PLANS["permutation"], TransportPlan.from_columns(ORDER, 5, 0.4)
    assert not is_at_rest(before, after)
    assert is_at_rest(before, after, averages=True)  # masses alone move no channel otherwise
    assert not is_at_rest(before, TransportPlan.from_columns(ORDER.flip(0), 5), averages=True)


def test_comes_back_from_a_pickle(plan):
    plain = len(pickle.dumps(plan))
    plan.outgoing(torch.randn(plan.shape[0], 3))
    written = pickle.dumps(plan)
    assert len(written) == plain  # what was looked up is not written
    again = pickle.loads(written)
    assert again == plan
    assert repr(again) == repr(plan)


def test_a_part_of_a_batch_does_not_keep_the_batch():
    costs = [drawn(40, 50, seed=i) for i in range(8)]
    for one in solve_compactly(costs, solver="sinkhorn"):
        assert len(pickle.dumps(one.plan)) < 1.5 * 4 * 40 * 50  # as the kernel gives it, float32


@pytest.mark.parametrize("solver", ["assignment", "exact", "sinkhorn", "unbalanced"])
def test_solutions_are_the_same_with_their_matrices(solver):
    costs = [drawn(12, 12, seed=i) for i in range(3)]
    for one, other in zip(
        solve_compactly(costs, solver=solver), solve_transport(costs, solver=solver), strict=True
    ):
        assert isinstance(other.plan, torch.Tensor)
        assert torch.equal(one.plan.dense(), other.plan)
        assert torch.equal(one.cost, other.cost)
        assert (one.status, bool(one.converged)) == (other.status, bool(other.converged))


SIZE = 4096


def test_a_permutation_takes_little_memory():
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(SIZE, 64)
    with LiveTensors() as seen:
        plan = TransportPlan.from_columns(order, SIZE, 1 / SIZE)
        for move in (plan.outgoing, plan.incoming, plan.transposed().outgoing):
            move(weight)
        assert not plan.is_identity
        assert bool(plan.covered.all())
        assert plan == TransportPlan.from_columns(order, SIZE, 1 / SIZE)
    assert len(pickle.dumps(plan)) < 1e6
    assert seen.largest <= weight.nbytes
    assert seen.most < 5 * weight.nbytes
    expected = torch.empty_like(weight)
    expected[order] = weight
    assert torch.equal(plan.outgoing(weight), expected)


@pytest.mark.parametrize("shape", [(SIZE, 3000), (3000, SIZE), (SIZE, 1000)], ids=str)
def test_a_mixture_of_few_takes_little_memory(shape):
    weight = torch.randn(shape[0], 64)
    with LiveTensors() as seen:
        plan = index_plan(*shape)
        plan.outgoing(weight)
        plan.incoming(weight)
        is_at_rest(plan, index_plan(*shape), averages=True)
    assert len(pickle.dumps(plan)) < 1e6
    assert seen.largest <= 2 * 64 * SIZE * 8  # no matrix of the plan's shape


def test_an_identity_holds_nothing():
    with LiveTensors() as seen:
        plan = TransportPlan.identity(SIZE)
        assert plan.is_identity
    assert seen.largest == 0
    assert len(pickle.dumps(plan)) < 500


def test_the_assignment_solver_makes_no_matrix():
    size = 1024
    cost = drawn(size, size)
    cost[torch.arange(size), torch.randperm(size)] -= 1
    with LiveTensors() as seen:
        (solution,) = solve_compactly([cost], solver="assignment")
        solution.plan.outgoing(cost[:, :8])
    assert seen.most < cost.nbytes + 1e6  # the cost itself, which it returns a view of


def test_what_is_full_is_moved_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(plan_module, "_AT_ONCE", 1 << 16)
    plan = solved((700, 900), "sinkhorn")
    values = torch.randn(700, 1000)
    with LiveTensors() as seen:
        assert bool(plan.covered.all())
        assert float(plan.row_sums.sum()) == pytest.approx(1)
        found = plan.outgoing(values)
    assert seen.largest <= max(4 * 900 * 1000, 8 * (1 << 17))
    expected = averages(plan.dense(), 0).T @ values.double()
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize(("ones", "others"), list(product([1, 4, 6, 12], repeat=2)))
def test_classes_are_united_as_by_a_comparison(ones, others):
    from clafusion.correspondence.duplicated_channels import _equal

    own, theirs = (torch.arange(12) % count for count in (ones, others))
    found = _equal(own, theirs[:10]).dense()
    assert torch.equal(found, (own[:, None] == theirs[:10]).double())
