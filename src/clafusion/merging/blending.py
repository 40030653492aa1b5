r"""Plans + weights -> the fused parameters.

A plan ``T (num_source, num_target)`` moves the source's channels into the target's frame, with two
normalisations. Going out of a group (rows of a weight, biases, norms) every target channel is an
average of source channels, ``T_out = T / column sums``. Going into a group (columns of the next
weight) the source's channel is an average of target channels, ``x_A ~ T_in x_B`` with
``T_in = T / row sums``, so that the weights of duplicated channels add up. For equal widths both
agree. With a single normalisation, a width ratio r would scale every layer by 1 / r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import (
    Correspondence,
    axes_of,
    lifted_state,
    onto_itself,
)
from clafusion.errors import StructureError
from clafusion.merging.layer_weights import MergeWeights
from clafusion.tracing.model import ChannelGroup, GroupAxis, TracedModel

__all__ = [
    "Normalisation",
    "aligned_state",
    "blend",
    "channel_shares",
    "incoming_map",
    "outgoing_map",
    "transport_vector",
    "transported",
]


Normalisation = Literal["two", "single"]


def outgoing_map(plan: Tensor) -> Tensor:
    """Return ``T / column sums``: each target channel as an average of source channels."""
    sums = plan.sum(0, keepdim=True)
    return plan / torch.where(sums > 0, sums, 1.0)


def incoming_map(plan: Tensor) -> Tensor:
    """Return ``T / row sums``: each source channel as an average of target channels."""
    sums = plan.sum(1, keepdim=True)
    return plan / torch.where(sums > 0, sums, 1.0)


def aligned_state(
    lifting: Correspondence,
    plans: Sequence[Tensor | None],
    normalisation: Normalisation = "two",
) -> dict[str, Tensor]:
    r"""Return the lifted shallow network's parameters in the deep network's frame and widths.

    For a layer from class ``i`` to class ``o``

    .. math:: \tilde W_A = T_{out}[o]^\top W_A\, T_{in}[i].

    With ``normalisation="single"`` it is ``T_out[i]`` instead of ``T_in[i]``, as in OTFusion
    (arXiv 1910.05653, algorithm 1).

    Parameters inside an inserted block (origin ``"copied"``) are left out: there is nothing to
    align.

    Raises
    ------
    StructureError
        Matched parameters differ in an axis that is no channel axis.
    """
    source = lifted_state(lifting)
    target = lifting.deep.state()
    return {
        name: transported(lifting, plans, name, source[name], tensor, normalisation)
        for name, tensor in target.items()
        if lifting.origins[name] != "copied" and tensor.is_floating_point()
    }


def blend(
    lifting: Correspondence,
    plans: Sequence[Tensor | None],
    deep_shares: MergeWeights,
    *,
    normalisation: Normalisation = "two",
    classifier: Tensor | None = None,
    target_plans: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Return the fused state: ``(1 - w) * aligned shallow + w * deep``.

    ``w`` is the deep network's share of the layer. Inside an inserted block the deep network's
    weights stay as they are and only the block's last write is scaled by ``w``: that fuses the
    functions, where averaging every weight with zero would shrink the block once a layer. Of a layer
    that only stands in, the aligned weights are taken. ``classifier`` is a plan for the outputs of
    the last layer, which are otherwise never moved.

    With ``target_plans``, for each class ``(num_target, num_target)``, the deep network moves as
    well, and what leaves a channel is averaged by :func:`channel_shares`: a channel into which only
    one network's channels move is that network's alone, and layers have no shares of their own.
    """
    aligned = aligned_state(lifting, plans, normalisation)
    if classifier is not None:
        point = lifting.deep.layers[-1].calibration_points[-1]
        for name in (point.weight, point.bias):
            if name is not None:
                rows = outgoing_map(classifier).T
                values = aligned[name].to(rows)
                aligned[name] = torch.tensordot(rows, values, dims=1).to(aligned[name])
    own = lifting.deep.state()
    shares: list[Tensor] = []
    if target_plans is not None:
        own |= aligned_state(onto_itself(lifting.deep), target_plans)
        shares = channel_shares(plans, target_plans, deep_shares.overall)
    fused: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if lifting.origins[name] == "taken" and name in aligned:
            fused[name] = aligned[name]
        elif name in aligned:
            both = aligned[name].double(), tensor.double()
            if target_plans is None:
                mixed = torch.lerp(*both, deep_shares.of(name))
            else:
                by_rows = _by_rows(lifting.deep, name, tensor, shares, deep_shares.overall)
                mixed = torch.lerp(*both, by_rows)
            fused[name] = mixed.to(tensor.dtype)
        else:
            fused[name] = tensor.clone()
    return fused


