r"""Match channels across networks and within each: zip them (ZipIt, arXiv 2305.03053).

Networks that learnt different things have few channels in common, and averaging a channel with one
that has nothing to do with it destroys both. Zipping puts all channels of all networks side by side
and unites those that are most alike, also two of one network, until as many groups are left as the
target has channels. A group of one network alone keeps what only that network knows.

All networks then move: each has a plan into the groups, and the mean takes into each group only
those that move there (:func:`clafusion.merging.mean.average`). What leaves a group is the mean of
its channels (the paper's merge matrix), and what reads a channel reads its group (the unmerge
matrix).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.errors import InputError, StructureError
from clafusion.matching.activation_costs import correlations, group_views
from clafusion.targets.sources import Source
from clafusion.transport.plan import TransportPlan

__all__ = ["zip_channels", "zip_plans"]


def zip_channels(
    costs: Tensor,
    sizes: Sequence[int],
    num_groups: int,
    *,
    budget: float,
    home: int | None = None,
) -> list[TransportPlan]:
    r"""Group the channels of networks until so many groups are left.

    Starting with each channel alone, the two groups with the smallest cost are united (Stoica et
    al., arXiv 2305.03053, section 4). The cost of two groups is the largest of their channels'
    costs (complete linkage), so that what is united is alike throughout. Uniting two groups that
    both hold channels of one network merges two of its channels. That may happen
    ``floor(budget * n)`` times for a network of ``n`` channels, as often again as it has more
    channels than there are groups, and otherwise only where nothing else can be united. Where it
    may not happen at all, the channels of the others each join one of the home's. Ties go to the
    first channels.

    Parameters
    ----------
    costs
        ``(sum(sizes), sum(sizes))``, symmetric, finite: of every two channels, network after
        network.
    sizes
        How many channels each network has.
    num_groups
        How many groups are left, at most ``sum(sizes)``.
    budget
        In [0, 1]: the share of a network's channels that may be merged within it.
    home
        Position of a network of ``num_groups`` channels: a group stands where its first channel
        of that network was, and one without such a channel where one has gone.

    Returns
    -------
    list
        For each network the plan ``(size, num_groups)``: each channel's mass ``1 / size`` goes to
        its group.

    Raises
    ------
    InputError
        ``costs`` is not square and finite, the sizes do not fit, or ``budget`` is not in [0, 1].
    """
    count = len(costs)
    if costs.ndim != 2 or costs.size(1) != count or sum(sizes) != count or min(sizes) < 1:
        raise InputError(
            "costs must be square, with one row for each channel of all networks; got shape "
            f"{tuple(costs.shape)} and sizes {tuple(sizes)}"
        )
    if not 0 < num_groups <= count or (home is not None and sizes[home] != num_groups):
        raise InputError(
            f"num_groups must be from 1 to the number of all channels, {count}, and the home's "
            f"size; got {num_groups}"
        )
    if not bool(torch.isfinite(costs).all()):
        raise InputError("costs must be finite")
    if not 0.0 <= budget <= 1.0:
        raise InputError(f"budget must be in [0, 1]; got {budget!r}")
    group = _grouped(costs.detach().cpu().double().numpy(), sizes, num_groups, budget, home)
    firsts = [0, *accumulate(sizes)]
    place = _places(group, num_groups, None if home is None else (firsts[home], firsts[home + 1]))
    return [
        TransportPlan.from_columns(place[first:last], num_groups, 1 / (last - first))
        for first, last in pairwise(firsts)
    ]


def _grouped(
    costs: NDArray[np.float64],
    sizes: Sequence[int],
    num_groups: int,
    budget: float,
    home: int | None,
) -> NDArray[np.int64]:
    """Return for each channel the first channel of its group."""
    unions = _Unions(costs, sizes, num_groups, budget, home)
    for _ in range(len(costs) - num_groups):
        unions.unite_nearest()
    return unions.group


class _Unions:
    """Groups of channels that are united step by step."""

    def __init__(
        self,
        costs: NDArray[np.float64],
        sizes: Sequence[int],
        num_groups: int,
        budget: float,
        home: int | None,
    ) -> None:
        count = len(costs)
        self.linkage = (costs + costs.T) / 2  # of all pairs, also of those that are forbidden
        np.fill_diagonal(self.linkage, np.inf)
        self.group = np.arange(count)
        self.holds = np.zeros((len(sizes), count), dtype=bool)  # whose channels a group has
        for network, (first, last) in enumerate(pairwise([0, *accumulate(sizes)])):
            self.holds[network, first:last] = True
        self.left = [_whole(budget * size) + max(size - num_groups, 0) for size in sizes]
        # Where no network may merge any of its own, each channel of the home takes one of every
        # other network: whatever is united, a place is then left for what is not.
        self.home = home if not any(self.left) else None
        self.between = np.full((count, count), np.inf)
        self.nearest, self.least = np.zeros(count, dtype=np.int64), np.full(count, np.inf)
        self._allow(np.arange(count))

    def unite_nearest(self) -> None:
        """Unite the two groups with the smallest cost."""
        one = int(self.least.argmin())
        if not np.isfinite(self.least[one]):  # nothing else can be united: within networks, then
            self.left = [len(self.group)] * len(self.left)
            self.home = None
            self._allow(np.arange(len(self.group)))
            one = int(self.least.argmin())
        other = int(self.nearest[one])
        self.group[self.group == other] = one
        # Complete linkage: groups are as near as the two channels in them that are least alike.
        self.linkage[one] = np.maximum(self.linkage[one], self.linkage[other])
        self.linkage[:, one] = self.linkage[one]
        self.linkage[other] = self.linkage[:, other] = np.inf
        merged = self.holds[:, one] & self.holds[:, other]
        self.holds[:, one] |= self.holds[:, other]
        self.holds[:, other] = False
        stale = (self.nearest == one) | (self.nearest == other)
        stale[[one, other]] = True
        for network in np.flatnonzero(merged).tolist():
            self.left[network] -= 1
            if self.left[network] == 0:
                stale[:] = True
        self._allow(np.flatnonzero(stale), changed=(one, other))

    def _allow(self, rows: NDArray[np.int64], changed: tuple[int, ...] = ()) -> None:
        """Find again which groups may be united with those of some rows, and the nearest one."""
        for row in {*rows.tolist(), *changed}:
            self.between[row] = np.where(self._allowed(row), self.linkage[row], np.inf)
        for row in changed:
            self.between[:, row] = self.between[row]
        for row in rows.tolist():
            self.nearest[row] = self.between[row].argmin()
            self.least[row] = self.between[row, self.nearest[row]]

    def _allowed(self, row: int) -> NDArray[np.bool_]:
        """Return which groups may be united with one."""
        full = [network for network, left in enumerate(self.left) if left == 0]
        shared = self.holds[full] & self.holds[full, row][:, None]
        allowed = ~shared.any(0)
        if self.home is not None and not self.holds[self.home, row]:
            allowed &= self.holds[self.home]
        return np.asarray(allowed)


def _whole(number: float) -> int:
    return math.floor(number + 1e-9)  # 0.29 * 100 is below 29


def _places(group: NDArray[np.int64], num_groups: int, home: tuple[int, int] | None) -> Tensor:
    """Return each channel's place in the result."""
    labels = group.tolist()
    place: dict[int, int] = {}
    for position, label in enumerate([] if home is None else labels[home[0] : home[1]]):
        place.setdefault(label, position)
    free = iter(sorted(set(range(num_groups)) - set(place.values())))
    for label in labels:
        if label not in place:
            place[label] = next(free)
    return torch.tensor([place[label] for label in labels])


