"""Hidden channels that can be chosen freely: one layer writes them and one layer reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from clafusion.calibration.least_squares.places import Place, View
from clafusion.correspondence.correspondence import Correspondence
from clafusion.execution.call import State
from clafusion.merging.problem import FusionProblem
from clafusion.tracing.model import GroupAxis, TracedModel
from clafusion.tracing.operations import bound_operands, op_name

__all__ = ["MOST_FEATURES", "Hidden", "Kept", "Part", "hidden_channels", "reads_partner"]

MOST_FEATURES = 4096
"""Of all parents side by side: beyond, choosing channels takes minutes."""


@dataclass(frozen=True)
class Part:
    """What one parent has of hidden channels.

    Attributes
    ----------
    parent
        Position of the parent.
    group
        The channels' group in the target as the parent's correspondence sees it.
    reader
        The parent's layer that reads them.
    columns
        ``(num_channels, num_columns)``: where each channel stands among the layer's inputs.
    channel_of
        For each member of the group the writing layer's channel.
    carried
        As those of :class:`Hidden`, in the parent.
    """

    parent: int
    group: int
    reader: fx.Node
    columns: Tensor
    channel_of: Tensor
    carried: tuple[GroupAxis, ...]


@dataclass(frozen=True)
class Kept:
    """Channels of one parent that are kept: which members of the target's group they become."""

    own: Tensor
    taken: Tensor


@dataclass(frozen=True)
class Hidden:
    """Channels that one layer writes and one layer reads, in all parents that have them.

    ``reader`` is the target's layer that reads them; ``columns`` and ``channel_of`` are the
    target's, as those of :class:`Part`. ``carried`` are parameters between the two, of which each
    channel takes its row along: of a BatchNorm behind the activation, of a kernel for each channel.
    """

    reader: Place
    columns: Tensor
    channel_of: Tensor
    parts: tuple[Part, ...]
    carried: tuple[GroupAxis, ...]


def hidden_channels(
    problem: FusionProblem, places: Sequence[Place], states: Sequence[State], of_target: State
) -> dict[str, Hidden]:
    """Find the hidden channels that can be chosen freely: writing layer's node -> channels.

    ``states`` are the parents' own weights, ``of_target`` the target's.
    """
    by_kernel = {place.kernel: place for place in places}
    found = {}
    for place in places:
        hidden = _hidden(problem, place, by_kernel, states, of_target)
        if hidden is not None:
            found[place.affine.name] = hidden
    return found


def _hidden(
    problem: FusionProblem,
    place: Place,
    by_kernel: Mapping[str, Place],
    states: Sequence[State],
    of_target: State,
) -> Hidden | None:
    """Return the hidden channels that a layer writes; None where they are not free."""
    target = problem.target
    index = int(place.point.groups[0])
    if index < 0 or place.shortcut is not None:
        return None
    group = target.groups[index]
    readers = [axis for axis in group.axes if axis.direction == "in"]
    carried = tuple(
        axis
        for axis in group.axes
        if axis.direction == "out" and axis.use.parameter not in place.parameters
    )
    if not (
        len(readers) == 1
        and all(_is_carried(target, axis, of_target) for axis in carried)
        and len(place.point.groups) == group.size
        and bool((place.point.groups == index).all())
    ):
        return None
    reader = by_kernel.get(readers[0].use.parameter)
    if reader is None or reader is place:
        return None
    if reader.incoming == place.point.node:  # changed in place, under the same name
        return None
    columns = _columns(readers[0], reader)
    if columns.numel() != reader.num_features(of_target[reader.kernel]):
        return None  # other channels are read along with them
    parts = []
    for i, (parent, view) in enumerate(zip(problem.parents, place.views, strict=True)):
        if view is None and reader.kernel not in parent.correspondence.names:
            continue  # this parent lacks both layers
        part = _part(i, parent.correspondence, view, place, reader, carried, states[i])
        if part is None:
            return None
        parts.append(part)
    features = sum(part.columns.numel() for part in parts)
    if len(parts) < 2 or features > MOST_FEATURES:
        return None
    return Hidden(reader, columns, place.point.members.argsort(), tuple(parts), carried)


def _is_carried(model: TracedModel, axis: GroupAxis, state: State) -> bool:
    """Say whether a parameter has one row for each channel, and mixes none with another."""
    use = axis.use
    shape = tuple(state[use.parameter].shape)
    if use.parameter in model.shared_parameters or axis.axis != 0 or use.size != shape:
        return False
    if axis.positions.numel() != shape[0]:
        return False
    readers = [user for node in model.nodes_of(use.parameter) for user in node.users]
    return all(
        op_name(node) == "batch_norm"
        or (op_name(node).startswith("conv") and bound_operands(node)["groups"] == shape[0])
        for node in readers
    )


def _part(
    index: int,
    correspondence: Correspondence,
    view: View | None,
    place: Place,
    reader: Place,
    carried: Sequence[GroupAxis],
    state: State,
) -> Part | None:
    """Return what a parent has of hidden channels, None where it has them otherwise."""
    if view is None or view.point.affine is None or reader.kernel not in correspondence.names:
        return None
    group = int(correspondence.target_points[place.point.node].groups[0])
    if any(group in one.groups for one in correspondence.target.united_heads):
        return None  # heads stay whole
    kernel = correspondence.names[reader.kernel]
    reading = correspondence.points[reader.point.node].affine
    own = correspondence.source.groups[correspondence.groups[group]].axes
    axes = [one for one in own if one.direction == "in" and one.use.parameter == kernel]
    if reading is None or len(axes) != 1:
        return None
    wanted = [correspondence.names.get(one.use.parameter) for one in carried]
    by_name = {one.use.parameter: one for one in own if one.direction == "out"}
    if not all(
        name in by_name and _is_carried(correspondence.source, by_name[name], state)
        for name in wanted
    ):
        return None
    columns = _columns(axes[0], reader)
    if columns.numel() != reader.num_features(state[kernel]):
        return None
    models = (correspondence.target, group), (correspondence.source, correspondence.groups[group])
    if len({model.groups[index].sharing for model, index in models}) > 1:
        return None  # other numbers of heads read each channel
    affine = next(node for node in correspondence.source.module.graph.nodes if node.name == reading)
    return Part(
        index,
        group,
        affine,
        columns,
        view.point.members.argsort(),
        tuple(by_name[name] for name in wanted if name is not None),
    )


def _columns(axis: GroupAxis, reader: Place) -> Tensor:
    """Return ``(num_channels, num_columns)``: each channel's features of a reading layer."""
    kernel = math.prod(reader.kernel_size)
    features = axis.positions[:, :, None] * kernel + torch.arange(kernel)
    return features.flatten(1)


def reads_partner(correspondence: Correspondence, parameter: str) -> bool:
    """Say whether what a matched layer reads is matched, too.

    It is not where layers were left out before it.
    """
    other_axes = correspondence.source.axes_of(correspondence.names[parameter])
    return all(
        correspondence.groups[one.index] == other.index
        for key, pairs in correspondence.target.axes_of(parameter).items()
        for (one, axis), (other, _) in zip(pairs, other_axes[key], strict=True)
        if axis.direction == "in"
    )