def channel_shares(
    plans: Sequence[Tensor | None],
    target_plans: Sequence[Tensor | None],
    deep_weight: float,
) -> list[Tensor]:
    """Return for each group of the deep network its share ``(num_target,)`` of each channel.

    That is ``deep_weight`` where channels of both networks move, 1 where only the deep one's do,
    and 0 where only the shallow one's.
    """
    found = []
    for plan, target_plan in zip(plans, target_plans, strict=True):
        assert target_plan is not None, "the deep network has all of its groups"
        shares = torch.full((target_plan.size(1),), deep_weight, dtype=torch.float64)
        shares[target_plan.sum(0) == 0] = 0.0
        if plan is None:
            shares[:] = 1.0
        else:
            shares[plan.sum(0) == 0] = 1.0
        found.append(shares)
    return found


def _by_rows(
    graph: TracedModel, name: str, tensor: Tensor, shares: Sequence[Tensor], deep_weight: float
) -> Tensor:
    """Return a parameter's weights: the share of the channel that each of its entries makes."""
    weight = torch.full(tensor.shape, deep_weight, dtype=torch.float64)
    for group, group_axis in graph.axes_by_parameter.get(name, ()):
        if group_axis.direction == "out":
            rows = group_axis.use.view(weight).movedim(group_axis.axis, 0)
            by_position = shares[group.index].repeat_interleave(group_axis.positions.size(1))
            rows[group_axis.positions.reshape(-1)] = by_position.view(-1, *[1] * (rows.dim() - 1))
    return weight.to(tensor.device)


def transport_vector(
    vector: Tensor,
    plans: Sequence[Tensor | None],
    target: tuple[Tensor, Tensor],
    source: tuple[Tensor, Tensor],
    groups: Sequence[int],
) -> Tensor:
    """Bring one number a channel from the source's frame into the target's.

    Parameters
    ----------
    vector
        ``(..., num_source_channels)``.
    plans
        For each group of the target network ``(num_source, num_target)``.
    target, source
        The group and the member of each channel, in the two networks.
    groups
        For each group of the target network that of the source network.
    """
    target_groups, target_members = target
    source_groups, source_members = source
    result = vector.new_zeros(*vector.shape[:-1], len(target_groups))
    fixed_target = torch.nonzero(target_groups < 0).squeeze(1)
    fixed_source = torch.nonzero(source_groups < 0).squeeze(1)
    result[..., fixed_target] = vector[..., fixed_source]
    for one in target_groups[target_groups >= 0].unique().tolist():
        plan = plans[one]
        assert plan is not None
        weights = outgoing_map(plan).to(vector)
        into = torch.nonzero(target_groups == one).squeeze(1)
        out_of = torch.nonzero(source_groups == groups[one]).squeeze(1)
        # A member may stand in several places, as in a projection to queries and keys at once.
        into_turns = _earlier_equals(target_members[into])
        out_of_turns = _earlier_equals(source_members[out_of])
        for turn in into_turns.unique().tolist():
            to, of = into[into_turns == turn], out_of[out_of_turns == turn]
            by_member = vector.new_zeros(*vector.shape[:-1], plan.size(0))
            by_member[..., source_members[of]] = vector[..., of]
            result[..., to] = (by_member @ weights)[..., target_members[to]]
    return result


def _earlier_equals(members: Tensor) -> Tensor:
    """Return for each entry how many equal ones come before it."""
    order = members.argsort(stable=True)
    ordered = members[order]
    earlier = torch.empty_like(members)
    earlier[order] = torch.arange(len(members)) - torch.searchsorted(ordered, ordered)
    return earlier


