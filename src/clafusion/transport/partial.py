r"""Partial transport: so many pairs of the cheapest, over several problems at once.

Of the problems' costs ``C`` those matchings are found that have ``n`` pairs in all and cost least.
With a price :math:`\lambda` for each channel that stays alone, the problems part:

.. math:: \min_{M} \sum_{(i, j) \in M} (C_{ij} - \lambda),

each an assignment in which every channel may also go to nobody (Caffarelli and McCann, Ann. of
Math. 2010). The number of pairs grows with the price, so that bisection finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import InputError
from clafusion.transport.assignment import assign

__all__ = ["cheapest_pairs"]

_PRECISION = 1e-6  # of the price, relative to the largest


def cheapest_pairs(costs: Sequence[Tensor], count: int) -> list[Tensor]:
    """Match the rows and columns of several matrices, at least ``count`` pairs in all.

    Parameters
    ----------
    costs
        One ``(num_source, num_target)`` for each problem, finite.
    count
        How many pairs there are in all. There are more where costs are below 0: such pairs come
        for nothing.

    Returns
    -------
    list
        For each problem ``(num_pairs, 2)``: rows and columns, by row.

    Raises
    ------
    InputError
        There are not so many pairs.
    """
    given = [one.detach().cpu().double() for one in costs]
    most = sum(min(one.shape) for one in given)
    if not 0 <= count <= most:
        raise InputError(f"count must be from 0 to {most}, as many pairs as there are; got {count}")
    found = _pairs(given, 0.0)
    if _number(found) >= count:
        return found
    low, high = 0.0, 2.0 * max(float(one.max()) for one in given if one.numel())
    while _number(found := _pairs(given, high)) < count:
        low, high = high, 2.0 * high
    precision = _PRECISION * high
    while _number(found) > count and high - low > precision:
        price = (low + high) / 2
        tried = _pairs(given, price)
        if _number(tried) < count:
            low = price
        else:
            high, found = price, tried
    return _without_dearest(given, found, _number(found) - count)


def _number(pairs: Sequence[Tensor]) -> int:
    return sum(len(one) for one in pairs)


def _pairs(costs: Sequence[Tensor], price: float) -> list[Tensor]:
    """Return the best pairs of each problem, given what it costs to leave one out."""
    gains = [torch.clamp(price - one, min=0.0) for one in costs]
    squares = []
    for gain in gains:
        size = max(gain.shape)
        square = gain.new_zeros(size, size)
        square[: gain.size(0), : gain.size(1)] = -gain
        squares.append(square)
    found = []
    for gain, solution in zip(gains, assign(squares, [1.0] * len(squares)), strict=True):
        entries = solution.plan.entries
        rows, columns = entries.rows.long(), entries.columns.long()
        inside = (rows < gain.size(0)) & (columns < gain.size(1))
        rows, columns = rows[inside], columns[inside]
        chosen = gain[rows, columns] > 0
        pairs = torch.stack([rows[chosen], columns[chosen]], 1)
        found.append(pairs[pairs[:, 0].argsort()])
    return found


def _without_dearest(costs: Sequence[Tensor], pairs: list[Tensor], count: int) -> list[Tensor]:
    """Return the pairs without so many of those that cost most: of ties at the last price."""
    if count == 0:
        return pairs
    prices = torch.cat([cost[one.unbind(1)] for cost, one in zip(costs, pairs, strict=True)])
    stays = torch.ones(len(prices), dtype=torch.bool)
    stays[prices.argsort(descending=True, stable=True)[:count]] = False
    sizes = [len(one) for one in pairs]
    return [one[kept] for one, kept in zip(pairs, stays.split(sizes), strict=True)]
