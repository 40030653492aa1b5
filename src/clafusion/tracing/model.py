"""The values that describe a traced model: its operations, layers and channel groups.

Everything here is frozen. The stages of the pipeline take these values and return new ones;
none of them modifies a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from clafusion.execution.call import State, flatten_tensors
from clafusion.execution.walk import run_graph
from clafusion.tracing.operations import bound_operands

__all__ = [
    "CalibrationPoint",
    "ChannelGroup",
    "GroupAxis",
    "HeadPartition",
    "HookPoint",
    "Layer",
    "ParameterUse",
    "TracedModel",
    "UnitedHeads",
]


@dataclass(frozen=True)
class ParameterUse:
    """A view of a parameter in which single axes carry channels.

    ``parameter.as_strided(size, stride, offset)`` is the view. It is the whole parameter for most
    layers, one group's rows for a grouped convolution, and the flattened elements for a parameter
    that is added or multiplied in.

    Attributes
    ----------
    parameter
        Its name in the state dict.
    role
        Which of the operation's operands it is: ``"weight"``, ``"bias"``, ``"running_mean"``...
    size, stride, offset
        The view, in elements.
    index
        Which use of the parameter this is, in graph order.
    """

    parameter: str
    role: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    index: int

    def view(self, parameter: Tensor) -> Tensor:
        """Return the used part of ``parameter``, sharing its memory."""
        return parameter.as_strided(
            self.size, self.stride, parameter.storage_offset() + self.offset
        )


@dataclass(frozen=True)
class GroupAxis:
    """Where a channel group occurs: one axis of one parameter use.

    Attributes
    ----------
    use
        The parameter view.
    axis
        The axis of the view.
    direction
        ``"out"`` where the channels leave the parameter (rows of a weight, biases, norms),
        ``"in"`` where they enter it (columns of a weight).
    positions
        ``(num_channels, repeats)``: the positions on that axis which each channel occupies.
        ``repeats`` is 1, or for example the number of pixels of a flattened image.
    """

    use: ParameterUse
    axis: int
    direction: Literal["out", "in"]
    positions: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are exchangeable: permuting them in every axis leaves the model as it was.

    One transport plan per class serves every axis in which it occurs, so that all writers and
    readers of a residual stream move together.

    Attributes
    ----------
    index
        Position in ``TracedModel.groups``.
    size
        Number of channels.
    atoms
        ``(size,)``: the label of each channel in the label tensors of the analysis.
    axes
        Every place where the class occurs, in graph order.
    is_counted
        Whether the model adds up values of the channels that no weight multiplies: products of
        queries with keys, sums or a softmax over channels, outputs by the weights of an embedding.
        A copy of a channel then counts as one more, where a weight could be shared out.
    """

    index: int
    size: int
    atoms: Tensor
    axes: tuple[GroupAxis, ...]
    is_counted: bool = False

    @property
    def name(self) -> str:
        """The parameter that first writes the group, as a readable name."""
        return self.axes[0].use.parameter


