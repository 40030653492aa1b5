r"""Match heads of which two networks have different numbers.

The groups of all heads are united into one (:mod:`clafusion.correspondence.heads`), whose plan
moves heads as wholes,

.. math:: T = \sum_{(i, j)} E_{ij} \otimes T_{ij},

with :math:`T_{ij}` the best plan of the channels of the source's head ``i`` and the target's head
``j``. Each head of the network that has more of them goes with one of the other's, which get
equally many up to one. Where the target has more, several of its heads are copies of one of the
source's, and what is read from that is divided among them: the source's function stays as it is.
Where the target has fewer, each of its heads is a mean of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clafusion.config import Auto, Solver
from clafusion.correspondence.correspondence import Correspondence
from clafusion.matching.activation_costs import pair_costs, says_nothing
from clafusion.profiling.profile import ModelProfile
from clafusion.transport.plan import TransportPlan
from clafusion.transport.solve import solve_compactly

__all__ = ["HeadPairs", "head_plans", "plan_heads"]

HeadPairs: TypeAlias = NDArray[np.float64]
"""``(num_source_heads, num_target_heads)``: 1 where two heads go together, else 0."""


def head_plans(
    correspondence: Correspondence,
    target: ModelProfile,
    source: ModelProfile,
    *,
    metric: str = "correlation",
    solver: Solver | str = Auto(),  # noqa: B008
) -> tuple[dict[int, TransportPlan], list[HeadPairs | None]]:
    """Match heads by what the data show of their channels.

    Returns
    -------
    (plans, pairs)
        The plans of the united groups that show, by group; and for each of
        ``correspondence.target.united_heads`` which heads go together, or None where no group
        shows. Those can be matched by weights: see
        :func:`clafusion.matching.weight_costs.match_by_weights`.
    """
    plans: dict[int, TransportPlan] = {}
    pairs: list[HeadPairs | None] = []
    for one, other in zip(
        correspondence.target.united_heads, correspondence.source.united_heads, strict=True
    ):
        shown = [(c, correspondence.groups[c], correspondence.hooks[c]) for c in one.groups]
        costs = pair_costs(correspondence, target, source, shown, metric=metric)
        visible = {
            c: cost for c, cost in zip(one.groups, costs, strict=True) if not says_nothing(cost)
        }
        if not visible:
            pairs.append(None)
            continue
        found, together = plan_heads(
            list(visible.values()), (other.count, one.count), solver=solver
        )
        plans |= zip(visible, found, strict=True)
        pairs.append(together)
    return plans, pairs


def plan_heads(
    costs: Sequence[Tensor],
    counts: tuple[int, int],
    pairs: HeadPairs | None = None,
    *,
    solver: Solver | str = Auto(),  # noqa: B008
) -> tuple[list[TransportPlan], HeadPairs]:
    """Return the plans of groups that share heads, and which heads go together.

    Parameters
    ----------
    costs
        For each group ``(num_source, num_target)``, head after head.
    counts
        How many heads the source and the target have.
    pairs
        Which heads go together, where that is known. Else the cost of two heads is the sum over
        the groups of what their best plans cost.
    """
    chosen = np.argwhere(np.ones(counts) if pairs is None else pairs).tolist()
    problems = []
    for cost in costs:
        heads = cost.unflatten(0, (counts[0], -1)).unflatten(2, (counts[1], -1))
        problems += [heads[i, :, j] for i, j in chosen]
    solved = iter(solve_compactly(problems, solver=solver))
    within: list[dict[tuple[int, int], TransportPlan]] = []
    total = np.zeros(counts)
    for _ in costs:
        within.append({})
        for i, j in chosen:
            one = next(solved)
            within[-1][i, j] = one.plan
            total[i, j] += float(one.cost)
    if pairs is None:
        pairs = _assigned(total)
    mass = pairs / pairs.sum()
    together = {(i, j): float(mass[i, j]) for i, j in np.argwhere(pairs).tolist()}
    plans = [
        TransportPlan.from_heads({pair: plans[pair] for pair in together}, together, counts)
        for plans in within
    ]
    return plans, pairs


def _assigned(costs: NDArray[np.float64]) -> HeadPairs:
    """Match heads at the least cost in all.

    Of the side that has more each goes with one; the others get equally many up to one.
    """
    if costs.shape[0] < costs.shape[1]:
        return _assigned(costs.T).T
    more, fewer = costs.shape
    least, most = more // fewer, -(-more // fewer)
    # So much cheaper are the places that must be filled that none of them stays empty.
    bonus = 1.0 + more * float(costs.max() - costs.min())
    places = np.concatenate([costs - bonus * (turn < least) for turn in range(most)], 1)
    from scipy.optimize import linear_sum_assignment  # here, for it takes long to import

    rows, columns = linear_sum_assignment(places)
    matched = np.zeros(costs.shape)
    matched[rows, columns % fewer] = 1.0
    return matched
