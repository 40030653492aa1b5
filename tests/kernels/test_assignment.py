"""The compiled assignment solver: brute force, SciPy, its dual certificate, and its refusals."""

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from clafusion import _core, _native, set_num_threads

# Sizes around the padding's block of 32 columns.
SIZES = [1, 2, 3, 31, 32, 33, 64, 97, 160]


def brute_force_ref(cost):
    rows = range(len(cost))
    return min(sum(cost[i, p[i]] for i in rows) for p in permutations(rows))


def costs_of_kind(kind, n, rng):
    if kind == "uniform":
        return rng.random((n, n))
    if kind == "ties":
        return rng.integers(0, 3, (n, n)).astype(np.float64)
    if kind == "negative":
        return rng.normal(size=(n, n)) - 5.0
    if kind == "constant":
        return np.full((n, n), 2.5)
    if kind == "separable":  # every permutation is optimal
        return np.add.outer(rng.random(n), rng.random(n))
    # Distances between points: many rows want the same columns.
    x, y = rng.normal(size=(n, 8)), rng.normal(size=(n, 8))
    return np.linalg.norm(x[:, None] - y, axis=-1)


def assert_optimal(cost, target, f, g, total):
    """A feasible dual of the same value proves the assignment optimal, without a second solver."""
    n = len(cost)
    assert sorted(target) == list(range(n))
    scale = np.abs(cost).max()
    # Each potential is a sum of at most 2n costs, rounded at each addition.
    rounding = 4 * n * np.finfo(np.float64).eps * max(scale, 1e-300)
    assert np.all(f[:, None] + g <= cost + rounding)
    assert total == pytest.approx(cost[np.arange(n), target].sum(), rel=1e-12, abs=n * rounding)
    assert f.sum() + g.sum() == pytest.approx(total, rel=1e-12, abs=n * rounding)


def solve(cost):
    targets, f, g, totals = _native.assign([cost])
    return targets[0], f[0], g[0], totals[0]


@given(st.integers(1, 6), st.data())
def test_equals_brute_force(n, data):
    entries = st.lists(st.integers(-9, 9).map(float), min_size=n * n, max_size=n * n)
    cost = np.array(data.draw(entries)).reshape(n, n)
    target, f, g, total = solve(cost)
    assert total == brute_force_ref(cost)  # small integers: exact
    assert_optimal(cost, target, f, g, total)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    "kind", ["uniform", "ties", "negative", "constant", "separable", "distances"]
)
def test_is_optimal_and_equals_scipy(n, kind):
    cost = costs_of_kind(kind, n, np.random.default_rng(n))
    found = solve(cost)
    assert_optimal(cost, *found)
    assert found[3] == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-11)


# From 1024 rows on the search for a path begins with the columns near each row.
@pytest.mark.parametrize("kind", ["uniform", "distances", "rounded", "dead", "whole"])
@pytest.mark.parametrize("n", [1024, 1055])
def test_a_search_by_near_columns_is_optimal_and_equals_scipy(n, kind):
    rng = np.random.default_rng(n)
    cost = costs_of_kind("uniform" if kind == "uniform" else "distances", n, rng)
    if kind == "rounded":  # many are equal
        cost = cost.round(2)
    if kind == "dead":  # rows and columns that cost the same everywhere
        cost[rng.permutation(n)[:20]] = cost[:, rng.permutation(n)[:20]] = 4.0
    if kind == "whole":  # nearly all searches meet many free columns at once
        cost = rng.integers(0, 4, cost.shape).astype(float)
    found = solve(cost)
    assert_optimal(cost, *found)
    assert found[3] == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-11)
    assert np.array_equal(found[0], paths_over_whole_rows_ref(cost))


def paths_over_whole_rows_ref(cost):
    """The algorithm of the header without near columns: also of equal paths it takes the same.

    Of equally near columns a free one comes first, else the first.
    """
    n = len(cost)
    price = cost.min(0)
    column_of, row_of = np.full(n, -1), np.full(n, -1)

    def match(i, j):
        column_of[i], row_of[j] = j, i

    for j, i in enumerate(cost.argmin(0)):
        if column_of[i] < 0:
            match(i, j)
    free = np.flatnonzero(column_of < 0)
    for _ in range(3):
        still_free = []
        for i in free:
            reduced = cost[i] - price
            j = int(reduced.argmin())
            first, reduced[j] = reduced[j], np.inf
            other = int(reduced.argmin())
            if first < reduced[other]:
                price[j] -= reduced[other] - first
            elif row_of[j] >= 0:
                j = other
            displaced = row_of[j]
            match(i, j)
            if displaced >= 0:
                column_of[displaced] = -1
                still_free.append(displaced)
        free = still_free
    for start in free:
        distance, origin = np.full(n, np.inf), np.full(n, -1)
        scanned, offset, is_open = [(-1, start, 0.0)], 0.0, np.ones(n, dtype=bool)
        while True:
            row = scanned[-1][1]
            new = (cost[row] - price) - offset
            nearer = is_open & (new < distance)
            distance[nearer], origin[nearer] = new[nearer], len(scanned) - 1
            least = distance[is_open].min()
            equal = np.flatnonzero(is_open & (distance == least))
            j = next((one for one in equal if row_of[one] < 0), equal[0])
            if row_of[j] < 0:
                break
            is_open[j] = False
            scanned.append((j, row_of[j], least))
            offset = (cost[row_of[j], j] - price[j]) - least
        while True:
            before, row, _ = scanned[origin[j]]
            match(row, j)
            if before < 0:
                break
            j = before
        for column, _, reached in scanned[1:]:
            price[column] += reached - least
    return column_of


