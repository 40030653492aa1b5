"""The nodes of an exported graph that carry channels, and what can be asked about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from clafusion.execution.call import State
from clafusion.tracing.groups import Channels
from clafusion.tracing.operations import bound_operands, op_name

__all__ = ["CONVOLUTIONS", "NORMS", "SAME_VALUES", "Flow", "is_matrix_product", "is_pointwise"]

CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution".split()
)
NORMS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm".split())
SAME_VALUES = frozenset("contiguous clone detach alias dropout feature_dropout identity".split())

_MATRIX_PRODUCTS = frozenset("matmul mm addmm bmm baddbmm".split())
_WEIGHTED = CONVOLUTIONS | frozenset("linear embedding lstm gru rnn_tanh rnn_relu".split())
_GLUE = frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t squeeze unsqueeze
    expand contiguous clone detach alias dropout feature_dropout _to_copy to getitem
    chunk split split_with_sizes slice select narrow movedim swapaxes cat pad
    constant_pad_nd mean amax sum pixel_shuffle identity mT unbind""".split()
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
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.sources = {
            node: name for node, name in zip(inputs, placeholders, strict=True) if name is not None
        }
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
            if channels.moving or any(operand in flow for operand in node.all_input_nodes):
                flow[node] = None
        return list(flow)

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._inside

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return those operands of a node that belong to the flow."""
        return [operand for operand in node.all_input_nodes if operand in self._inside]

    def parameters(self, node: fx.Node) -> list[str]:
        """Return the state entries that a node reads, also through views."""
        names = []
        for operand in node.all_input_nodes:
            if operand in self.sources:
                names.append(self.sources[operand])
            elif operand.op == "call_function" and operand.name not in self.channels.nodes:
                names += self.parameters(operand)
        return names

    def is_weighted(self, node: fx.Node) -> bool:
        """Return whether a node applies a weight: linear, convolution, embedding, recurrence."""
        name = op_name(node)
        return name in _WEIGHTED or (is_matrix_product(node) and bool(self.parameters(node)))

    def is_contraction(self, node: fx.Node) -> bool:
        """Return whether a node is the matrix product of two activations."""
        return is_matrix_product(node) and not self.parameters(node)

    def is_glue(self, node: fx.Node) -> bool:
        """Return whether a node only reshapes, joins, pools or sums, without a parameter."""
        if self.parameters(node):
            return False
        return op_name(node) in _GLUE or "pool" in op_name(node) or "upsample" in op_name(node)

    def freedom(self, node: fx.Node) -> tuple[bool, ...] | None:
        """Return for each operand and the result of a weighted node whether its channels are free.

        None for a node without a weight.
        """
        if not self.is_weighted(node):
            return None
        involved = [*self.operands(node), node]
        return tuple(self.channels.nodes[value.name].free for value in involved)

    def settings(self, node: fx.Node) -> tuple[Any, ...]:
        """Return what else than widths two nodes must have in common to do the same.

        The geometry of a convolution or pooling, the numbers of a pointwise operation.
        """
        name = op_name(node)
        if name in CONVOLUTIONS:
            weight = self.state[self.parameters(node)[0]]
            bound = bound_operands(node)
            groups = bound["groups"]
            depthwise = groups > 1 and weight.size(1) == 1
            return (
                tuple(weight.shape[2:]),
                *(_frozen(bound[key]) for key in ("stride", "padding", "dilation")),
                "depthwise" if depthwise else groups,
            )
        if "pool" in name:
            values = bound_operands(node).values()
            return tuple(_frozen(value) for value in values if not isinstance(value, fx.Node))
        if isinstance(node.target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in node.target.tags
        ):
            return tuple(
                self._by_head_size(node, value)
                for value in bound_operands(node).values()
                if isinstance(value, (float, int, str))
            )
        return ()

    def _by_head_size(self, node: fx.Node, value: float | int | str) -> float | int | str:
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
        size = self.channels.shapes[product.all_input_nodes[0].name][-1]
        for power in (-0.5, 0.5, -0.25, 0.25):
            if math.isclose(value, size**power, rel_tol=1e-6):
                return f"head size to the power of {power}"
        return value


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