@dataclass(frozen=True)
class HeadPartition:
    """Blocks of channels that are exchangeable as wholes, such as the heads of an attention.

    Attributes
    ----------
    layer
        Position in ``TracedModel.layers`` of the first layer that has them.
    members
        For each block, in the order of their places, the indices of its channel groups; the n-th
        group of one block corresponds to the n-th of every other one.
    """

    layer: int
    members: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnitedHeads:
    """Blocks whose groups are united, since the other network has another number of them.

    Attributes
    ----------
    layer
        Position in ``TracedModel.layers`` of the first layer that has them.
    count
        How many blocks.
    groups
        Indices of the united groups. The members of each are those of the first block, then those
        of the second, and so on; a plan moves whole blocks, and those of all these groups alike.
    """

    layer: int
    count: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class HookPoint:
    """A tensor inside a layer that shows the activations of channel groups.

    Attributes
    ----------
    post, pre
        Names of the nodes that hold the value as the next layer reads it, and the same value
        before its nonlinearity. Equal where there is none.
    axis
        The channel axis.
    positions
        Shape of the value without the batch and channel axes.
    groups
        ``(num_channels,)``: the group of each channel, -1 for a fixed channel.
    members
        ``(num_channels,)``: the position of each channel within its group.
    batch
        The axis of the inputs; None where positions are folded into the first axis.
    readers
        Which of the layer's nodes read it, as which operand; the layer's own output is read by the
        node after the last. Layers of one structure have points of the same readers.
    """

    post: str
    pre: str
    axis: int
    positions: tuple[int, ...]
    groups: Tensor
    members: Tensor
    batch: int | None = 0
    readers: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class CalibrationPoint:
    """A layer's output whose channels can be rescaled and shifted by its own parameters.

    Attributes
    ----------
    node
        Name of the node that holds the output: of a BatchNorm, or of a linear or convolution
        layer that no norm follows.
    affine
        Name of the linear or convolution node, which is ``node`` itself or feeds the BatchNorm;
        None where the BatchNorm follows something else.
    join, shortcut
        The residual addition into which the output goes next, and what it is added to, where that
        is computed before the layer; else None.
    axis
        The channel axis.
    weight, bias
        The parameters to scale along their first axis; ``bias`` is None where there is none, and
        the channels cannot be shifted.
    groups, members
        As for :group:`HookPoint`.
    """

    node: str
    affine: str | None
    join: str | None
    shortcut: str | None
    axis: int
    weight: str
    bias: str | None
    groups: Tensor
    members: Tensor


