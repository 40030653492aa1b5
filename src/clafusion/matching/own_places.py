r"""Two networks side by side as far as the width allows: what agrees shares a place.

The target's channels are *places*. A channel of one network that agrees with one of the other
shares its place; any other has a place of its own. Both networks then have a plan into the places,
and the mean takes into each place only those that move there
(:func:`clafusion.merging.mean.average`). So what leads into an own place is that network's weight
in full, from its own channels alone; and a row that both have, as of the outputs, reads an own
place by the merge weight of the network that it belongs to. With places of their own for all
channels the layers are block diagonal, and the result puts out the weighted mean of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clafusion.config import FusionConfig, Wider
from clafusion.correspondence.correspondence import Correspondence, correspond
from clafusion.correspondence.moving import move_state
from clafusion.errors import InputError, StructureError, WidthWarning, warn
from clafusion.execution.lazy import overlaid
from clafusion.matching.activation_costs import group_structures, group_views, view_costs
from clafusion.matching.plans import Matched, channel_plans, with_heads_in_order
from clafusion.targets.resizing import resizing_plan
from clafusion.targets.sources import Source, TargetSources
from clafusion.targets.target import resized_model
from clafusion.tracing.model import ChannelGroup, TracedModel
from clafusion.tracing.operations import module_path, op_name
from clafusion.transport.partial import cheapest_pairs
from clafusion.transport.plan import TransportPlan
from clafusion.weights.build import with_weights

__all__ = ["match_with_own_places"]

_EQUAL = 1e-10  # of a channel's mean square may be the difference of copies, for roundings
_WITH = ", with own_places=True"
_UNSEEN = 1.0  # the cost of channels that no data shows: as of uncorrelated ones
_NORMS = frozenset("layer_norm native_layer_norm rms_norm group_norm native_group_norm".split())


def match_with_own_places(
    sources: TargetSources, names: Sequence[str], config: FusionConfig
) -> tuple[TracedModel, tuple[Matched, ...]]:
    r"""Give the channels of two networks their places.

    Of a target :class:`clafusion.config.Wider` the structure of ``sources`` gets as many channels
    as there are places. With ``a`` and ``b`` the networks' channels in a group and ``f`` the
    factor, all groups together have at the most

    .. math:: \sum_g \max(a_g, b_g) + (f - 1) \min(a_g, b_g)

    of them, wherever channels agree the least. Channels that are copies share a place in any case.
    Of a target like a template its widths are the numbers of places.

    Returns
    -------
    (target, matched)
        The target and, for each network, how it maps to it, with its plans.

    Raises
    ------
    InputError
        There are other than two networks.
    StructureError
        A width is fixed in the module's code, the networks have other numbers of heads, or the
        template is too narrow or too wide.

    Warns
    -----
    WidthWarning
        Some channels share in any case, or a norm sees both networks' channels.
    """
    if len(names) != 2:
        raise InputError(
            f"target {config.target.name!r} gives channels of two networks places of their own; "
            f"got {len(names)} models: fuse two, let the others join one after another by "
            "merging.strategy='iterative', or take target='deeper'"
        )
    base = sources.profile.traced
    first = max(sources.reference, 0)
    order = (first, 1 - first)
    heads = [
        (one, {}) if i == sources.reference else with_heads_in_order(one, config.matching.cost)
        for i, one in enumerate(sources.sources)
    ]
    pair = [heads[i][0] for i in order]
    _check_heads(pair)
    bound = _bound_groups(base, pair)
    shared = _shared(base, pair, bound, config)
    target = base
    if isinstance(config.target, Wider):
        target = _widened(base, {i: one.size for i, one in shared.items()})
    placed = [_placed(target, one, side, shared, bound, config) for side, one in enumerate(pair)]
    if target is not base or not isinstance(config.target, Wider):
        moved = move_state(*placed[0])
        target = with_weights(target, overlaid(target.state(), moved))
    _warn(base, target, pair, bound)
    profile = replace(sources.profile, traced=target, grams=(), features=(), rows={}, moments=None)
    found = {}
    for i, source, (correspondence, plans) in zip(order, pair, placed, strict=True):
        own = source.profile
        moved_source = Source(replace(correspondence, target=target), own, profile, {})
        found[i] = Matched(moved_source, plans, None, heads[i][1])
    return target, (found[0], found[1])


def _check_heads(pair: Sequence[Source]) -> None:
    for one in pair:
        target, source = one.correspondence.target, one.correspondence.source
        if target.united_heads:
            to, of = target.united_heads[0], source.united_heads[0]
            raise StructureError(
                "places of their own need equally many attention heads; "
                f"{target.layers[to.layer].name!r} has {to.count} and "
                f"{source.layers[of.layer].name!r} {of.count}: use target='deeper'"
            )


def _bound_groups(base: TracedModel, pair: Sequence[Source]) -> Mapping[int, str]:
    """Return the groups whose channels share places whatever the width, and why they do."""
    found = {
        index: "they are heads, whose number is fixed"
        for one in base.heads
        for members in one.members
        for index in members
    }
    for group in base.groups:
        partners = [
            one.correspondence.source.groups[other]
            for one in pair
            if (other := one.correspondence.groups[group.index]) >= 0
        ]
        if any(one.is_counted for one in (group, *partners)):
            found.setdefault(group.index, "they are added up without weights")
        elif any(one.sharing > 1 for one in (group, *partners)):
            found.setdefault(group.index, "several heads of queries share them")
    return found


# --- which channels share a place ---------------------------------------------------------------


@dataclass(frozen=True)
class _Shared:
    """The places of a group that both networks have.

    Attributes
    ----------
    pairs
        ``(num_pairs, 2)``: channels of the first and of the second network that share one.
    sizes
        How many channels the networks have.
    size
        How many places there are.
    """

    pairs: Tensor
    sizes: tuple[int, int]
    size: int

    def plans(self) -> tuple[TransportPlan, TransportPlan]:
        """Return both networks' plans: the first's channels stay, the second's own come behind."""
        firsts, seconds = self.sizes
        into = torch.full((seconds,), -1)
        into[self.pairs[:, 1]] = self.pairs[:, 0]
        alone = into < 0
        into[alone] = torch.arange(firsts, firsts + int(alone.sum()))
        stays = torch.arange(firsts)
        return (
            TransportPlan.identity(firsts)
            if firsts == self.size
            else TransportPlan.from_columns(stays, self.size, 1 / firsts),
            TransportPlan.from_columns(into, self.size, 1 / seconds),
        )


