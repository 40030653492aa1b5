r"""Match channels across two networks and within each: zip them (ZipIt, arXiv 2305.03053).

Two networks that learnt different things have few channels in common, and averaging a channel with
one that has nothing to do with it destroys both. Zipping puts all channels of both side by side
and unites those that are most alike, also two of one network, until as many groups are left as the
target has channels. A group of one network alone keeps what only that network knows.

Both networks then move: each has a plan into the groups, and
:func:`clafusion.merging.blending.blend` takes the two. What leaves a group is the mean of its channels
(the paper's merge matrix), and what reads a channel reads its group (the unmerge matrix).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence, onto_itself
from clafusion.errors import InputError
from clafusion.matching.activation_costs import activation_costs
from clafusion.profiling.profile import ModelProfile

__all__ = ["zip_channels", "zip_plans"]


def zip_channels(costs: Tensor, num_source: int, *, budget: float) -> tuple[Tensor, Tensor]:
    r"""Group the channels of two networks until as many groups are left as the target has channels.

    Starting with each channel alone, the two groups with the smallest cost are united (Stoica et
    al., arXiv 2305.03053, section 4). The cost of two groups is the largest of their channels'
    costs (complete linkage), so that what is united is alike throughout. Uniting two groups that
    both hold channels of one network merges two of its channels. That may happen
    ``floor(budget * n)`` times for a network of ``n`` channels, and for the source as often again
    as it has more channels than the target. Ties go to the first channels.

    Parameters
    ----------
    costs
        ``(num_source + num_target, num_source + num_target)``, symmetric, finite: of every two
        channels, the source's before the target's.
    num_source
        How many are the source's.
    budget
        In [0, 1]: the share of a network's channels that may be merged within it.

    Returns
    -------
    (source_plan, target_plan)
        ``(num_source, num_target)`` and ``(num_target, num_target)``, float64: each channel's mass
        ``1 / n`` in its group. Groups stand where their first target channel was, those without
        one where one has gone.

    Raises
    ------
    InputError
        ``costs`` is not square and finite or holds no target channel, or ``budget`` is not in
        [0, 1].
    """
    count = len(costs)
    if costs.ndim != 2 or costs.size(1) != count or not 0 < num_source < count:
        raise InputError(
            "costs must be (num_source + num_target) square with both positive; got shape "
            f"{tuple(costs.shape)} and num_source {num_source}"
        )
    if not bool(torch.isfinite(costs).all()):
        raise InputError("costs must be finite")
    if not 0.0 <= budget <= 1.0:
        raise InputError(f"budget must be in [0, 1]; got {budget!r}")
    num_target = count - num_source
    between = costs.detach().cpu().double().numpy().copy()
    between = (between + between.T) / 2
    np.fill_diagonal(between, np.inf)
    holds = np.zeros((2, count), dtype=bool)  # which network's channels a group has
    holds[0, :num_source] = holds[1, num_source:] = True
    left = [_whole(budget * num_source) + max(num_source - num_target, 0)]
    left.append(_whole(budget * num_target))

    def forbid(network: int) -> None:
        groups = np.flatnonzero(holds[network])
        between[np.ix_(groups, groups)] = np.inf

    for network in (0, 1):
        if left[network] == 0:
            forbid(network)
    group = np.arange(count)
    nearest = between.argmin(1)
    least = between.min(1)
    for _ in range(num_source):
        one = int(least.argmin())
        other = int(nearest[one])
        group[group == other] = one
        # Complete linkage: what is forbidden to one part is forbidden to both.
        between[one] = np.maximum(between[one], between[other])
        between[:, one] = between[one]
        between[other] = between[:, other] = np.inf
        stale = (nearest == one) | (nearest == other)
        stale[[one, other]] = True
        merged = holds[:, one] & holds[:, other]
        holds[:, one] |= holds[:, other]
        holds[:, other] = False
        for network in (0, 1):
            left[network] -= int(merged[network])
            if merged[network] and left[network] == 0:
                forbid(network)
                stale[:] = True
        nearest[stale] = between[stale].argmin(1)
        least[stale] = between[stale].min(1)
    place = _places(group, num_source)
    source_plan = torch.zeros(num_source, num_target, dtype=torch.float64)
    target_plan = torch.zeros(num_target, num_target, dtype=torch.float64)
    source_plan[torch.arange(num_source), place[:num_source]] = 1 / num_source
    target_plan[torch.arange(num_target), place[num_source:]] = 1 / num_target
    return source_plan, target_plan


def _whole(number: float) -> int:
    return math.floor(number + 1e-9)  # 0.29 * 100 is below 29


def _places(group: NDArray[np.int64], num_source: int) -> Tensor:
    """Return each channel's place in the result."""
    labels = group.tolist()
    place: dict[int, int] = {}
    for position, label in enumerate(labels[num_source:]):
        place.setdefault(label, position)
    free = iter(sorted(set(range(len(labels) - num_source)) - set(place.values())))
    for label in labels:
        if label not in place:
            place[label] = next(free)
    return torch.tensor([place[label] for label in labels])


def zip_plans(
    lifting: Correspondence, deep: ModelProfile, shallow: ModelProfile, *, budget: float
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return for each channel group of the deep network the plans of the shallow and the deep one.

    Channels are as near as their activations correlate (:func:`clafusion.matching.activation_costs`). Channels
    that no layer reads keep their order and are not merged within a network; of those the shallow
    network does not have, the deep one's stay.

    Raises
    ------
    InputError
        As for :func:`clafusion.matching.activation_costs.activation_costs` and :func:`zip_channels`.
    """
    across = activation_costs(lifting, deep, shallow)
    of_deep, of_shallow = (
        activation_costs(onto_itself(one.traced), one, one) for one in (deep, shallow)
    )
    source_plans: list[Tensor | None] = []
    target_plans: list[Tensor | None] = []
    for one, other, cost, points in zip(
        lifting.deep.groups, lifting.groups, across, lifting.points, strict=True
    ):
        if cost is None:
            source_plans.append(None)
            target_plans.append(torch.eye(one.size, dtype=torch.float64) / one.size)
            continue
        within_source, within_target = of_shallow[other], of_deep[one.index]
        assert within_source is not None
        assert within_target is not None
        joint = torch.cat(
            [torch.cat([within_source, cost], 1), torch.cat([cost.T, within_target], 1)]
        )
        plans = zip_channels(joint, len(cost), budget=budget if points else 0.0)
        source_plans.append(plans[0])
        target_plans.append(plans[1])
    return source_plans, target_plans
