"""The cheapest pairs of several problems together."""

from itertools import combinations, permutations, product

import pytest
import torch

from clafusion import InputError
from clafusion.transport.partial import cheapest_pairs


def least_total(costs, count):
    """Return the least total of ``count`` pairs, by trying all of them."""
    by_number = []
    for cost in costs:
        rows, columns = cost.shape
        by_number.append(
            [
                min(
                    sum(float(cost[i, j]) for i, j in zip(chosen, partners, strict=True))
                    for chosen in combinations(range(rows), size)
                    for partners in permutations(range(columns), size)
                )
                for size in range(min(rows, columns) + 1)
            ]
        )
    return min(
        sum(one[size] for one, size in zip(by_number, sizes, strict=True))
        for sizes in product(*(range(len(one)) for one in by_number))
        if sum(sizes) == count
    )


def total(costs, pairs):
    return sum(
        float(cost[one[:, 0], one[:, 1]].sum()) for cost, one in zip(costs, pairs, strict=True)
    )


def check_pairs(costs, pairs):
    for cost, one in zip(costs, pairs, strict=True):
        assert one.shape[1] == 2
        for side in (0, 1):
            assert len(one[:, side].unique()) == len(one)
            assert bool((one[:, side] < cost.size(side)).all())


@pytest.mark.parametrize("count", range(8))
def test_they_are_the_cheapest(count):
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 3), (2, 4), (3, 2)]
    costs = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    pairs = cheapest_pairs(costs, count)
    check_pairs(costs, pairs)
    assert sum(map(len, pairs)) == count
    assert total(costs, pairs) == pytest.approx(least_total(costs, count), abs=1e-5)


def test_problems_get_pairs_where_these_cost_little():
    dear, cheap = torch.full((4, 4), 0.9), torch.full((4, 4), 0.1)
    assert [len(one) for one in cheapest_pairs([dear, cheap], 4)] == [0, 4]
    assert [len(one) for one in cheapest_pairs([dear, cheap], 6)] == [2, 4]


def test_costs_below_zero_come_for_nothing():
    cost = torch.full((3, 3), 0.5) - 1.5 * torch.eye(3)
    (pairs,) = cheapest_pairs([cost], 0)
    assert pairs.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_ties_leave_as_many_as_are_asked_for():
    (pairs,) = cheapest_pairs([torch.zeros(5, 5) + 0.25], 3)
    check_pairs([torch.zeros(5, 5)], [pairs])
    assert len(pairs) == 3


def test_no_more_pairs_than_there_are():
    with pytest.raises(InputError, match="count must be from 0 to 5"):
        cheapest_pairs([torch.zeros(3, 4), torch.zeros(2, 2)], 6)