def _shared(
    base: TracedModel, pair: Sequence[Source], bound: Mapping[int, str], config: FusionConfig
) -> dict[int, _Shared]:
    """Say which channels share a place, in all groups that both networks have."""
    costs: dict[int, Tensor] = {}
    for group in base.groups:
        has_both = all(one.correspondence.groups[group.index] >= 0 for one in pair)
        if has_both and group.index not in bound:
            costs[group.index] = _costs(pair, group.index, config.matching.cost)
    if isinstance(config.target, Wider):
        most = sum(min(one.shape) for one in costs.values())
        count = math.ceil((2.0 - config.target.factor) * most - 1e-9)
        pairs = cheapest_pairs(list(costs.values()), count)
    else:
        pairs = [
            cheapest_pairs([cost.clamp(min=0.0)], _pairs_in_template(base.groups[i], cost))[0]
            for i, cost in costs.items()
        ]
    found = {}
    for (i, cost), one in zip(costs.items(), pairs, strict=True):
        sizes = cost.size(0), cost.size(1)
        found[i] = _Shared(one, sizes, sum(sizes) - len(one))
    return found


def _pairs_in_template(group: ChannelGroup, cost: Tensor) -> int:
    """Return how many channels have to share a place of a template's group."""
    sizes = cost.shape
    if not max(sizes) <= group.size <= sum(sizes):
        raise StructureError(
            f"target.template has {group.size} channels in {group.name!r}, where the networks have "
            f"{sizes[0]} and {sizes[1]}: with own_places it needs {max(sizes)} to {sum(sizes)}"
        )
    return sum(sizes) - group.size


