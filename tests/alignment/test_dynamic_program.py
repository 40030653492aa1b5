"""The alignment of layers against brute force, and its refusals."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clafusion import AlignmentError, InputError, _core, align_layers, align_layers_batch


def brute_force_ref(cost, skip, pin_first=False, pin_last=False):
    """Every increasing choice of deep layers, in the order that breaks ties to the earliest."""
    m, n = cost.shape
    best, best_total = None, np.inf
    for chosen in combinations(range(m), n):
        if pin_first and chosen[0] != 0:
            continue
        if pin_last and chosen[-1] != m - 1:
            continue
        total = sum(cost[deep, k] for k, deep in enumerate(chosen))
        total += sum(skip[deep] for deep in range(m) if deep not in chosen)
        if total < best_total:
            best, best_total = chosen, total
    return best, best_total


def brute_force_gaps_ref(cost, skip, skip_shallow, pin_first=False, pin_last=False):
    """The least total over every choice of equally many deep and shallow layers, and its pairs."""
    m, n = cost.shape
    best, best_total = None, np.inf
    for size in range(min(m, n) + 1):
        for deep in combinations(range(m), size):
            for shallow in combinations(range(n), size):
                pairs = list(zip(deep, shallow, strict=True))
                if (pin_first and (0, 0) not in pairs) or (
                    pin_last and (m - 1, n - 1) not in pairs
                ):
                    continue
                total = sum(cost[pair] for pair in pairs)
                total += np.delete(skip, deep).sum() + np.delete(skip_shallow, shallow).sum()
                if total < best_total:
                    best, best_total = pairs, total
    return best, best_total


def brute_force_segments_ref(cost):
    m, n = cost.shape
    best_total = np.inf
    for starts in combinations(range(1, m), n - 1):
        bounds = [0, *starts, m]
        total = sum(cost[a:b, k].sum() for k, (a, b) in enumerate(pairwise(bounds)))
        best_total = min(best_total, total)
    return best_total


@st.composite
def problems(draw):
    m = draw(st.integers(1, 8))
    n = draw(st.integers(1, m))
    entries = st.one_of(st.integers(0, 50).map(float), st.just(np.inf))
    cost = np.array(draw(st.lists(entries, min_size=m * n, max_size=m * n))).reshape(m, n)
    skips = st.sampled_from([0.0, 0.0, 3.0, np.inf])
    skip = np.array(draw(st.lists(skips, min_size=m, max_size=m)))
    return cost, skip, draw(st.booleans()), draw(st.booleans())


@st.composite
def problems_with_gaps(draw):
    m, n = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    entries = st.one_of(st.integers(0, 50).map(float), st.just(np.inf))
    cost = np.array(draw(st.lists(entries, min_size=m * n, max_size=m * n))).reshape(m, n)
    skips = st.sampled_from([0.0, 3.0, 20.0, np.inf])
    skip = np.array(draw(st.lists(skips, min_size=m, max_size=m)))
    skip_shallow = np.array(draw(st.lists(skips, min_size=n, max_size=n)))
    return cost, skip, skip_shallow, draw(st.booleans()), draw(st.booleans())


@given(problems_with_gaps())
def test_gaps_on_both_sides_equal_brute_force(problem):
    cost, skip, skip_shallow, pin_first, pin_last = problem
    pairs, total = brute_force_gaps_ref(*problem)
    arguments = {"skip": skip, "skip_shallow": skip_shallow}
    arguments |= {"pin_first": pin_first, "pin_last": pin_last}
    if pairs is None:
        with pytest.raises(AlignmentError, match="no alignment exists"):
            align_layers(cost, **arguments)
        return
    found = align_layers(cost, **arguments)
    assert found.total_cost == total
    own = sum(cost[pair] for pair in found.pairs) + skip[list(found.unmatched)].sum()
    assert own + skip_shallow[list(found.unmatched_shallow)].sum() == total
    assert len(found.pairs) + len(found.unmatched_shallow) == cost.shape[1]


def test_a_large_cost_leaves_as_few_shallow_layers_alone_as_can_be():
    cost = np.full((4, 4), np.inf)
    # Stages of 1 + 3 and of 3 + 1 layers: one pair in each.
    cost[0, :3] = [0.9, 0.8, 0.7]
    cost[1:, 3] = [0.3, 0.2, 0.1]
    found = align_layers(cost, skip_shallow=np.full(4, 100.0))
    assert found.deep_to_shallow == (2, -1, -1, 3)
    assert found.unmatched == (1, 2)
    assert found.unmatched_shallow == (0, 1)
    assert not found.forced
    cost[0, :2] = cost[1:3, 3] = np.inf
    assert align_layers(cost, skip_shallow=np.full(4, 100.0)).forced
    wide = np.array([[0.5, 0.1, 0.4]])
    assert align_layers(wide, skip_shallow=np.ones(3)).deep_to_shallow == (1,)
    assert align_layers(wide, skip_shallow=np.zeros(3)).deep_to_shallow == (-1,)
    with pytest.raises(AlignmentError, match="shallow layer 2 finds no partner"):
        align_layers(wide, skip_shallow=[np.inf, 1.0, np.inf])
    batch = align_layers_batch([wide, cost], skips_shallow=[np.ones(3), np.full(4, 100.0)])
    assert [one.deep_to_shallow for one in batch] == [(1,), (2, -1, -1, 3)]


def test_how_many_gaps_decide_is_counted_and_not_summed():
    cost = np.full((3, 11), np.inf)
    cost[0, 0] = cost[2, 10] = 0.1
    cost[1, 5], cost[1, 6] = 0.3, 0.4
    for dear in np.random.default_rng(0).uniform(1, 3, 20):  # sums of these depend on their order
        assert not align_layers(cost, skip=[np.inf] * 3, skip_shallow=[dear] * 11).forced


def test_refuses_bad_gaps():
    cost = np.ones((2, 3))
    with pytest.raises(InputError, match=r"has 2 deep but 3 shallow layers.*give skip_shallow"):
        align_layers(cost)
    with pytest.raises(InputError, match=r"skip_shallow of problem 0 must have one entry per shal"):
        align_layers(cost, skip_shallow=[1.0])
    with pytest.raises(InputError, match=r"skip_shallow of problem 0 holds nan at \(1,\)"):
        align_layers(cost, skip_shallow=[1.0, np.nan, 1.0])
    with pytest.raises(InputError, match="skip_shallow needs mode='layer'; got mode='segment'"):
        align_layers(cost, skip_shallow=np.ones(3), mode="segment")
    with pytest.raises(InputError, match="skips_shallow must have one entry per problem: 2, got 1"):
        align_layers_batch([cost, cost], skips_shallow=[np.ones(3)])


@given(problems())
def test_equals_brute_force_up_to_8_by_8(problem):
    cost, skip, pin_first, pin_last = problem
    _, total = brute_force_ref(cost, skip, pin_first, pin_last)
    arguments = {"skip": skip, "pin_first": pin_first, "pin_last": pin_last}
    if np.isinf(total):
        with pytest.raises(AlignmentError, match="no alignment exists"):
            align_layers(cost, **arguments)
    else:
        found = align_layers(cost, **arguments)
        assert found.total_cost == pytest.approx(total)
        assert [k for _, k in found.pairs] == list(range(cost.shape[1]))


@given(st.integers(1, 8), st.data())
def test_segments_equal_brute_force(m, data):
    n = data.draw(st.integers(1, m))
    cost = np.random.default_rng(data.draw(st.integers(0, 9999))).random((m, n))
    found = align_layers(cost, mode="segment")
    assert found.total_cost == pytest.approx(brute_force_segments_ref(cost))
    assert found.deep_to_shallow[0] == 0
    assert set(np.diff(found.deep_to_shallow)) <= {0, 1}


def test_ties_go_to_the_earliest_deep_layer():
    assert align_layers(np.zeros((5, 2))).deep_to_shallow == (0, 1, -1, -1, -1)


def test_a_ragged_batch_equals_its_problems_one_by_one():
    rng = np.random.default_rng(0)
    costs = [rng.random((m, n)) for m in range(1, 12) for n in range(1, m + 1)] * 3
    for found, cost in zip(align_layers_batch(costs), costs, strict=True):
        assert found.deep_to_shallow == align_layers(cost).deep_to_shallow


def test_forced_tells_whether_the_costs_mattered():
    cost = np.random.default_rng(0).random((4, 3))
    assert not align_layers(cost).forced
    assert align_layers(cost, skip=[np.inf, 0.0, np.inf, np.inf]).forced
    assert align_layers(cost[:3]).forced
    assert not align_layers(cost, mode="segment").forced


def test_chain_is_the_earliest_feasible_alignment():
    cost = np.array([[np.inf, 9.0], [9.0, np.inf], [0.0, 0.0], [0.0, 9.0]])
    assert align_layers(cost, mode="chain").deep_to_shallow == (-1, 0, 1, -1)


def test_random_draws_every_feasible_alignment_equally_often():
    cost = np.ones((5, 3))
    drawn = [align_layers(cost, mode="random", seed=s).deep_to_shallow for s in range(2000)]
    counts = [drawn.count(one) for one in set(drawn)]
    assert len(counts) == 10
    # 200 expected each, standard deviation 13.4
    assert min(counts) > 130
    assert max(counts) < 270


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ([[np.nan]], r"cost holds nan at \(0, 0\)"),
        ([[0.0, 1.0]], "1 deep but 2 shallow"),
        ([0.0, 1.0], "must be a matrix"),
        (np.empty((0, 0)), "must be a matrix"),
        ([["a"]], "array of real numbers"),
        ([[-np.inf]], r"cost holds -inf at \(0, 0\)"),
    ],
)
def test_bad_costs_are_refused_by_name(cost, message):
    with pytest.raises(InputError, match=message):
        align_layers(cost)


def test_bad_skips_and_modes_are_refused_by_name():
    with pytest.raises(InputError, match=r"skip must have one entry per deep layer, shape \(2,\)"):
        align_layers(np.ones((2, 1)), skip=[0.0])
    with pytest.raises(InputError, match="mode must be one of"):
        align_layers(np.ones((2, 1)), mode="greedy")
    with pytest.raises(InputError, match=r"costs\[1\] holds nan"):
        align_layers_batch([np.ones((2, 1)), [[np.nan]]])


def test_the_error_names_the_layer_without_a_partner():
    cost = np.ones((4, 3))
    cost[:, 1] = np.inf
    with pytest.raises(AlignmentError, match="shallow layer 1 finds no partner"):
        align_layers(cost)
    with pytest.raises(AlignmentError, match="deep layer 3 can neither be matched nor skipped"):
        align_layers([[1.0, 1], [1, 1], [1, 1], [np.inf, np.inf]], skip=[0, 0, 0, np.inf])


@pytest.mark.parametrize("mode", ["layer", "segment"])
@pytest.mark.parametrize("pins", [(False, False), (True, True)])
def test_one_array_of_problems_equals_them_one_by_one(mode, pins):
    rng = np.random.default_rng(0)
    costs = rng.random((200, 17, 9))
    costs[rng.random(costs.shape) < 0.02] = np.inf
    costs[:, [0, -1], [0, -1]] = 0.5
    skips = rng.choice([0.0, 0.3], (200, 17))
    settings = {"mode": mode, "pin_first": pins[0], "pin_last": pins[1]}
    batch = align_layers_batch(costs, skips=skips, **settings)
    assert batch.deep_to_shallow.shape == (200, 17)
    assert len(batch) == 200
    free = align_layers_batch(costs, **settings)
    for found, cost in zip(free, costs, strict=True):
        assert found.deep_to_shallow == align_layers(cost, **settings).deep_to_shallow
        assert found.skip.tolist() == [0.0] * 17
    for found, cost, skip in zip(batch, costs, skips, strict=True):
        alone = align_layers(cost, skip=skip, **settings)
        assert found.deep_to_shallow == alone.deep_to_shallow
        assert found.total_cost == pytest.approx(alone.total_cost)
        assert found.forced == alone.forced
    assert [one.pairs for one in batch[-2:]] == [batch[198].pairs, batch[-1].pairs]


@pytest.mark.parametrize("mode", ["chain", "random"])
def test_baselines_take_one_array_too(mode):
    costs = np.random.default_rng(0).random((5, 6, 3))
    batch = align_layers_batch(costs, mode=mode)
    assert [one.pairs for one in batch] == [
        one.pairs for one in align_layers_batch(list(costs), mode=mode)
    ]
    assert len(align_layers_batch([])) == 0
    assert len(align_layers_batch(np.empty((0, 3, 2)))) == 0


def test_other_memory_and_types_give_the_same():
    costs = np.random.default_rng(0).integers(0, 9, (30, 8, 4))
    expected = align_layers_batch(costs.astype(np.float64)).deep_to_shallow
    readonly = costs.astype(np.float64)
    readonly.flags.writeable = False
    for same in (
        costs,
        costs.astype(np.float32),
        np.asfortranarray(costs),
        np.repeat(costs, 2, axis=0)[::2],
        readonly,
    ):
        np.testing.assert_array_equal(align_layers_batch(same).deep_to_shallow, expected)


def test_one_array_is_refused_by_name():
    costs = np.ones((3, 4, 2))
    for position, value in [((1, 2, 0), np.nan), ((2, 0, 1), -np.inf)]:
        bad = costs.copy()
        bad[position] = value
        with pytest.raises(InputError, match=rf"costs\[{position[0]}\] holds {value}"):
            align_layers_batch(bad)
        with pytest.raises(InputError, match=rf"costs\[{position[0]}\] holds {value}"):
            align_layers_batch(bad, pin_first=True, pin_last=True, mode="segment")
    with pytest.raises(InputError, match=r"skips\[1\] holds nan"):
        align_layers_batch(costs, skips=np.array([[0.0] * 4, [0, 0, np.nan, 0], [0] * 4]))
    with pytest.raises(InputError, match=r"skips must .* shape \(3, 4\); got shape \(3, 2\)"):
        align_layers_batch(costs, skips=np.zeros((3, 2)))
    with pytest.raises(InputError, match="one entry per problem: 3, got 2"):
        align_layers_batch(costs, skips=np.zeros((2, 4)))
    with pytest.raises(InputError, match="2 deep but 4 shallow"):
        align_layers_batch(costs.transpose(0, 2, 1))
    with pytest.raises(InputError, match=r"costs\[0\] must be a matrix"):
        align_layers_batch(np.empty((2, 0, 3)))
    with pytest.raises(InputError, match="array of real numbers"):
        align_layers_batch(np.char.add(costs.astype(str), "x"))
    with pytest.raises(InputError, match=r"costs\[2\] is so large that sums overflow"):
        align_layers_batch(np.concatenate([costs[:2], np.full((1, 4, 2), 1.7e308)]))
    blocked = costs.copy()
    blocked[1, :, 1] = np.inf
    with pytest.raises(AlignmentError, match="in problem 1: shallow layer 1 finds no partner"):
        align_layers_batch(blocked)


def compiled(
    costs, skips, shapes, mode=0, solution=None, totals=None, reached=None, skips_shallow=None
):
    count = len(shapes)
    _core.align_layers(
        costs,
        skips,
        np.empty(0) if skips_shallow is None else skips_shallow,
        np.asarray(shapes, dtype=np.int64),
        mode,
        False,
        False,
        np.empty(skips.size, dtype=np.int64) if solution is None else solution,
        np.empty(count) if totals is None else totals,
        np.empty((count, 2), dtype=np.int64) if reached is None else reached,
    )


def test_the_compiled_door_refuses_too():
    costs, skips = np.ones(8), np.zeros(4)
    readonly = np.empty(4, dtype=np.int64)
    readonly.flags.writeable = False
    huge = 2**62
    for arguments, message in [
        ((costs, skips, [4, 2]), "shapes must have shape"),
        ((costs, skips, [[4, 2]], 2), "mode must be 0"),
        ((costs, skips, [[4, 3]]), "costs ends before the last problem"),
        ((costs, skips, [[huge, 8]]), "costs ends before the last problem"),
        ((costs, skips, [[4, huge]]), "costs ends before the last problem"),
        ((costs, skips, [[2, 2]]), "costs has more entries"),
        ((costs, skips[:3].copy(), [[4, 2]]), "skips must have one entry a deep layer"),
        ((costs, skips, [[0, 2]]), "shapes must be positive"),
        ((costs, skips, [[-4, -2]]), "shapes must be positive"),
        ((costs, skips, [[4, 2]], 0, np.empty(3, dtype=np.int64)), "deep_to_shallow must have"),
        ((costs, skips, [[4, 2]], 0, readonly), "not writeable"),
        ((costs, skips, [[4, 2]], 0, None, np.empty(2)), "total_costs must have shape"),
        ((costs * np.nan, skips, [[4, 2]]), "NaN or -inf in problem 0"),
        ((costs, skips - np.inf, [[4, 2]]), "NaN or -inf in problem 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            compiled(*arguments)
    for gaps, mode, message in [
        (np.ones(3), 0, "skips_shallow must have one entry a shallow layer"),
        (np.ones(1), 0, "skips_shallow must have one entry a shallow layer"),
        (np.ones(2), 1, "skips_shallow needs mode 0"),
        (np.array([0.0, np.nan]), 0, "NaN or -inf in problem 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            compiled(costs, skips, [[4, 2]], mode, skips_shallow=gaps)
    with pytest.raises(ValueError, match="reached must have shape"):
        compiled(costs, skips, [[4, 2]], reached=np.empty(2, dtype=np.int64)[:1].copy())
    for wrong in (costs.astype(np.float32), costs.astype(">f8"), np.ones(16)[::2], None):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            compiled(wrong, skips, [[4, 2]])
