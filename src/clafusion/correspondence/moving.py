r"""Move parameters and values from the source's channels into the target's, by transport plans.

A plan ``T (num_source, num_target)`` has two normalisations. Going out of a group (rows of a
weight, biases, norms) every target channel is an average of source channels,
``T_out = T / column sums``. Going into a group (columns of the next weight) the source's channel is
an average of target channels, ``x_source ~ T_in x_target`` with ``T_in = T / row sums``, so that
the weights of duplicated channels add up. For equal widths both agree. With a single normalisation,
a width ratio r would scale every layer by 1 / r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.structure import structured_state
from clafusion.errors import StructureError
from clafusion.tracing.layer import CalibrationPoint, HookPoint
from clafusion.tracing.model import ChannelGroup, GroupAxis

__all__ = [
    "incoming_map",
    "move_along",
    "move_parameter",
    "move_state",
    "move_values",
    "outgoing_map",
]


def outgoing_map(plan: Tensor) -> Tensor:
    """Return ``T / column sums``: each target channel as an average of source channels."""
    sums = plan.sum(0, keepdim=True)
    return plan / torch.where(sums > 0, sums, 1.0)


def incoming_map(plan: Tensor) -> Tensor:
    """Return ``T / row sums``: each source channel as an average of target channels."""
    sums = plan.sum(1, keepdim=True)
    return plan / torch.where(sums > 0, sums, 1.0)


def move_state(
    correspondence: Correspondence,
    plans: Sequence[Tensor | None],
    normalisation: str = "two",
) -> dict[str, Tensor]:
    r"""Return the source's parameters in the target's structure, channels and widths.

    For a layer from group ``i`` to group ``o``

    .. math:: \tilde W = T_{out}[o]^\top W\, T_{in}[i].

    With ``normalisation="single"`` it is ``T_out[i]`` instead of ``T_in[i]``, as in OTFusion
    (arXiv 1910.05653, algorithm 1).

    What the source lacks (origin ``"target_only"``) is left out, and so is what is no real number.

    Raises
    ------
    StructureError
        Matched parameters differ in an axis that is no channel axis.
    """
    source = structured_state(correspondence)
    return {
        name: move_parameter(correspondence, plans, name, source[name], tensor, normalisation)
        for name, tensor in correspondence.target.state().items()
        if correspondence.origins[name] != "target_only" and tensor.is_floating_point()
    }


def move_parameter(
    correspondence: Correspondence,
    plans: Sequence[Tensor | None],
    name: str,
    source: Tensor,
    target: Tensor,
    normalisation: str = "two",
) -> Tensor:
    """Bring one parameter from the source's channels into the target's."""
    model = correspondence.target
    axes = model.axes_of(name)
    if not axes:
        if source.shape != target.shape:
            raise StructureError(
                f"parameter {name!r} has shape {tuple(target.shape)}, its partner "
                f"{tuple(source.shape)}, and none of its axes carries channels that can differ"
            )
        return source.clone()
    if correspondence.origins[name] == "zero_residual":
        return torch.zeros_like(target)
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


def move_along(
    plans: Sequence[Tensor | None],
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
    moved = tensor.movedim(axis, 0).double()
    rest = moved.shape[1:]
    result = moved.new_zeros(length, *rest)
    used_target: list[Tensor] = []
    used_source: list[Tensor] = []
    for i, (group, group_axis) in enumerate(pairs):
        plan = plans[group.index]
        assert plan is not None, "a matched parameter carries a group without a partner"
        repeats = group_axis.positions.size(1)
        if source_axes is None:
            positions = torch.arange(plan.size(0) * repeats).view(-1, repeats)
        else:
            positions = source_axes[i][1].positions
        if positions.size(1) != repeats:
            raise StructureError(
                f"in axis {axis} of {name!r} a channel stands for {repeats} positions, in its "
                f"partner for {positions.size(1)}; the inputs or strides differ"
            )
        leaves = group_axis.direction == "out" or normalisation == "single"
        weights = outgoing_map(plan) if leaves else incoming_map(plan)
        block = moved[positions.reshape(-1)].reshape(plan.size(0), -1)
        chosen = _copied_rows(weights)
        mixed = weights.T.to(block) @ block if chosen is None else block[chosen.to(block.device)]
        result[group_axis.positions.reshape(-1)] = mixed.reshape(-1, *rest)
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


def move_values(
    values: Tensor,
    correspondence: Correspondence,
    plans: Sequence[Tensor | None],
    target: CalibrationPoint | HookPoint,
    source: CalibrationPoint | HookPoint,
) -> Tensor:
    """Bring values ``(..., num_source_channels)`` of one point into the target's channels.

    Parameters
    ----------
    values
        One number for each channel of ``source``, in the last axis.
    plans
        For each group of the target ``(num_source, num_target)``.
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
        weights = outgoing_map(plan).to(values)
        chosen = _copied_rows(weights)
        into = torch.nonzero(target.groups == one).squeeze(1)
        out_of = torch.nonzero(source.groups == correspondence.groups[one]).squeeze(1)
        # A member may stand in several places, as in a projection to queries and keys at once.
        into_turns = _earlier_equals(target.members[into])
        out_of_turns = _earlier_equals(source.members[out_of])
        for turn in into_turns.unique().tolist():
            to, of = into[into_turns == turn], out_of[out_of_turns == turn]
            if chosen is not None:
                places = torch.full((plan.size(0),), -1)
                places[source.members[of]] = of
                wanted = places[chosen[target.members[to]]]
                if bool((wanted >= 0).all()):
                    result[..., to] = values[..., wanted]
                    continue
            by_member = values.new_zeros(*values.shape[:-1], plan.size(0))
            by_member[..., source.members[of]] = values[..., of]
            result[..., to] = (by_member @ weights)[..., target.members[to]]
    return result


def _copied_rows(weights: Tensor) -> Tensor | None:
    """Return for each column the row that it copies; None where a column mixes rows."""
    if not bool(((weights != 0).sum(0) == 1).all()):
        return None
    rows = weights.argmax(0)
    copies = bool((weights.gather(0, rows[None]) == 1).all())
    return rows.cpu() if copies else None


def _earlier_equals(members: Tensor) -> Tensor:
    """Return for each entry how many equal ones come before it."""
    order = members.argsort(stable=True)
    ordered = members[order]
    earlier = torch.empty_like(members)
    earlier[order] = torch.arange(len(members)) - torch.searchsorted(ordered, ordered)
    return earlier
