"""The nodes of an exported graph that carry channels, and what can be asked about them."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from clafusion.execution.call import State
from clafusion.tracing.groups import Channels
from clafusion.tracing.labels.rule import ComputedWeight
from clafusion.tracing.operations import (
    RESHAPES,
    SAME_VALUES,
    batch_axis,
    bound_operands,
    op_name,
    rows_kind,
    value_operands,
)

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "Flow",
    "is_matrix_product",
    "is_pointwise",
]

CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution".split()
)
NORMS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm".split())

_MATRIX_PRODUCTS = frozenset("matmul mm addmm bmm baddbmm einsum".split())
_WEIGHTED = CONVOLUTIONS | frozenset("linear embedding lstm gru rnn_tanh rnn_relu bilinear".split())
_GLUE = RESHAPES | frozenset(
    """chunk split split_with_sizes slice select narrow cat pad constant_pad_nd mean amax sum
    pixel_shuffle unbind""".split()
)

# How the nodes of each graph are pooled.
_POOLS_OF_NODES = frozenset("scatter_add scatter_reduce index_add div".split())

# Operands that two networks may differ in and still do the same: what only training reads, what
# says where and how numbers are stored, and sizes.
_NO_SETTINGS = frozenset(
    """momentum training train dropout dropout_p cudnn_enable cudnn_enabled padding_idx
    scale_grad_by_freq sparse dtype layout device pin_memory memory_format non_blocking copy
    implicit enable_gqa size sizes shape split_size split_sizes sections chunks normalized_shape
    num_groups repeats sym_size""".split()
)


class Flow:
    """The nodes between the first channels and the output, in order.

    Masks and other values computed from the input alone are left out: they run beside the layers
    and would tie all of them into one residual block.

    Parameters
    ----------
    module, placeholders, state
        As for :func:`clafusion.tracing.groups.find_channels`.
    channels
        What it returned.

    Attributes
    ----------
    nodes
        The nodes of the flow.
    sources
        For each input node that is a state entry, the entry's name.
    inputs
        The other input nodes.
    order
        The position of each node in the graph.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        placeholders: Sequence[str | None],
        state: State,
        channels: Channels,
    ) -> None:
        self.graph = module.graph
        self.state = state
        self.channels = channels
        feeds = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.sources = {
            node: name for node, name in zip(feeds, placeholders, strict=True) if name is not None
        }
        self.inputs = [node for node in feeds if node not in self.sources]
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.nodes = self._nodes()
        self._inside = frozenset(self.nodes)

    def _nodes(self) -> list[fx.Node]:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        needed = {output}
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        flow: dict[fx.Node, None] = {}
        for node in self.graph.nodes:
            channels = self.channels.nodes.get(node.name)
            if node.op != "call_function" or node not in needed or channels is None:
                continue
            operands = value_operands(node)
            if operands and (channels.moving or any(one in flow for one in operands)):
                flow[node] = None
        return list(flow)

    @property
    def statistics(self) -> frozenset[str]:
        """The state entries that are a norm's running mean or variance, or move with a weight."""
        roles = ("running_mean", "running_var")
        return frozenset(self.channels.labels.moving_buffers) | frozenset(
            self.sources[operand]
            for node in self.graph.nodes
            if op_name(node) in NORMS
            for role, operand in bound_operands(node).items()
            if role in roles and operand in self.sources
        )

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._inside

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return those operands of a node that belong to the flow."""
        return [operand for operand in value_operands(node) if operand in self._inside]

    def parameters(self, node: fx.Node) -> list[str]:
        """Return the state entries that a node reads, also through views."""
        names = []
        for operand in node.all_input_nodes:
            if operand in self.sources:
                names.append(self.sources[operand])
            elif operand.op == "call_function" and operand.name not in self.channels.nodes:
                names += self.parameters(operand)
        return names

    def positions(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's value without the axes of the batch and the channels."""
        axis = self.channels.nodes[node.name].axis
        shape = self.channels.shapes.get(node.name, ())
        batch = batch_axis(node) if "val" in node.meta else 0
        return tuple(size for i, size in enumerate(shape) if i not in (batch or 0, axis))

    def is_weighted(self, node: fx.Node) -> bool:
        """Return whether a node applies a weight: linear, convolution, embedding, recurrence."""
        name = op_name(node)
        return name in _WEIGHTED or (is_matrix_product(node) and bool(self.parameters(node)))

    @cached_property
    def _dependent(self) -> frozenset[fx.Node]:
        """The nodes whose values depend on the model's inputs."""
        found = set(self.inputs)
        for node in self.graph.nodes:
            if any(one in found for one in node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def _gains(self) -> frozenset[str]:
        """The gains of standardised weights."""
        known = self.channels.labels.normalised.values()
        return frozenset(name for one in known if one.kind == "standard" for name in one.others)

    @cached_property
    def _has_free_batch(self) -> bool:
        sizes = [size for one in self.inputs for size in getattr(one.meta.get("val"), "shape", ())]
        return any(not isinstance(size, int) for size in sizes)

    def is_same_for_all(self, node: fx.Node) -> bool:
        """Return whether a value is the same whatever the input, and has no axis of the batch.

        As what a network makes of a table of positions. An operation that spreads it over the
        batch, as ``expand``, depends on the input's size.
        """
        return self._has_free_batch and node not in self._dependent

    def has_computed_weight(self, node: fx.Node) -> bool:
        """Return whether a node applies a weight that is computed from parameters."""
        labels = self.channels.labels.labels
        return any(isinstance(labels.get(one), ComputedWeight) for one in node.all_input_nodes)

    def is_contraction(self, node: fx.Node) -> bool:
        """Return whether a node is the matrix product of two activations."""
        return is_matrix_product(node) and not self.parameters(node)

    def is_glue(self, node: fx.Node) -> bool:
        """Return whether a node only reshapes, joins, pools or sums, without a parameter."""
        if self.parameters(node):
            return False
        if op_name(node) in _POOLS_OF_NODES and rows_kind(node) == "graphs":
            return len(self.operands(node)) == 1
        return op_name(node) in _GLUE or "pool" in op_name(node) or "upsample" in op_name(node)

    def freedom(self, node: fx.Node) -> tuple[bool | tuple[int, ...], ...] | None:
        """Return for each operand and the result of a weighted node whether its channels are free.

        And last, in how many places of the result a channel stands, of each of the heads that share
        it. None for a node without a weight.
        """
        if not self.is_weighted(node) or node.name not in self.channels.nodes:
            return None
        involved = [self.channels.nodes[one.name] for one in (*self.operands(node), node)]
        result = involved[-1]
        places = torch.stack([result.groups, result.members])[:, result.groups >= 0]
        channels, counts = places.unique(dim=1, return_counts=True)
        turns = {
            self.channels.groups[group].places_of_a_head(count)
            for group, count in set(zip(channels[0].tolist(), counts.tolist(), strict=True))
        }
        return (*(one.free for one in involved), tuple(sorted(turns)))

    def settings(self, node: fx.Node) -> tuple[tuple[str, Any], ...]:
        """Return what else than widths two nodes must have in common to do the same, by name.

        That is the geometry of a convolution or pooling, and every number, flag and word of any
        other operation, such as a norm's eps; but no sizes along the channels.
        """
        name = op_name(node)
        if name in SAME_VALUES:
            return ()
        if node.target is operator.getitem:
            return (("item", node.args[1]),)
        bound = bound_operands(node)
        if name in CONVOLUTIONS:
            weight = bound["weight"].meta["val"].shape
            groups = bound["groups"]
            depthwise = groups > 1 and weight[1] == 1
            return (
                ("kernel", tuple(weight[2:])),
                *((key, _frozen(bound[key])) for key in ("stride", "padding", "dilation")),
                ("groups", "depthwise" if depthwise else groups),
            )
        names = self.parameters(node)
        if node in self.channels.labels.computing and names and self._gains.issuperset(names):
            return ()  # of what multiplies a gain, the gain can take the place
        found = []
        for key, value in bound.items():
            if key not in _NO_SETTINGS:
                value = self._setting(node, key, value)
                if value is not None and _is_plain(value):
                    found.append((key, value))
        return tuple(found)

    def _setting(self, node: fx.Node, key: str, value: Any) -> Any:
        """Return a setting without what is a width in it; None for what is nothing else."""
        name = op_name(node)
        if name == "scaled_dot_product_attention" and key == "scale":
            return self._power_of_head_size(node.all_input_nodes[0], value or None)
        if name in ("slice", "select", "narrow") and key in ("start", "end", "length", "index"):
            is_whole = name == "slice" and _takes_all(bound_operands(node))
            return value if self._is_along_positions(node) and not is_whole else None
        if name in ("constant_pad_nd", "pad") and key == "pad":
            return self._pads_of_positions(node, value)
        if name in ("full", "scalar_tensor") and key in ("fill_value", "s"):
            node = next((user for user in node.users if user in self), node)
        return self._by_head_size(node, _frozen(value))

    def _is_along_positions(self, node: fx.Node) -> bool:
        """Return whether a slice is surely along another axis than the channels'."""
        operand = node.all_input_nodes[0]
        if operand not in self:
            return True
        axis = self.channels.nodes[operand.name].axis
        dim = bound_operands(node)["dim"] % len(self.channels.shapes[operand.name])
        return axis is not None and axis != dim

    def _pads_of_positions(self, node: fx.Node, pads: Sequence[Any]) -> tuple[Any, ...]:
        """Return a padding's numbers, from the last axis to the first, without the channels'."""
        operand = node.all_input_nodes[0]
        if operand not in self:
            return tuple(pads)
        axis, rank = self.channels.nodes[operand.name].axis, len(self.channels.shapes[operand.name])
        kept = [i for i in range(len(pads) // 2) if rank - 1 - i != axis]
        return tuple(pad for i in kept for pad in pads[2 * i : 2 * i + 2])

    def _by_head_size(self, node: fx.Node, value: Any) -> Any:
        """Name a factor of attention scores by the size of the heads, which is a width."""
        if op_name(node) not in ("mul", "div") or not isinstance(value, float) or value <= 0:
            return value
        product = next(iter(self.operands(node)), node)
        if not self.is_contraction(product):  # the factor scales the queries or keys
            product = node
            while not self.is_contraction(product):
                users = list(product.users)
                if len(users) != 1 or not (product is node or self.is_glue(product)):
                    return value
                (product,) = users
        return self._power_of_head_size(product.all_input_nodes[0], value)

    def _power_of_head_size(self, operand: fx.Node, value: float | None) -> float | str:
        """Name a factor by the size of the last axis of an operand; None is the usual factor."""
        size = self.channels.shapes[operand.name][-1]
        for power in (-0.5, 0.5, -0.25, 0.25):
            if value is None or math.isclose(value, size**power, rel_tol=1e-6):
                return f"head size to the power of {power}"
        return value or 0.0


def _takes_all(bound: Mapping[str, Any]) -> bool:
    """Return whether a slice takes every entry of an axis."""
    first, end, step = (bound.get(key) for key in ("start", "end", "step"))
    return first in (None, 0) and step == 1 and (end is None or end == sys.maxsize)


def is_matrix_product(node: fx.Node) -> bool:
    """Return whether a node multiplies matrices, be they weights or activations."""
    return op_name(node) in _MATRIX_PRODUCTS


def is_pointwise(node: fx.Node) -> bool:
    """Return whether a node works on each element alone."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or op_name(node) in ("hardtanh", "relu6")
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