def zip_plans(sources: Sequence[Source], budget: float) -> list[list[TransportPlan | None]]:
    """Return for each parent and each channel group of the target the parent's plan.

    Channels are as near as their activations correlate. Channels that no layer reads keep their
    order and are not merged within a network; of those that only one parent has, its own stay.

    Raises
    ------
    StructureError
        The target has more channels than all parents together.
    InputError
        As for :func:`zip_channels`.
    """
    target = sources[0].correspondence.target
    plans: list[list[TransportPlan | None]] = [[None] * len(target.groups) for _ in sources]
    for group in target.groups:
        having = [i for i, one in enumerate(sources) if one.correspondence.groups[group.index] >= 0]
        if not having:
            continue
        sizes = [_size(sources[i], group.index) for i in having]
        if group.size > sum(sizes):
            raise StructureError(
                f"solver 'zip' cannot make {group.size} channels of {group.name!r} from "
                f"{' + '.join(map(str, sizes))}: use solver='auto', or a narrower target"
            )
        if len(having) == 1 and sizes[0] == group.size:
            stays = torch.arange(group.size)
            found = [TransportPlan.from_columns(stays, group.size, 1 / group.size)]
        else:
            costs, shows = _joint_costs([sources[i] for i in having], group.index)
            home = next(
                (
                    k
                    for k, i in enumerate(having)
                    if group.index in sources[i].plans and sizes[k] == group.size
                ),
                None,
            )
            found = zip_channels(
                costs, sizes, group.size, budget=budget if shows else 0.0, home=home
            )
        for i, plan in zip(having, found, strict=True):
            plans[i][group.index] = plan
    return plans


def _size(source: Source, index: int) -> int:
    return source.correspondence.source.groups[source.correspondence.groups[index]].size


def _joint_costs(sources: Sequence[Source], index: int) -> tuple[Tensor, bool]:
    """Return the costs of every two channels of all parents, and whether any data shows them."""
    views = [group_views(one.correspondence, one.profile, index) for one in sources]
    sizes = [_size(one, index) for one in sources]
    rows = []
    shows = False
    for x, size in zip(views, sizes, strict=True):
        blocks = []
        for y, other in zip(views, sizes, strict=True):
            common = [key for key in x if key in y and len(x[key]) == len(y[key])]
            block = torch.zeros(size, other, dtype=torch.float64)
            for key in common:
                block += correlations(x[key], y[key]).to(block)
            # What no data shows together counts as uncorrelated.
            blocks.append(1.0 - block / max(len(common), 1))
            shows |= bool(common) and x is not y
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows), shows