def test_finds_a_planted_permutation():
    rng = np.random.default_rng(0)
    planted = rng.permutation(200)
    cost = 1.0 + rng.random((200, 200))
    cost[np.arange(200), planted] = rng.random(200) / 2
    assert np.array_equal(solve(cost)[0], planted)


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e199])
def test_the_unit_of_the_costs_does_not_matter(scale):
    cost = costs_of_kind("distances", 50, np.random.default_rng(1))
    target, f, g, total = solve(cost * scale)
    assert_optimal(cost * scale, target, f, g, total)
    assert np.array_equal(target, solve(cost)[0])


def test_a_transposed_problem_has_the_inverse_assignment():
    cost = np.random.default_rng(2).random((90, 90))  # the optimum is unique
    assert np.array_equal(solve(cost.T)[0], np.argsort(solve(cost)[0]))


def test_a_batch_equals_its_problems_byte_by_byte_on_any_number_of_threads():
    rng = np.random.default_rng(3)
    costs = [costs_of_kind("ties", n, rng) for n in (5, 80, 1, 33, 64, 200, 2)]
    single = [solve(cost) for cost in costs]
    try:
        for threads in (1, 2, 7):
            set_num_threads(threads)
            batch = _native.assign(costs)
            for i, parts in enumerate(single):
                for one, many in zip(parts, batch, strict=True):
                    assert np.array_equal(one, many[i])
    finally:
        set_num_threads(0)


def test_threads_may_call_at_once():
    rng = np.random.default_rng(4)
    costs = [rng.random((70, 70)) for _ in range(12)]
    with ThreadPoolExecutor(6) as executor:
        found = list(executor.map(solve, costs))
    for one, cost in zip(found, costs, strict=True):
        assert np.array_equal(one[0], solve(cost)[0])


def test_takes_strided_and_read_only_costs_and_no_problem():
    cost = np.random.default_rng(5).random((40, 80))[:, ::2]
    cost.flags.writeable = False
    assert np.array_equal(solve(cost)[0], linear_sum_assignment(cost)[1])
    targets, f, g, totals = _native.assign([])
    assert (targets, f, g, totals.size) == ([], [], [], 0)


def compiled_arguments(**changes):
    arguments = {
        "costs": [np.ones((3, 3))],
        "targets": np.empty(3, dtype=np.int64),
        "source_potentials": np.empty(3),
        "target_potentials": np.empty(3),
        "totals": np.empty(1),
    }
    return arguments | changes


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"costs": [np.full((3, 3), np.nan)]}, ValueError, "finite and at most 1e200"),
        ({"costs": [np.diag([np.inf, 0.0, 0.0])]}, ValueError, "finite and at most 1e200"),
        ({"costs": [np.full((3, 3), -1e201)]}, ValueError, "finite and at most 1e200"),
        ({"costs": [np.ones((3, 4))]}, ValueError, "square"),
        ({"costs": [np.ones(3)]}, ValueError, "square"),
        ({"costs": []}, ValueError, "totals must have one entry"),
        ({"totals": np.empty(2)}, ValueError, "totals must have one entry"),
        ({"targets": np.empty(2, dtype=np.int64)}, ValueError, "one entry a row"),
        ({"source_potentials": np.empty(4)}, ValueError, "one entry a row"),
        ({"target_potentials": np.empty(0)}, ValueError, "one entry a row"),
        ({"target_potentials": read_only(np.empty(3))}, ValueError, "not writeable"),
        ({"costs": [np.ones((3, 3), dtype=np.float32)]}, TypeError, "incompatible"),
        ({"costs": [np.ones((3, 6))[:, ::2]]}, TypeError, "incompatible"),
        ({"targets": np.empty(3)}, TypeError, "incompatible"),
    ],
)
def test_the_compiled_door_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        _core.assign(**compiled_arguments(**changes))


def test_an_empty_problem_is_refused():
    with pytest.raises(ValueError, match="at least one row in problem 1"):
        _native.assign([np.ones((2, 2)), np.ones((0, 0))])
