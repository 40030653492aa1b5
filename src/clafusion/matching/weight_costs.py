r"""Match channels by their weights, group after group, until nothing improves.

How alike two channels' weights are depends on how the channels on the weights' other side are
matched. So each group is matched in turn while the plans of the others stand still (Git Re-Basin,
Ainsworth et al., arXiv 2209.04836, algorithm 1: block coordinate descent). With the activations'
costs added, both spaces decide (MuDSC, Xu et al., arXiv 2403.01753).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from clafusion.config import Auto, Solver
from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.moving import move_along
from clafusion.correspondence.shared_heads import has_keys
from clafusion.errors import ConvergenceWarning, warn
from clafusion.execution.call import State
from clafusion.matching.head_plans import HeadPairs, plan_heads
from clafusion.tracing.model import ChannelGroup
from clafusion.transport.plan import TransportPlan
from clafusion.transport.solve import solve_compactly

__all__ = ["index_plan", "index_plans", "is_at_rest", "match_by_weights"]

_AT_REST = 1e-5  # of the mass: what Sinkhorn's float32 leaves


def is_at_rest(before: TransportPlan, after: TransportPlan, *, averages: bool = False) -> bool:
    """Return whether a plan is the same as the one before, but for what a soft solver leaves.

    With ``averages`` only the averages that leave a group count, not the channels' masses.
    """
    mass = before.covered if averages else before.column_sums
    return before.distance(after, averages=averages) / 2 <= _AT_REST * float(mass.sum())


def index_plan(num_source: int, num_target: int) -> TransportPlan:
    """Return the plan that keeps the channels' order.

    Each channel is an interval of [0, 1]; the mass between two is how far they overlap. For equal
    numbers that is the identity.
    """
    source = torch.arange(num_source + 1, dtype=torch.float64) / num_source
    target = torch.arange(num_target + 1, dtype=torch.float64) / num_target
    bounds = torch.cat([source, target]).unique()
    rows, columns = (
        torch.searchsorted(one, bounds[:-1], right=True) - 1 for one in (source, target)
    )
    shape = num_source, num_target
    return TransportPlan.from_entries(shape, rows, columns, bounds[1:] - bounds[:-1])


def index_plans(correspondence: Correspondence) -> list[TransportPlan | None]:
    """Return for each channel group of the target the plan that keeps the channels' order.

    Of heads of which the networks have different numbers that is the order of the heads, and of
    the channels within them.
    """
    plans: list[TransportPlan | None] = [
        None if other < 0 else index_plan(correspondence.source.groups[other].size, one.size)
        for one, other in zip(correspondence.target.groups, correspondence.groups, strict=True)
    ]
    for to, of in zip(
        correspondence.target.united_heads, correspondence.source.united_heads, strict=True
    ):
        for index in to.groups:
            source = correspondence.source.groups[correspondence.groups[index]].size // of.count
            target = correspondence.target.groups[index].size // to.count
            within, (rows, columns, masses) = (
                index_plan(source, target),
                index_plan(of.count, to.count).entries,
            )
            heads = dict(
                zip(zip(rows.tolist(), columns.tolist(), strict=True), masses.tolist(), strict=True)
            )
            plans[index] = TransportPlan.from_heads(
                dict.fromkeys(heads, within), heads, (of.count, to.count)
            )
    return plans


def match_by_weights(
    correspondence: Correspondence,
    *,
    activation_costs: Sequence[Tensor | None] | None = None,
    masses: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    known: Mapping[int, TransportPlan] | None = None,
    head_pairs: Sequence[HeadPairs | None] = (),
    solver: Solver | str = Auto(),  # noqa: B008
    max_sweeps: int = 100,
) -> list[TransportPlan | None]:
    r"""Return a plan for each channel group of the target.

    With ``a`` and ``b`` all weights of two channels, the source's in the target's channels
    by the other groups' plans, the cost is :math:`\lVert a - b \rVert^2`; with
    ``activation_costs`` it is the mean of :math:`1 - \cos(a, b)` and those.

    Parameters
    ----------
    correspondence
        What corresponds.
    activation_costs
        For each group ``(num_source, num_target)``, in [0, 2], or None: see
        :func:`clafusion.matching.activation_costs.activation_costs` with ``"correlation"``.
    masses
        For each group those of its source and target channels; default equal ones. See
        :func:`clafusion.matching.masses.marginals`.
    known
        Plans that are known already, by group.
    head_pairs
        For each of ``correspondence.target.united_heads`` which heads go together, where that is
        known; see :func:`clafusion.matching.head_plans.head_plans`.
    solver
        As for :func:`clafusion.transport.solve.solve_transport`.
    max_sweeps
        How often at most all groups are matched.

    Returns
    -------
    list
        A plan, or None where the source has no such channels.

    Warns
    -----
    ConvergenceWarning
        The plans still changed in the last sweep. (By an exact solver and for equal widths they
        come to rest, for then every step lessens one sum of squares.)
    """
    known = known or {}
    states = correspondence.target.state(), correspondence.source.state()
    plans = index_plans(correspondence)
    for index, plan in known.items():
        plans[index] = plan

    def cost_of(index: int) -> Tensor:
        one = correspondence.target.groups[index]
        cost = _weight_costs(correspondence, plans, one, states, activation_costs is not None)
        if activation_costs is None:
            return cost
        of_activations = activation_costs[index]
        assert of_activations is not None
        return cost.add_(of_activations.to(cost)).div_(2)

    def single(index: int) -> list[TransportPlan]:
        pair = None if masses is None else masses[index]
        weights = (None, None) if pair is None else ([pair[0]], [pair[1]])
        solved = solve_compactly([cost_of(index)], *weights, solver=solver)
        return [one.plan for one in solved]

    def united(place: int, left: Sequence[int]) -> list[TransportPlan]:
        counts = (
            correspondence.source.united_heads[place].count,
            correspondence.target.united_heads[place].count,
        )
        pairs = head_pairs[place] if head_pairs else None
        costs = [cost_of(index) for index in left]
        return plan_heads(costs, counts, pairs, solver=solver)[0]

    # What is matched at once: a group, or all united ones of the same heads.
    steps: list[tuple[Sequence[int], Callable[[], list[TransportPlan]]]] = []
    in_heads = {index for one in correspondence.target.united_heads for index in one.groups}
    for place, one in enumerate(correspondence.target.united_heads):
        left = [index for index in one.groups if index not in known]
        if left:
            steps.append((left, partial(united, place, left)))
    for index, plan_of in enumerate(plans):
        if plan_of is not None and index not in known and index not in in_heads:
            steps.append(([index], partial(single, index)))
    steps.sort(key=lambda step: step[0][0])
    for _ in range(max_sweeps):
        changed = False
        for indices, match in steps:
            for index, plan in zip(indices, match(), strict=True):
                before = plans[index]
                assert before is not None, "groups without a partner are left out"
                changed |= not is_at_rest(before, plan)
                plans[index] = plan
        if not changed:
            return plans
    warn(
        f"matching by weights still changed after {max_sweeps} sweeps; its last plans are taken",
        ConvergenceWarning,
    )
    return plans


def _weight_costs(
    correspondence: Correspondence,
    plans: Sequence[TransportPlan | None],
    group: ChannelGroup,
    states: tuple[State, State],
    normalised: bool,
) -> Tensor:
    source_size = correspondence.source.groups[correspondence.groups[group.index]].size
    device = next(iter(states[0].values())).device
    shape = (source_size, group.size)
    cross = torch.zeros(shape, dtype=torch.float64, device=device)
    of_source, of_target = cross.new_zeros(source_size, 1), cross.new_zeros(group.size)
    statistics = dict(correspondence.target.model.named_buffers())  # of activations: no weights
    for group_axis in group.axes:
        name = group_axis.use.parameter
        if (
            name not in correspondence.names
            or name in statistics
            or name in correspondence.products
        ):
            continue
        other_name = correspondence.names[name]
        place = [use.index for use in correspondence.target.uses_by_parameter[name]].index(
            group_axis.use.index
        )
        other_use = correspondence.source.uses_by_parameter[other_name][place]
        axes, other_axes = (
            correspondence.target.axes_of(name),
            correspondence.source.axes_of(other_name),
        )
        target = group_axis.use.view(states[0][name]).double()
        source = other_use.view(states[1][other_name]).double()
        for (where, axis), pairs in axes.items():
            if where == place and axis != group_axis.axis:
                length = group_axis.use.size[axis]
                source = move_along(
                    plans, source, axis, length, pairs, other_axes[where, axis], name
                )
        on_axis = zip(axes[place, group_axis.axis], other_axes[place, group_axis.axis], strict=True)
        partner = next(other for (_, one), (_, other) in on_axis if one is group_axis)
        a = source.movedim(group_axis.axis, 0)[partner.positions.reshape(-1)].reshape(
            source_size, -1
        )
        b = target.movedim(group_axis.axis, 0)[group_axis.positions.reshape(-1)]
        b = b.reshape(group.size, -1)
        if a.size(1) != b.size(1):  # other numbers of heads share the channels: by their means
            other = correspondence.source.groups[correspondence.groups[group.index]]
            counts = partner.positions.size(1), group_axis.positions.size(1)
            keys = has_keys(group, other, *counts[::-1])
            a = _of_one_head(a.reshape(source_size, other.sharing + keys, -1), keys)
            b = _of_one_head(b.reshape(group.size, group.sharing + keys, -1), keys)
        cross += a @ b.T
        of_source += a.square().sum(1, keepdim=True)
        of_target += b.square().sum(1)
    if normalised:
        lengths = (of_source * of_target).sqrt_().clamp_(min=1e-30)
        return cross.div_(lengths).neg_().add_(1)
    return (of_source + of_target).sub_(cross.mul_(2)).clamp_(min=0)


def _of_one_head(places: Tensor, keys: bool) -> Tensor:
    """Return the mean over the heads that share channels, beside what their keys have, if any."""
    if not keys:
        return places.mean(1)
    return torch.cat([places[:, :-1].mean(1), places[:, -1]], 1)