def transported(
    lifting: Correspondence,
    plans: Sequence[Tensor | None],
    name: str,
    source: Tensor,
    target: Tensor,
    normalisation: Normalisation = "two",
) -> Tensor:
    """Bring one parameter into the deep network's frame."""
    deep = lifting.deep
    uses = deep.uses_by_parameter.get(name, ())
    axes = axes_of(deep, name)
    if not axes:
        if source.shape != target.shape:
            raise StructureError(
                f"parameter {name!r} has shape {tuple(target.shape)}, its partner "
                f"{tuple(source.shape)}, and none of its axes carries channels that can differ"
            )
        return source.clone()
    if lifting.origins[name] == "silent":
        return torch.zeros_like(target)
    result = target.clone()
    for i, use in enumerate(uses):
        carried = {axis: axes[place, axis] for place, axis in axes if place == i}
        if name in lifting.names:
            other_name = lifting.names[name]
            other_use = lifting.shallow.uses_by_parameter[other_name][i]
            other_axes = axes_of(lifting.shallow, other_name)
            moved = other_use.view(source)
            group_axes: Mapping[int, list[tuple[ChannelGroup, GroupAxis]]] = {
                axis: other_axes[i, axis] for axis in carried
            }
        else:  # an inserted identity layer: channels in the shallow network's own order
            moved = source
            group_axes = {}
        for axis, pairs in carried.items():
            moved = along(
                plans, moved, axis, use.size[axis], pairs, group_axes.get(axis), name, normalisation
            )
        view = use.view(result)
        if moved.shape != view.shape:
            raise StructureError(
                f"parameter {name!r} has shape {tuple(view.shape)}, its partner "
                f"{tuple(moved.shape)} after alignment; the networks differ in more than widths"
            )
        view.copy_(moved)
    return result


def along(
    plans: Sequence[Tensor | None],
    tensor: Tensor,
    axis: int,
    length: int,
    pairs: Sequence[tuple[ChannelGroup, GroupAxis]],
    source_slots: Sequence[tuple[ChannelGroup, GroupAxis]] | None,
    name: str,
    normalisation: Normalisation = "two",
) -> Tensor:
    """Apply the plans of the groups on one axis, and keep its fixed positions."""
    moved = tensor.movedim(axis, 0).double()
    rest = moved.shape[1:]
    result = moved.new_zeros(length, *rest)
    used_target: list[Tensor] = []
    used_source: list[Tensor] = []
    for i, (group, group_axis) in enumerate(pairs):
        plan = plans[group.index]
        assert plan is not None, "a matched parameter carries a group without a partner"
        if source_slots is None:
            positions = torch.arange(plan.size(0))[:, None]
        else:
            positions = source_slots[i][1].positions
        repeats = group_axis.positions.size(1)
        if positions.size(1) != repeats:
            raise StructureError(
                f"in axis {axis} of {name!r} a channel stands for {repeats} positions, in its "
                f"partner for {positions.size(1)}; the inputs or strides differ"
            )
        leaves = group_axis.direction == "out" or normalisation == "single"
        weights = outgoing_map(plan) if leaves else incoming_map(plan)
        block = moved[positions.reshape(-1)].reshape(plan.size(0), -1)
        result[group_axis.positions.reshape(-1)] = (weights.T.to(block) @ block).reshape(-1, *rest)
        used_target.append(group_axis.positions.reshape(-1))
        used_source.append(positions.reshape(-1))
    fixed_target = _others(used_target, length)
    fixed_source = _others(used_source, moved.size(0))
    if len(fixed_target) != len(fixed_source):
        raise StructureError(
            f"axis {axis} of {name!r} has {len(fixed_target)} fixed positions, its partner "
            f"{len(fixed_source)}; inputs, outputs or vocabularies differ"
        )
    result[fixed_target] = moved[fixed_source]
    return result.movedim(0, axis).to(tensor.dtype)


def _others(used: Sequence[Tensor], length: int) -> Tensor:
    free = torch.ones(length, dtype=torch.bool)
    for positions in used:
        free[positions] = False
    return torch.nonzero(free).squeeze(1)
