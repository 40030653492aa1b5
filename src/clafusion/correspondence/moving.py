r"""Move parameters and values from the source's channels into the target's, by transport plans.

A plan has two normalisations, for what leaves a group and for what reads it: see
:mod:`clafusion.transport.plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.shared_heads import has_keys, plan_of_places, share_otherwise
from clafusion.correspondence.structure import structured_state
from clafusion.errors import StructureError
from clafusion.execution.lazy import LazyState
from clafusion.tracing.layer import CalibrationPoint, HookPoint
from clafusion.tracing.model import ChannelGroup, GroupAxis
from clafusion.transport.plan import TransportPlan

__all__ = [
    "move_along",
    "move_parameter",
    "move_state",
    "move_values",
]


def move_state(
    correspondence: Correspondence,
    plans: Sequence[TransportPlan | None],
    normalisation: str = "two",
) -> LazyState[str]:
    r"""Return the source's parameters in the target's structure, channels and widths.

    For a layer from group ``i`` to group ``o``

    .. math:: \tilde W = T_{out}[o]^\top W\, T_{in}[i].

    With ``normalisation="single"`` it is ``T_out[i]`` instead of ``T_in[i]``, as in OTFusion
    (arXiv 1910.05653, algorithm 1).

    What the source lacks (origin ``"target_only"``) is left out, and so is what is no real number.

    Raises
    ------
    StructureError
        When an entry is read: matched parameters differ in an axis that is no channel axis.
    """
    source, target = structured_state(correspondence), correspondence.target.state()
    names = [
        name
        for name, tensor in target.items()
        if correspondence.origins[name] != "target_only" and tensor.is_floating_point()
    ]

    def make(name: str) -> Tensor:
        return move_parameter(
            correspondence, plans, name, source[name], target[name], normalisation
        )

    return LazyState(names, make)


def move_parameter(
    correspondence: Correspondence,
    plans: Sequence[TransportPlan | None],
    name: str,
    source: Tensor,
    target: Tensor,
    normalisation: str = "two",
) -> Tensor:
    """Bring one parameter from the source's channels into the target's."""
    model = correspondence.target
    axes = model.axes_of(name)
    if not axes:
        if source.shape == target.shape:
            return source.clone()
        if _differ_in_repeats_only(source, target):
            return target.clone()
        raise StructureError(
            f"parameter {name!r} has shape {tuple(target.shape)}, its partner "
            f"{tuple(source.shape)}, and none of its axes carries channels that can differ"
        )
    if correspondence.origins[name] == "zero_residual":
        return torch.full_like(target, model.fillings.get(name, 0.0))
    # What no use of the parameter shows stays the source's.
    result = (source if source.shape == target.shape else target).clone()
    for i, use in enumerate(model.uses_by_parameter.get(name, ())):
        carried = {axis: axes[place, axis] for place, axis in axes if place == i}
        moved, source_axes = source, dict[int, list[tuple[ChannelGroup, GroupAxis]]]()
        if name in correspondence.products:
            # What it puts out are channels of a layer; what it reads is in the groups' own order.
            other = correspondence.source.axes_of(correspondence.names[name])
            source_axes = {
                axis: other[i, axis]
                for axis, pairs in carried.items()
                if all(one.direction == "out" for _, one in pairs)
            }
        elif name in correspondence.names:  # else an inserted identity: the groups' own order
            other_name = correspondence.names[name]
            moved = correspondence.source.uses_by_parameter[other_name][i].view(source)
            other = correspondence.source.axes_of(other_name)
            source_axes = {axis: other[i, axis] for axis in carried}
        for axis, pairs in carried.items():
            known = source_axes.get(axis)
            moved = move_along(
                plans, moved, axis, use.size[axis], pairs, known, name, normalisation
            )
        view = use.view(result)
        if moved.shape != view.shape:
            raise StructureError(
                f"parameter {name!r} has shape {tuple(view.shape)}, its partner "
                f"{tuple(moved.shape)} after alignment; the networks differ in more than widths"
            )
        view.copy_(moved)
    return result


def _differ_in_repeats_only(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal but for how often a value repeats along an axis.

    So are constants that are the same for all channels, such as a bias of zeros in a buffer.
    """
    if one.dim() != other.dim():
        return False
    for axis in range(one.dim()):
        if one.size(axis) == other.size(axis):
            continue
        kept = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
        if not all(torch.equal(a, b.expand_as(a)) for a, b in zip((one, other), kept, strict=True)):
            return False
        one, other = kept
    return torch.equal(one, other)