@dataclass(frozen=True)
class Layer:
    """The smallest part of a network that can be matched, inserted or removed.

    A weighted layer with its norm and activation in a chain; a whole block where paths part and
    join again (a residual block, an inception module).

    Attributes
    ----------
    index
        Position in ``TracedModel.layers``, in topological order.
    name
        Module path, as a person would call it.
    kind
        ``"chain"``, ``"residual_block"`` (paths part and join) or ``"norm"`` (a norm on its own).
    nodes
        Names of its graph nodes, in order.
    output
        Name of the node that is its true output: after the residual addition and activation.
    structure
        What another layer must equal to be matched with this one; widths are left out.
    parameters
        Every parameter and buffer that it uses, in the order of its nodes and their operands.
    hook_points
        Its tensors whose channels are read by a weighted layer of this layer, and last its own
        output, where that has channels to be matched.
    calibration_points
        Its layers whose outputs can be rescaled, in order.
    insertable
        ``"identity"`` (the weights can be made an identity), ``"zero"`` (a residual branch that
        can be made to write zero) or None (the layer cannot be inserted).
    last_write
        For ``"zero"``: the parameters that, set to zero, make the branch write zero.
    output_shape
        Shape of the output without the batch and channel axes: the stage the layer belongs to.
    """

    index: int
    name: str
    kind: Literal["chain", "residual_block", "norm"]
    nodes: tuple[str, ...]
    output: str
    structure: tuple[Any, ...]
    parameters: tuple[str, ...]
    hook_points: tuple[HookPoint, ...]
    calibration_points: tuple[CalibrationPoint, ...]
    insertable: Literal["identity", "zero"] | None
    last_write: tuple[str, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class TracedModel:
    """A traced model: what is computed, by which parameters, and which channels move together.

    Attributes
    ----------
    model
        The module that was traced, untouched.
    module
        The exported computation, with the parameters as its first inputs.
    placeholders
        For each input of ``module``: the state entry that feeds it, or None for a model input.
    example_inputs
        The few rows of input with which the model was traced.
    keywords
        The names of the inputs, where the model takes them by keyword.
    constants
        State entries that are not in the model's state dict (lifted constants, buffers that are
        not persistent).
    layers
        In topological order.
    groups
        The channel groups with more than one channel.
    heads
        Which groups may change places.
    united_heads
        Blocks that have no groups of their own: see :mod:`clafusion.matching.united_heads`.
    uses
        Every view of every parameter.
    aliases
        Tied state entries: other name -> the name that the graph uses.
    static_batch
        The batch size, where the model admits only the one it was traced with; else None.
    """

    model: nn.Module
    module: fx.GraphModule
    placeholders: tuple[str | None, ...]
    example_inputs: tuple[Tensor, ...]
    keywords: tuple[str, ...]
    constants: State
    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    heads: tuple[HeadPartition, ...]
    uses: tuple[ParameterUse, ...]
    aliases: Mapping[str, str]
    static_batch: int | None
    united_heads: tuple[UnitedHeads, ...] = ()

    @cached_property
    def axes_by_parameter(self) -> Mapping[str, tuple[tuple[ChannelGroup, GroupAxis], ...]]:
        """Every axis of every parameter, with its group."""
        found: dict[str, list[tuple[ChannelGroup, GroupAxis]]] = {}
        for group in self.groups:
            for group_axis in group.axes:
                found.setdefault(group_axis.use.parameter, []).append((group, group_axis))
        return {name: tuple(group_axes) for name, group_axes in found.items()}

    @cached_property
    def uses_by_parameter(self) -> Mapping[str, tuple[ParameterUse, ...]]:
        """Every view of every parameter that is used, in graph order."""
        found: dict[str, list[ParameterUse]] = {}
        for use in self.uses:
            found.setdefault(use.parameter, []).append(use)
        return {name: tuple(uses) for name, uses in found.items()}

    @cached_property
    def axes_by_use(
        self,
    ) -> Mapping[str, Mapping[tuple[int, int], list[tuple[ChannelGroup, GroupAxis]]]]:
        """Every parameter's channel axes: ``(which use, axis)`` -> groups, by first position."""
        found: dict[str, dict[tuple[int, int], list[tuple[ChannelGroup, GroupAxis]]]] = {}
        for parameter, group_axes in self.axes_by_parameter.items():
            uses = [use.index for use in self.uses_by_parameter[parameter]]
            axes = found.setdefault(parameter, {})
            for group, group_axis in group_axes:
                place = uses.index(group_axis.use.index), group_axis.axis
                axes.setdefault(place, []).append((group, group_axis))
            for carried in axes.values():
                carried.sort(key=lambda one: int(one[1].positions.min()))
        return found

    def axes_of(
        self, parameter: str
    ) -> Mapping[tuple[int, int], list[tuple[ChannelGroup, GroupAxis]]]:
        """Return a parameter's channel axes: ``(which use, axis)`` -> groups, by first position."""
        return self.axes_by_use.get(parameter, {})

    @cached_property
    def outputs(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape without the batch axis, and type, of every output."""
        with torch.no_grad():
            found = flatten_tensors(list(self.run(self.example_inputs)))
            return tuple((tuple(one.shape[1:]), one.dtype) for one in found)

    def operand_names(self, node: fx.Node) -> dict[str, str]:
        """Return a node's operands that are state entries: operand name -> state name."""
        inputs = (one for one in self.module.graph.nodes if one.op == "placeholder")
        names = dict(zip(inputs, self.placeholders, strict=True))
        return {
            role: name
            for role, operand in bound_operands(node).items()
            if isinstance(operand, fx.Node) and (name := names.get(operand)) is not None
        }

    def state(self) -> dict[str, Tensor]:
        """Return the model's parameters, buffers and constants, detached and contiguous."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        tensors.update(self.model.named_buffers(remove_duplicate=False))
        return {
            **self.constants,
            **{name: value.detach().contiguous() for name, value in tensors.items()},
        }

    def run(
        self,
        inputs: tuple[Tensor, ...],
        *,
        state: State | None = None,
        replace: Callable[[fx.Node, Any], Any] | None = None,
    ) -> tuple[Any, ...]:
        """Compute the model's outputs (flattened) with the weights in ``state``.

        ``replace(node, value)`` is called for every node, in order, and what it returns is used
        in the value's place: return the value itself to observe.
        """
        return run_graph(self, inputs, self.state() if state is None else state, replace)
