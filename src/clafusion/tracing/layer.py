"""The values that describe a layer: its nodes and structure, and the points where channels show.

Everything here is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

__all__ = ["CalibrationPoint", "HookPoint", "Layer", "Stage", "Stream", "common_path", "streams_of"]

Stage: TypeAlias = tuple[int, str, tuple[int, ...]]
"""A stream, what its values have rows for, and their positions."""


@dataclass(frozen=True)
class HookPoint:
    """A value inside a layer that shows the activations of channel groups.

    Attributes
    ----------
    post, pre
        Names of the nodes that hold the value as the next layer reads it, and the value before
        its nonlinearity. They are equal where there is no nonlinearity.
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
        Which of the layer's nodes read it, as which operand: ``(node, operand)``. The reader of
        the layer's own output is the node after the last, that of what a value joins is the node
        that joins it. Layers of equal structure have hook points with equal readers.
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
    """An output inside a layer whose channels the layer's own parameters can rescale and shift.

    Attributes
    ----------
    node
        Name of the node that holds the output: of a BatchNorm, or of a linear or convolution
        layer that no norm follows, or of the addition of that layer's bias.
    affine
        Name of the linear or convolution node, which is ``node`` itself or feeds the BatchNorm or
        the addition; None where the BatchNorm follows something else.
    join, shortcut
        The residual addition that takes the output next, and its other operand; None where there
        is no such addition, or the other operand is computed later.
    axis
        The channel axis, -1 where it is the last of any value of the layer.
    weight, bias
        The parameters to scale. ``bias`` is None where the layer has none; then nothing can shift
        the channels.
    groups, members
        As for :class:`HookPoint`.
    is_crossed
        Whether the positions belong to channels of another group, as in layers over the positions.
        Then two networks' values cannot be compared position by position.
    weight_axis
        The axis of ``weight`` that the channels lie along.
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
    is_crossed: bool = False
    weight_axis: int = 0

    def scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """Return a weight that puts out the channels times these factors, taken in float64."""
        rows = weight.double().movedim(self.weight_axis, -1) * factors
        return rows.movedim(-1, self.weight_axis).contiguous().to(weight)


@dataclass(frozen=True)
class Layer:
    """The smallest part of a network that can be matched, inserted or removed.

    In a chain, a weighted operation with its norm and activation. Where paths part and join again,
    all that lies between (a residual block, an inception module).

    Attributes
    ----------
    index
        Position in ``TracedModel.layers``, in topological order.
    name
        Module path; the second layer of a path gets ``#2``, and so on.
    kind
        ``"chain"``, ``"residual_block"`` (paths part and join) or ``"norm"`` (a norm on its own).
    nodes
        Names of its graph nodes, in order.
    output
        Name of the node that holds its output, after the residual addition and activation.
    structure
        Operations, settings and wiring. Only layers of equal structure match; widths are left out.
    beside
        The same of the operations that compute what the layer reads beside its input and weights,
        as masks and tables of positions. They, too, must be equal in layers that match.
    leading
        Names of the nodes that lie between the layer before and this one.
    between
        Operations and settings of what lies between the layer before and this one (of the last
        layer also of what follows it): poolings and the like, which belong to no layer.
    parameters
        Every parameter and buffer that it uses, in the order of its nodes and their operands.
    hook_points
        The values inside the layer whose channels one of its own products reads, and last its own
        output, where that has channels to be matched.
    calibration_points
        The outputs inside the layer that can be rescaled, in order.
    insertable
        ``"identity"`` (some weights make the layer the identity), ``"zero"`` (some weights make
        its residual branch write zero) or None (the layer cannot be inserted).
    last_write
        For ``"zero"``: the parameters that, set to zero (or as ``fillings`` says), make the branch
        write zero.
    output_shape
        Shape of the output without the batch and channel axes. Layers of one stage share it.
    obstacle
        Why the layer cannot be inserted; "" where it can.
    fillings
        What parameters must be in an inserted layer, where that is not zero for one of
        ``last_write`` and any value for another.
    stream
        Position in ``TracedModel.streams`` of the stream that it lies on.
    lender
        Position of the first layer of those that share a value within them, as a table of positions
        that all attentions read; its own where it shares none.
    inputs
        What its nodes, and those before it, read of other streams (their positions) and of the
        model's inputs (``"input 0"``), where the model has several streams.
    rows
        What its output has rows for, in a graph network: ``"nodes"``, ``"edges"`` or ``"graphs"``.
    mixes_nodes
        Whether it takes values of other nodes along the edges of a graph, and cannot be inserted. A
        shallower target leaves it out.
    """

    index: int
    name: str
    kind: Literal["chain", "residual_block", "norm"]
    nodes: tuple[str, ...]
    output: str
    structure: tuple[Any, ...]
    beside: tuple[Any, ...]
    leading: tuple[str, ...]
    between: tuple[Any, ...]
    parameters: tuple[str, ...]
    hook_points: tuple[HookPoint, ...]
    calibration_points: tuple[CalibrationPoint, ...]
    insertable: Literal["identity", "zero"] | None
    last_write: tuple[str, ...]
    output_shape: tuple[int, ...]
    obstacle: str = ""
    fillings: tuple[tuple[str, float], ...] = ()
    stream: int = 0
    lender: int = -1
    inputs: tuple[int | str, ...] = ()
    rows: str = ""
    mixes_nodes: bool = False

    @property
    def stage(self) -> Stage:
        """What layers of one stage share: the stream, what there are rows for, the positions."""
        return self.stream, self.rows, self.output_shape


@dataclass(frozen=True)
class Stream:
    """A run of values along which layers sit: a chain, a residual stage, a branch, an encoder.

    Layers are ordered, inserted and aligned within a stream; other streams reach it as side
    inputs. Every layer belongs to exactly one stream.

    Attributes
    ----------
    name
        A readable name.
    layers
        Positions in ``TracedModel.layers`` of its layers, in topological order.
    inputs
        What its layers read from elsewhere: positions of other streams, and ``"input 0"`` for the
        model's first input. Empty for the trunk of a model that has no other stream.
    """

    name: str
    layers: tuple[int, ...]
    inputs: tuple[int | str, ...] = ()


def streams_of(layers: Sequence[Layer]) -> tuple[Stream, ...]:
    """Return the streams of a model's layers, named after what their layers' paths have in common.

    Of equal names the second gets ``#2``, and so on. A single stream is called ``"trunk"``.
    """
    by_stream: dict[int, list[Layer]] = {}
    for layer in layers:
        by_stream.setdefault(layer.stream, []).append(layer)
    if len(by_stream) == 1:
        return (Stream("trunk", tuple(layer.index for layer in layers)),)
    counts: dict[str, int] = {}
    streams = []
    for of_stream in by_stream.values():
        name = common_path([layer.name.partition("#")[0] for layer in of_stream])
        name = name or of_stream[0].name
        counts[name] = counts.get(name, 0) + 1
        inputs = dict.fromkeys(one for layer in of_stream for one in layer.inputs)
        streams.append(
            Stream(
                name if counts[name] == 1 else f"{name}#{counts[name]}",
                tuple(layer.index for layer in of_stream),
                tuple(sorted(inputs, key=str)),
            )
        )
    return tuple(streams)


def common_path(paths: Iterable[str]) -> str:
    """Return the beginning that all dotted paths have in common."""
    common = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
