"""The values that describe a traced model: its operations, layers and channel groups.

Those of a layer stand in :mod:`clafusion.tracing.layer`.

Everything here is frozen. The stages of a fusion take these values and return new ones; none of
them modifies a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from clafusion.execution.call import State, device_of, flatten_tensors
from clafusion.execution.layouts import layouts_of
from clafusion.execution.walk import PickedPositions, run_graph
from clafusion.tracing.graphs import GraphInputs
from clafusion.tracing.layer import Layer, Stream, streams_of
from clafusion.tracing.normalised import NormalisedWeight
from clafusion.tracing.operations import RESHAPES, bound_operands, op_name, rows_kind
from clafusion.tracing.padding import PaddedAxes, find_padded_axes
from clafusion.tracing.rotatable import RotatableGroup

__all__ = [
    "ChannelGroup",
    "GroupAxis",
    "HeadPartition",
    "ParameterUse",
    "PinnedChannels",
    "TracedModel",
    "UnitedHeads",
]


@dataclass(frozen=True)
class ParameterUse:
    """A view of a parameter whose axes carry channels.

    The view is ``parameter.as_strided(size, stride, offset)``. For most layers it is the whole
    parameter, for a grouped convolution the rows of one of its groups, and for a parameter that is
    added or multiplied in all its elements in one row.

    Attributes
    ----------
    parameter
        Its name in the state dict.
    role
        Which operand of the operation the view is: ``"weight"`` for a weight, ``"element"`` for a
        parameter whose elements meet an activation one by one (a bias, a norm's gain).
    size, stride, offset
        The view, in elements.
    index
        The number of this use among all uses of the model, in graph order.
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
    """Where a channel group occurs: an axis of a parameter use.

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
        ``(num_channels, repeats)``: the positions on that axis that each channel occupies.
        ``repeats`` is 1, or for example the number of pixels of a flattened image.
    """

    use: ParameterUse
    axis: int
    direction: Literal["out", "in"]
    positions: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Exchangeable channels: permuting them on every axis leaves the model's outputs as they are.

    A group has one transport plan, which serves every axis where it occurs. So all writers and
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
        Every axis where the group occurs, in graph order.
    is_counted
        Whether the model adds up values of the channels that no weight multiplies: products of
        queries with keys, sums or a softmax over channels, outputs by the weights of an embedding.
        A copy of a channel then changes the sum, for no weight can be divided between the two.
    sharing
        How many heads of queries share the channels, as those of keys and values: where these read
        or write them, each channel stands for so many times as many positions.
    heads
        Of how many heads they are, head after head, where those of several are united.
    is_averaged
        Whether the model takes a mean or a norm over the channels, or adds them up: copies of some
        of them then change it, unless all are copied equally often.
    """

    index: int
    size: int
    atoms: Tensor
    axes: tuple[GroupAxis, ...]
    is_counted: bool = False
    sharing: int = 1
    heads: int = 1
    is_averaged: bool = False

    @property
    def name(self) -> str:
        """The parameter where the group occurs first, as a readable name."""
        return self.axes[0].use.parameter

    @cached_property
    def base_repeats(self) -> int:
        """In how many positions each channel stands, of one head."""
        return self.repeats_of_head(self.sharing)

    def repeats_of_head(self, sharing: int) -> int:
        """Return in how many positions each channel stands, of one of ``sharing`` heads."""
        least = min(one.positions.size(1) for one in self.axes)
        return least // (sharing + 1) if self.is_fused(sharing) else least

    def is_fused(self, sharing: int) -> bool:
        """Return whether one weight makes the keys and all heads of queries that share them.

        Then each channel stands everywhere in the places of ``sharing`` heads and, behind these, in
        one of the keys.
        """
        counts = {one.positions.size(1) for one in self.axes}
        if sharing == 1 or not self.is_counted or len(counts) > 1:
            return False
        return min(counts) % (sharing + 1) == 0

    def places_of_a_head(self, count: int) -> int:
        """Return in how many of ``count`` places a channel stands, of each head that shares it."""
        if self.sharing > 1:
            base = self.base_repeats
            if count == self.sharing * base:
                return base
            if count == (self.sharing + 1) * base:  # of queries and keys
                return 2 * base
        return count

    def __repr__(self) -> str:
        return f"<ChannelGroup {self.name} of {self.size} channels>"


@dataclass(frozen=True)
class HeadPartition:
    """Heads that are exchangeable as wholes: of an attention, or the groups of a convolution.

    Attributes
    ----------
    layer
        Position in ``TracedModel.layers`` of the first layer that has them.
    members
        For each head, in the order of their places, the indices of its channel groups. The n-th
        group of a head corresponds to the n-th group of every other head.
    is_shared
        Whether all heads have the same groups, as queries that share their keys and values: then
        each head has a part of the places of every channel, and these parts change places.
    parameters
        For modules of a list, as experts: the parameters and buffers of each, which change places
        as wholes. Empty for heads that lie in one parameter.
    """

    layer: int
    members: tuple[tuple[int, ...], ...]
    is_shared: bool = False
    parameters: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class UnitedHeads:
    """Heads whose channel groups are united, since the other network has another number of heads.

    Attributes
    ----------
    layer
        Position in ``TracedModel.layers`` of the first layer that has them.
    count
        How many heads.
    groups
        Indices of the united groups. The members of each are those of the first head, then those
        of the second, and so on. A plan moves whole heads, and moves those of all these groups
        alike.
    """

    layer: int
    count: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class PinnedChannels:
    """Channels that keep their places, although other places might do as well.

    A network and a copy of it with these channels in another order do not fuse to that network.

    Attributes
    ----------
    parameter
        The weight that writes them.
    size
        How many they are.
    operation, module
        The operation at which the analysis loses them, and the path of the module that calls it;
        "" for the model itself.
    why
        What the operation does with them.
    """

    parameter: str
    size: int
    operation: str
    module: str
    why: str

    def __str__(self) -> str:
        where = f"in {self.module!r}" if self.module else "in the model's forward"
        return f"{self.size} of {self.parameter!r} ({self.operation} {where}: {self.why})"


@dataclass(frozen=True)
class TracedModel:
    """A traced model: what it computes, by which parameters, and which channels move together.

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
        The names of the inputs, where the model takes them by keyword; else empty.
    constants
        State entries that are neither parameters nor buffers of the model: tensors that its code
        makes or holds as plain attributes.
    layers
        In topological order, those of a stream one after the other.
    groups
        The channel groups with more than one channel.
    heads
        Which groups may change places as wholes.
    uses
        Every view of every parameter, in graph order.
    aliases
        Tied state entries: other name -> the name that the graph uses.
    static_batch
        The batch size, where the model admits only the one it was traced with; else None.
    keeps_rows
        Whether some output has a row for each row of the inputs, as far as that can be tried.
    mixes_rows
        Whether what some output has for a row depends on the other rows, as far as that was tried.
    unreached
        Parameters with entries that no example input reached and that keep their places; how many.
    pinned
        Channels that keep their places because the analysis does not follow an operation on them.
    united_heads
        Heads whose groups are united: see :mod:`clafusion.correspondence.heads`.
    types
        Types to compute in, in place of those of weights, inputs and graph: half precision is for
        storage, and runs of the graph are in float32.
    normalised
        Weights that the model divides by a norm of their own.
    weights
        Parameters, buffers and constants of the module's shapes, to be taken in place of its own:
        of a copy with other weights, or from files as they are read. None for the module's own.
    rotatable
        Channel groups whose norms are folded in these weights, so that any orthogonal map of the
        channels leaves the function as it is: see :mod:`clafusion.tracing.rotations`. None where
        nobody has looked for them.
    thinning
        At which positions of its inputs the last layer is computed: see
        :mod:`clafusion.profiling.thinning`. None for all.
    graph
        What the inputs of a graph network have rows for; None for all other networks, whose inputs
        all have a row for each input of the batch.
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
    keeps_rows: bool = True
    mixes_rows: bool = False
    unreached: Mapping[str, int] = field(default_factory=dict)
    pinned: tuple[PinnedChannels, ...] = ()
    united_heads: tuple[UnitedHeads, ...] = ()
    types: Mapping[torch.dtype, torch.dtype] = field(default_factory=dict)
    normalised: tuple[NormalisedWeight, ...] = ()
    weights: State | None = None
    rotatable: tuple[RotatableGroup, ...] | None = None
    thinning: PickedPositions | None = None
    graph: GraphInputs | None = None

    def __repr__(self) -> str:
        return f"<TracedModel {type(self.model).__name__}: {len(self.layers)} layers>"

    @property
    def takes_whole_batches(self) -> bool:
        """Whether no batch can be cut: of one size only, or of graphs."""
        return self.static_batch is not None or self.graph is not None

    @property
    def device(self) -> torch.device:
        """Where the model computes; the CPU for a model without parameters."""
        return device_of(self.model) or torch.device("cpu")

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """The streams along which the layers sit, each behind those that it reads."""
        return streams_of(self.layers)

    @cached_property
    def layouts(self) -> Mapping[str, tuple[int, ...]]:
        """Tensors of the module that do not lie in memory as usual; states hold them contiguous."""
        return layouts_of(self.model)

    @cached_property
    def padded_axes(self) -> Mapping[str, PaddedAxes]:
        """Where nodes' values hold the positions that an attention mask leaves out."""
        return find_padded_axes(self)

    @cached_property
    def fillings(self) -> Mapping[str, float]:
        """What parameters are in an inserted layer: see :attr:`Layer.fillings`."""
        return {name: value for layer in self.layers for name, value in layer.fillings}

    @cached_property
    def reshapes(self) -> frozenset[str]:
        """Names of the nodes that change the shape of a value and nothing else."""
        nodes = self.module.graph.nodes
        return frozenset(node.name for node in nodes if op_name(node) in RESHAPES)

    @cached_property
    def axes_by_parameter(self) -> Mapping[str, tuple[tuple[ChannelGroup, GroupAxis], ...]]:
        """The channel axes of every parameter, with their groups."""
        axes: dict[str, list[tuple[ChannelGroup, GroupAxis]]] = {}
        for group in self.groups:
            for group_axis in group.axes:
                axes.setdefault(group_axis.use.parameter, []).append((group, group_axis))
        return {name: tuple(group_axes) for name, group_axes in axes.items()}

    @cached_property
    def uses_by_parameter(self) -> Mapping[str, tuple[ParameterUse, ...]]:
        """The views of every parameter, in graph order."""
        by_parameter: dict[str, list[ParameterUse]] = {}
        for use in self.uses:
            by_parameter.setdefault(use.parameter, []).append(use)
        return {name: tuple(uses) for name, uses in by_parameter.items()}

    @cached_property
    def entries(self) -> Mapping[fx.Node, str]:
        """The graph's inputs that are state entries, with the entries' names."""
        inputs = (node for node in self.module.graph.nodes if node.op == "placeholder")
        pairs = zip(inputs, self.placeholders, strict=True)
        return {node: name for node, name in pairs if name is not None}

    def nodes_of(self, entry: str) -> list[fx.Node]:
        """Return the graph's inputs that are a state entry."""
        return [node for node, name in self.entries.items() if name == entry]

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """Parameters, and floating buffers of the state dict, that no output depends on."""
        needed: set[fx.Node] = set()
        for node in reversed(self.module.graph.nodes):
            if node.op == "output" or node in needed or _is_in_place(node):
                needed.update((node, *node.all_input_nodes))
        read = {name for node, name in self.entries.items() if node in needed}
        written = self.model.state_dict().keys()
        kept = [
            *dict(self.model.named_parameters()),
            *(name for name, _ in self.model.named_buffers() if name in written),
        ]
        state = self.state()
        found = {self.aliases.get(name, name): None for name in kept}
        return tuple(name for name in found if name not in read and state[name].is_floating_point())

    @cached_property
    def shared_parameters(self) -> frozenset[str]:
        """Parameters that several operations read: what serves one of them may harm another."""
        readers: dict[str, set[fx.Node]] = {}
        for node, name in self.entries.items():
            readers.setdefault(name, set()).update(node.users)
        return frozenset(name for name, nodes in readers.items() if len(nodes) > 1)

    @cached_property
    def axes_by_use(
        self,
    ) -> Mapping[str, Mapping[tuple[int, int], list[tuple[ChannelGroup, GroupAxis]]]]:
        """The channel axes of every parameter: ``(which use, axis)`` -> groups on that axis.

        The groups are in the order of their first positions.
        """
        by_parameter: dict[str, dict[tuple[int, int], list[tuple[ChannelGroup, GroupAxis]]]] = {}
        for parameter, group_axes in self.axes_by_parameter.items():
            uses = [use.index for use in self.uses_by_parameter[parameter]]
            axes = by_parameter.setdefault(parameter, {})
            for group, group_axis in group_axes:
                place = uses.index(group_axis.use.index), group_axis.axis
                axes.setdefault(place, []).append((group, group_axis))
            for carried in axes.values():
                carried.sort(key=lambda pair: int(pair[1].positions.min()))
        return by_parameter

    def axes_of(
        self, parameter: str
    ) -> Mapping[tuple[int, int], list[tuple[ChannelGroup, GroupAxis]]]:
        """Return a parameter's channel axes, as in :attr:`axes_by_use`; empty where it has none."""
        return self.axes_by_use.get(parameter, {})

    @cached_property
    def outputs(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape without the batch axis, and type, of every output tensor."""
        with torch.no_grad():
            values = self.output_tensors(self.example_inputs)
            return tuple((tuple(value.shape[1:]), value.dtype) for value in values)

    @property
    def outputs_text(self) -> str:
        """The outputs as an error shows them: ``('batch', 10) torch.float32``."""
        return ", ".join(f"{('batch', *shape)} {dtype}" for shape, dtype in self.outputs)

    @property
    def num_classes(self) -> int | None:
        """How many classes it scores, as ``(batch, classes)`` and nothing else; else None."""
        if len(self.outputs) != 1:
            return None
        ((shape, dtype),) = self.outputs
        is_scores = dtype.is_floating_point and len(shape) == 1 and shape[0] > 1
        return shape[0] if is_scores else None

    @cached_property
    def computed_outputs(self) -> tuple[bool, ...]:
        """For each output tensor whether both an input and a trained parameter enter it."""
        trained = {self.aliases.get(one, one) for one, _ in self.model.named_parameters()}
        enters: dict[fx.Node, frozenset[str]] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                name = self.entries.get(node)
                kind = "input" if name is None else "weight" if name in trained else "constant"
                enters[node] = frozenset({kind})
            elif node.op != "output":
                found = frozenset[str]().union(*(enters[one] for one in node.all_input_nodes))
                enters[node] = found
                if _is_in_place(node):  # later nodes that read the operands see the result
                    enters |= dict.fromkeys(node.all_input_nodes, found)
        return tuple({"input", "weight"} <= enters[one] for one in self._output_nodes)

    @cached_property
    def output_has_rows(self) -> tuple[bool, ...]:
        """For each output tensor whether its first axis grows with the batch."""
        shapes = (one.meta["val"].shape for one in self._output_nodes)
        return tuple(len(one) > 0 and isinstance(one[0], torch.SymInt) for one in shapes)

    @property
    def output_rows(self) -> tuple[str, ...]:
        """For each output tensor of a graph network what it has rows for."""
        return tuple(rows_kind(one) for one in self._output_nodes)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The node of every output tensor."""
        return tuple(one.name for one in self._output_nodes)

    @cached_property
    def _output_nodes(self) -> tuple[fx.Node, ...]:
        leaves = torch.utils._pytree.tree_leaves(self.module.graph.output_node().args)
        nodes = [one for one in leaves if isinstance(one, fx.Node)]
        return tuple(one for one in nodes if isinstance(one.meta.get("val"), Tensor))

    @cached_property
    def entered_layers(self) -> tuple[bool, ...]:
        """For each layer whether the values of some input enter what it puts out."""
        entered: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                is_entered = node not in self.entries
            else:
                value = node.meta.get("val")
                is_size = isinstance(value, (int, torch.SymInt))
                is_entered = not is_size and any(one in entered for one in node.all_input_nodes)
            if is_entered:
                entered.add(node)
        names = {node.name for node in entered}
        return tuple(layer.output in names for layer in self.layers)

    def operand_names(self, node: fx.Node) -> dict[str, str]:
        """Return those operands of a node that are state entries: operand name -> entry's name."""
        return {
            role: self.entries[operand]
            for role, operand in bound_operands(node).items()
            if isinstance(operand, fx.Node) and operand in self.entries
        }

    def state(self) -> State:
        """Return the parameters, buffers and constants: see :attr:`weights`."""
        return self.module_state() if self.weights is None else self.weights

    def module_state(self) -> dict[str, Tensor]:
        """Return the module's parameters, buffers and constants, detached and contiguous."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        tensors.update(self.model.named_buffers(remove_duplicate=False))
        return {
            **self.constants,
            **{name: value.detach().contiguous() for name, value in tensors.items()},
        }

    def output_tensors(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Compute the model's outputs; return those that are tensors, in order."""
        return list(flatten_tensors(list(self.run(inputs))))

    def run(
        self,
        inputs: tuple[Tensor, ...],
        *,
        state: State | None = None,
        replace: Callable[[fx.Node, Any], Any] | None = None,
    ) -> tuple[Any, ...]:
        """Compute the model's outputs, in one flat tuple.

        Parameters
        ----------
        inputs
            The model's inputs, in the order of ``example_inputs``.
        state
            Parameters, buffers and constants by name; default the model's own.
        replace
            Called as ``replace(node, value)`` for every node, in order. The run goes on with what
            it returns: a function that returns the value itself only observes.
        """
        return run_graph(self, inputs, self.state() if state is None else state, replace)


def _is_in_place(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