def _costs(pair: Sequence[Source], index: int, metric: str) -> Tensor:
    """Return the costs of two networks' channels; below 0 of copies, which always share."""
    x, y = (group_views(one.correspondence, one.profile, index) for one in pair)
    structures = group_structures(pair[1].correspondence, pair[1].profile, index)
    costs = view_costs(x, y, metric, structures)
    if costs is None:
        sizes = [
            one.correspondence.source.groups[one.correspondence.groups[index]].size for one in pair
        ]
        return torch.full(sizes, _UNSEEN, dtype=torch.float64)
    costs = costs.clamp(min=0.0)
    are_copies = torch.ones_like(costs, dtype=torch.bool)
    for key in x.keys() & y.keys():
        if len(x[key]) == len(y[key]):
            ones, others = x[key].double(), y[key].double()
            squares = ones.square().mean(0)[:, None], others.square().mean(0)
            apart = squares[0] + squares[1] - (2 / len(ones)) * (ones.T @ others)
            are_copies &= apart <= _EQUAL * torch.maximum(*squares)
    costs[are_copies] = -1.0
    return costs


# --- the target and the plans -------------------------------------------------------------------


def _widened(base: TracedModel, sizes: Mapping[int, int]) -> TracedModel:
    """Return the structure with as many channels as there are places."""
    changed = {i: size for i, size in sizes.items() if size != base.groups[i].size}
    if not changed:
        return base
    target = resized_model(base, changed, _WITH)
    found = [one.size for one in target.groups]
    for one in base.groups:
        if found[one.index : one.index + 1] != [sizes.get(one.index, one.size)]:
            raise StructureError(
                f"the channels of {one.name!r} cannot have other places: their number is fixed in "
                f"the module's code. Give target=Like(module), a module of the wanted widths{_WITH}"
            )
    return target


def _placed(
    target: TracedModel,
    source: Source,
    side: int,
    shared: Mapping[int, _Shared],
    bound: Mapping[int, str],
    config: FusionConfig,
) -> tuple[Correspondence, tuple[TransportPlan | None, ...]]:
    """Return how a network maps to the target, and its plans."""
    of = source.correspondence
    correspondence = correspond(target, of.source, of.layer_map, of.products)
    known = channel_plans(source, config) if bound else []
    plans: list[TransportPlan | None] = []
    for group, other in zip(target.groups, correspondence.groups, strict=True):
        if other < 0:
            plans.append(None)
        elif group.index in shared:
            plans.append(shared[group.index].plans()[side])
        elif group.index in bound:
            plans.append(known[group.index])
        elif correspondence.source.groups[other].size == group.size:
            plans.append(TransportPlan.identity(group.size))
        else:
            plans.append(resizing_plan(correspondence, group.index, source.profile))
    return correspondence, tuple(plans)


# --- what is lost -------------------------------------------------------------------------------


def _warn(
    base: TracedModel, target: TracedModel, pair: Sequence[Source], bound: Mapping[int, str]
) -> None:
    """Warn of channels that share in any case, and of norms that see both networks' channels."""
    wider = [one.index for one in target.groups if one.size > _widest(pair, one.index)]
    if not wider and target is not base:
        return
    shares = [i for i in bound if all(one.correspondence.groups[i] >= 0 for one in pair)]
    if shares:
        more = f" and {len(shares) - 1} more groups" if len(shares) > 1 else ""
        warn(
            f"the channels of {base.groups[shares[0]].name!r}{more} share their places whatever "
            f"the width, for {bound[shares[0]]}: at no width does the result hold both networks "
            "as they are",
            WidthWarning,
        )
    norms = _norms_over(target, wider)
    if norms:
        more = f" and {len(norms) - 1} more norms" if len(norms) > 1 else ""
        warn(
            f"the norm of {norms[0]!r}{more} spans channels of both networks: what it subtracts "
            "and divides by is of both together, so that at no width does the result hold both "
            "networks as they are. Least squares makes up for a part of it",
            WidthWarning,
        )


def _norms_over(model: TracedModel, wider: Sequence[int]) -> list[str]:
    """Return the norms that span channels of some groups, by a parameter or their module."""
    found = []
    for node in model.module.graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name in _NORMS:
            own = list(model.operand_names(node).values())
            groups = {one.index for it in own for one, _ in model.axes_by_parameter.get(it, ())}
            if not own or not groups.isdisjoint(wider):
                found.append(own[0] if own else module_path(node))
        elif name == "rsqrt" and wider:  # of a norm that is spelled out
            found.append(module_path(node))
    return found


def _widest(pair: Sequence[Source], index: int) -> int:
    sizes = [
        one.correspondence.source.groups[other].size
        for one in pair
        if (other := one.correspondence.groups[index]) >= 0
    ]
    return max(sizes, default=0)