def move_along(
    plans: Sequence[TransportPlan | None],
    tensor: Tensor,
    axis: int,
    length: int,
    pairs: Sequence[tuple[ChannelGroup, GroupAxis]],
    source_axes: Sequence[tuple[ChannelGroup, GroupAxis]] | None,
    name: str,
    normalisation: str = "two",
) -> Tensor:
    """Apply the plans of the groups on one axis, and keep its fixed positions.

    Without ``source_axes`` the source's channels stand in the order of their group.
    """
    moves: list[_Move] = []
    for i, (group, group_axis) in enumerate(pairs):
        plan = plans[group.index]
        assert plan is not None, "a matched parameter carries a group without a partner"
        into = group_axis.positions
        repeats = into.size(1)
        if source_axes is None:
            positions = torch.arange(plan.shape[0] * repeats).view(-1, repeats)
        else:
            positions = source_axes[i][1].positions
        if source_axes is not None and positions.size(1) != repeats:
            other = source_axes[i][0]
            if not share_otherwise(group, other, repeats, positions.size(1)):
                raise StructureError(
                    f"in axis {axis} of {name!r} a channel stands for {repeats} positions, in its "
                    f"partner for {positions.size(1)}; the inputs or strides differ"
                )
            keys = has_keys(group, other, repeats, positions.size(1))
            plan = plan_of_places(plan, group, other, keys=keys)
            into = into.reshape(plan.shape[1], -1)
            positions = positions.reshape(plan.shape[0], -1)
        leaves = group_axis.direction == "out" or normalisation == "single"
        moves.append(_Move(plan, leaves, into, positions))
    fixed_target = _others([one.into for one in moves], length)
    fixed_source = _others([one.positions for one in moves], tensor.size(axis))
    if len(fixed_target) != len(fixed_source):
        raise StructureError(
            f"axis {axis} of {name!r} has {len(fixed_target)} fixed positions, its partner "
            f"{len(fixed_source)}; inputs, outputs or vocabularies differ"
        )
    index = torch.zeros(length, dtype=torch.int64)
    index[fixed_target] = fixed_source
    mixed = []
    for one in moves:
        chosen = one.plan.copied_rows(leaves=one.leaves)
        if chosen is None:
            mixed.append(one)
        else:
            index[one.into.reshape(-1)] = one.positions[chosen].reshape(-1)
    if not mixed and torch.equal(index, torch.arange(tensor.size(axis))):
        return tensor
    result = tensor.index_select(axis, index.to(tensor.device))
    for one in mixed:
        plan = one.plan
        block = tensor.movedim(axis, 0)[one.positions.reshape(-1).to(tensor.device)]
        moved = (plan.outgoing if one.leaves else plan.incoming)(block.reshape(plan.shape[0], -1))
        into = one.into.reshape(-1).to(tensor.device)
        result.movedim(axis, 0)[into] = moved.reshape(-1, *block.shape[1:])
    return result


class _Move(NamedTuple):
    """A plan for an axis, which of its normalisations counts, and where the channels stand."""

    plan: TransportPlan
    leaves: bool
    into: Tensor
    positions: Tensor


def _others(used: Sequence[Tensor], length: int) -> Tensor:
    """Return the positions on an axis that none of some tables of positions names."""
    free = torch.ones(length, dtype=torch.bool)
    for positions in used:
        free[positions.reshape(-1)] = False
    return torch.nonzero(free).squeeze(1)


def move_values(
    values: Tensor,
    correspondence: Correspondence,
    plans: Sequence[TransportPlan | None],
    target: CalibrationPoint | HookPoint,
    source: CalibrationPoint | HookPoint,
) -> Tensor:
    """Bring values ``(..., num_source_channels)`` of one point into the target's channels.

    Parameters
    ----------
    values
        One number for each channel of ``source``, in the last axis.
    plans
        For each group of the target.
    target, source
        Points of the two networks that correspond: which group and member each channel is.
    """
    result = values.new_zeros(*values.shape[:-1], len(target.groups))
    fixed_target = torch.nonzero(target.groups < 0).squeeze(1)
    fixed_source = torch.nonzero(source.groups < 0).squeeze(1)
    result[..., fixed_target] = values[..., fixed_source]
    for one in target.groups[target.groups >= 0].unique().tolist():
        plan = plans[one]
        assert plan is not None, "a matched point shows a group without a partner"
        chosen = plan.copied_rows(leaves=True)
        into = torch.nonzero(target.groups == one).squeeze(1)
        index = correspondence.groups[one]
        out_of = torch.nonzero(source.groups == index).squeeze(1)
        # A member may stand in several places, as in a projection to queries and keys at once.
        into_turns = _earlier_equals(target.members[into])
        out_of_turns = _earlier_equals(source.members[out_of])
        groups = correspondence.target.groups[one], correspondence.source.groups[index]
        turns, turns_of_source = (
            int(of.max()) + 1 if of.numel() else 0 for of in (into_turns, out_of_turns)
        )
        if share_otherwise(*groups, turns, turns_of_source):
            by_place = values.new_zeros(*values.shape[:-1], plan.shape[0], turns_of_source)
            by_place[..., source.members[out_of], out_of_turns] = values[..., out_of]
            keys = has_keys(*groups, turns, turns_of_source)
            of_places = plan_of_places(plan, *groups, keys=keys)
            by_place = by_place.reshape(*values.shape[:-1], of_places.shape[0], -1)
            moved = of_places.outgoing(by_place, -2)
            moved = moved.reshape(*values.shape[:-1], plan.shape[1], turns)
            result[..., into] = moved[..., target.members[into], into_turns]
            continue
        for turn in into_turns.unique().tolist():
            to, of = into[into_turns == turn], out_of[out_of_turns == turn]
            if chosen is not None:
                places = torch.full((plan.shape[0],), -1)
                places[source.members[of]] = of
                wanted = places[chosen[target.members[to]]]
                if bool((wanted >= 0).all()):
                    result[..., to] = values[..., wanted]
                    continue
            by_member = values.new_zeros(*values.shape[:-1], plan.shape[0])
            by_member[..., source.members[of]] = values[..., of]
            result[..., to] = plan.outgoing(by_member, -1)[..., target.members[to]]
    return result


def _earlier_equals(members: Tensor) -> Tensor:
    """Return for each entry how many equal ones come before it."""
    order = members.argsort(stable=True)
    ordered = members[order]
    earlier = torch.empty_like(members)
    earlier[order] = torch.arange(len(members)) - torch.searchsorted(ordered, ordered)
    return earlier
