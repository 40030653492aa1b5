"""Exported graph + channels -> the layers that can be matched, inserted or removed.

The graph is cut at the nodes through which every path from the input to the output passes. Where
paths part and join between two such nodes lies a block; in between run chains of single layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from clafusion.execution.call import State
from clafusion.tracing.groups import Channels
from clafusion.tracing.model import CalibrationPoint, HookPoint, Layer
from clafusion.tracing.operations import (
    batch_axis,
    bound_operands,
    convolution_geometry,
    module_path,
    op_name,
)

__all__ = ["find_layers"]

_CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution".split()
)
_MATRIX_PRODUCTS = frozenset("matmul mm addmm bmm baddbmm".split())
_WEIGHTED = _CONVOLUTIONS | frozenset("linear embedding lstm gru rnn_tanh rnn_relu".split())
_NORMS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm".split())
_GLUE = frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t squeeze unsqueeze
    expand contiguous clone detach alias dropout feature_dropout _to_copy to getitem
    chunk split split_with_sizes slice select narrow movedim swapaxes cat pad
    constant_pad_nd mean amax sum pixel_shuffle identity mT unbind""".split()
)
_SAME_VALUES = frozenset("contiguous clone detach alias dropout feature_dropout identity".split())
# f(f(x)) = f(x): an inserted layer with identity weights changes nothing after one of these.
_IDEMPOTENT = frozenset("relu relu6 hardtanh clamp clamp_min abs".split())
_ZERO_AT_ZERO = frozenset("relu relu6 gelu silu tanh hardswish leaky_relu elu selu mish".split())


@dataclass
class _Draft:
    """A layer while its nodes are collected."""

    kind: Literal["chain", "residual_block", "norm"]
    nodes: list[fx.Node]
    entry: fx.Node | None
    leading: list[fx.Node] = field(default_factory=list)
    trailing: list[fx.Node] = field(default_factory=list)


def find_layers(
    module: fx.GraphModule,
    placeholders: Sequence[str | None],
    state: State,
    channels: Channels,
) -> tuple[Layer, ...]:
    """Cut an exported graph into layers, in topological order.

    Parameters
    ----------
    module, placeholders, state
        As for :func:`clafusion.tracing.groups.find_channels`.
    channels
        What that found.
    """
    return _Cutter(module, placeholders, state, channels).layers()


class _Cutter:
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
        self.flow = self._flow()
        self.inside = frozenset(self.flow)

    def layers(self) -> tuple[Layer, ...]:
        drafts = self._drafts()
        owned: dict[fx.Node, int] = {}
        for i, draft in enumerate(drafts):
            owned.update(dict.fromkeys([*draft.leading, *draft.nodes, *draft.trailing], i))
        side = self._side_nodes(owned)
        names: dict[str, int] = {}
        layers = []
        for i, draft in enumerate(drafts):
            name = self._name(draft)
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name}#{names[name]}"
            layers.append(self._layer(i, name, draft, side.get(i, [])))
        return tuple(layers)

    # --- cutting -------------------------------------------------------------------------------

    def _flow(self) -> list[fx.Node]:
        """Return the nodes between the first channels and the output, in order.

        Masks and other values computed from the input alone are left out: they run beside the
        layers and would tie all of them into one block.
        """
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        needed = {output}
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        flow: dict[fx.Node, None] = {}
        for node in self.graph.nodes:
            known = self.channels.nodes.get(node.name)
            if node.op != "call_function" or node not in needed or known is None:
                continue
            if known.moving or any(one in flow for one in node.all_input_nodes):
                flow[node] = None
        return list(flow)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands that carry activations."""
        return [one for one in node.all_input_nodes if one in self.inside]

    def _cut_nodes(self) -> set[fx.Node]:
        """Return the nodes through which every path passes, by counting paths exactly."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        ends = {node for node in output.all_input_nodes if node in self.inside}
        before: dict[fx.Node, int] = {}
        for node in self.flow:
            operands = self._operands(node)
            before[node] = sum(before[one] for one in operands) if operands else 1
        after: dict[fx.Node, int] = {}
        for node in reversed(self.flow):
            after[node] = sum(after[one] for one in node.users if one in self.inside)
            after[node] += node in ends
        total = sum(before[node] for node in ends)
        return {node for node in self.flow if before[node] * after[node] == total}

    def _drafts(self) -> list[_Draft]:
        cuts = self._cut_nodes()
        drafts: list[_Draft] = []
        pending: list[fx.Node] = []  # glue that may belong to the next layer
        interior: list[fx.Node] = []
        previous: fx.Node | None = None  # the last cut node
        for node in self.flow:
            if node not in cuts:
                interior.append(node)
                continue
            if interior:
                drafts.append(
                    _Draft("residual_block", [*interior, node], previous, leading=pending)
                )
                interior, pending = [], []
            elif self._is_weighted(node):
                drafts.append(_Draft("chain", [node], previous, leading=pending))
                pending = []
            elif op_name(node) in _NORMS and (not drafts or drafts[-1].kind != "chain"):
                drafts.append(_Draft("norm", [node], previous, leading=pending))
                pending = []
            elif self._is_glue(node) or not drafts:
                pending.append(node)
            else:
                drafts[-1].nodes += [*pending, node]
                pending = []
            previous = node
        if interior:  # several outputs: nothing joins the last paths
            drafts.append(_Draft("residual_block", interior, previous, leading=pending))
        elif drafts:
            drafts[-1].trailing = pending
        return drafts

    def _side_nodes(self, owned: Mapping[fx.Node, int]) -> dict[int, list[fx.Node]]:
        """Give every node beside the flow that uses a parameter to the first layer that needs it."""
        owner = dict(owned)
        side: dict[int, list[fx.Node]] = {}
        for node in reversed(self.graph.nodes):
            if node.op != "call_function" or node in owned:
                continue
            users = [owner[user] for user in node.users if user in owner]
            if users:
                owner[node] = min(users)
                if self._parameters(node):
                    side.setdefault(owner[node], []).insert(0, node)
        return side

    def _is_weighted(self, node: fx.Node) -> bool:
        name = op_name(node)
        return name in _WEIGHTED or (name in _MATRIX_PRODUCTS and bool(self._parameters(node)))

    def _is_glue(self, node: fx.Node) -> bool:
        if self._parameters(node):
            return False
        return op_name(node) in _GLUE or "pool" in op_name(node) or "upsample" in op_name(node)

    def _parameters(self, node: fx.Node) -> list[str]:
        """Return the state entries that a node reads, also through views."""
        found = []
        for operand in node.all_input_nodes:
            if operand in self.sources:
                found.append(self.sources[operand])
            elif operand.op == "call_function" and operand.name not in self.channels.nodes:
                found += self._parameters(operand)
        return found

    # --- describing ----------------------------------------------------------------------------

    def _layer(self, index: int, name: str, draft: _Draft, side: Sequence[fx.Node]) -> Layer:
        nodes = sorted([*side, *draft.leading, *draft.nodes], key=self.order.__getitem__)
        output = draft.nodes[-1]
        channels = self.channels.nodes[output.name]
        shape = self.channels.shapes.get(output.name, ())
        insertable, last_write = self._insertable(draft)
        parameters: dict[str, None] = {}
        for node in [*nodes, *draft.trailing]:
            for parameter in self._parameters(node):
                parameters[parameter] = None
        return Layer(
            index,
            name,
            draft.kind,
            tuple(node.name for node in [*nodes, *draft.trailing]),
            output.name,
            self._structure(draft, side),
            tuple(parameters),
            tuple(self._hook_points(draft)),
            tuple(self._calibration_points(draft)),
            insertable,
            last_write,
            tuple(n for axis, n in enumerate(shape) if axis not in (0, channels.axis)),
        )

    def _name(self, draft: _Draft) -> str:
        if draft.kind != "residual_block":
            return module_path(draft.nodes[0]) or op_name(draft.nodes[0])
        paths = [
            module_path(node).split(".") for node in draft.nodes if self._is_weighted(node)
        ] or [module_path(draft.nodes[-1]).split(".")]
        common = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common) or op_name(draft.nodes[-1])

    def _structure(self, draft: _Draft, side: Sequence[fx.Node]) -> tuple[Any, ...]:
        """Describe operations, their settings and how they are wired, but no widths."""
        described = sorted([*side, *draft.nodes], key=self.order.__getitem__)
        place = {node: i for i, node in enumerate(described)}
        entries: list[Any] = [draft.kind]
        for node in described:
            wiring = []
            for operand in node.all_input_nodes:
                if operand in place:
                    wiring.append(str(place[operand]))
                elif operand is draft.entry:
                    wiring.append("entry")
                elif operand in self.sources:
                    wiring.append("parameter")
                elif operand.name in self.channels.nodes:
                    wiring.append("outside")
            entries.append(
                (op_name(node), self._settings(node), tuple(wiring), self._freedom(node))
            )
        return tuple(entries)

    def _settings(self, node: fx.Node) -> tuple[Any, ...]:
        name = op_name(node)
        if name in _CONVOLUTIONS:
            weight = self.state[self._parameters(node)[0]]
            bound = bound_operands(node)
            groups = bound["groups"]
            depthwise = groups > 1 and weight.size(1) == 1
            return (
                tuple(weight.shape[2:]),
                *(_frozen(bound[key]) for key in ("stride", "padding", "dilation")),
                "depthwise" if depthwise else groups,
            )
        if "pool" in name:
            return tuple(
                _frozen(value) for value in bound_operands(node).values() if not _is_node(value)
            )
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
        """Name the factor of attention scores by the size of the heads, which is a width."""
        if op_name(node) not in ("mul", "div") or not isinstance(value, float) or value <= 0:
            return value
        product = next(iter(self._operands(node)), node)
        if not self._is_contraction(product):  # not the scores, but what they are made of
            product = node
            while not self._is_contraction(product):
                users = list(product.users)
                if len(users) != 1 or not (product is node or self._is_glue(product)):
                    return value
                (product,) = users
        size = self.channels.shapes[product.all_input_nodes[0].name][-1]
        for power in (-0.5, 0.5, -0.25, 0.25):
            if math.isclose(value, size**power, rel_tol=1e-6):
                return f"head size to the power of {power}"
        return value

    def _is_contraction(self, node: fx.Node) -> bool:
        """Tell whether a node multiplies two activations as matrices."""
        return op_name(node) in _MATRIX_PRODUCTS and not self._parameters(node)

    def _freedom(self, node: fx.Node) -> tuple[bool, ...] | None:
        """Tell whether a weighted layer's inputs and outputs are free or fixed channels."""
        if not self._is_weighted(node):
            return None
        involved = [*self._operands(node), node]
        return tuple(self.channels.nodes[one.name].free for one in involved)

    # --- hook points ---------------------------------------------------------------------------

    def _hook_points(self, draft: _Draft) -> list[HookPoint]:
        points: dict[str, HookPoint] = {}
        readers: dict[str, set[tuple[int, int]]] = {}
        for place, node in enumerate(draft.nodes):
            if (
                self._is_weighted(node)
                or op_name(node) in _MATRIX_PRODUCTS
                or (op_name(node) == "scaled_dot_product_attention")
            ):
                for i, operand in enumerate(self._operands(node)):
                    point = self._hook_point(operand)
                    if point is not None:
                        points.setdefault(point.post, point)
                        readers.setdefault(point.post, set()).add((place, i))
        output = self._hook_point(draft.nodes[-1])
        if output is not None:
            points.pop(output.post, None)
            points[output.post] = output
            readers.setdefault(output.post, set()).add((len(draft.nodes), 0))
        return [replace(point, readers=frozenset(readers[post])) for post, point in points.items()]

    def _hook_point(self, node: fx.Node) -> HookPoint | None:
        """Walk from a layer's operand back to the activation that it reads.

        The walk ends where channels and inputs have axes of their own, and before it would change
        how many positions there are.
        """
        while (
            self._is_glue(node)
            and len(self._operands(node)) == 1
            and (
                self.channels.nodes[node.name].axis is None
                or op_name(node) in _SAME_VALUES
                or batch_axis(node) is None
            )
        ):
            node = self._operands(node)[0]
        channels = self.channels.nodes[node.name]
        if channels.axis in (None, batch_axis(node)) or not channels.free:
            return None
        pre = node
        before = self._operands(node)
        if len(before) == 1 and _is_pointwise(node) and not self._parameters(node):
            same = self.channels.nodes[before[0].name]
            if same.axis == channels.axis and torch.equal(same.groups, channels.groups):
                pre = before[0]
        shape = self.channels.shapes[node.name]
        batch = batch_axis(node)
        return HookPoint(
            node.name,
            pre.name,
            channels.axis,
            tuple(size for axis, size in enumerate(shape) if axis not in (batch, channels.axis)),
            channels.groups,
            channels.members,
            batch,
        )

    def _calibration_points(self, draft: _Draft) -> list[CalibrationPoint]:
        calibration_points = []
        for node in draft.nodes:
            name = op_name(node)
            if name not in ("batch_norm", "linear", "conv1d", "conv2d", "conv3d"):
                continue
            if len(node.users) == 1 and op_name(next(iter(node.users))) in _NORMS:
                continue  # the norm undoes any change here
            weight, bias = (
                self.sources.get(bound_operands(node).get(role)) for role in ("weight", "bias")
            )
            axis = self.channels.shapes[node.name]
            channel_axis = len(axis) - 1 if name == "linear" else 1
            if weight is None or self.state[weight].size(0) != axis[channel_axis]:
                continue
            channels = self.channels.nodes[node.name]
            if channels.free and channels.axis != channel_axis:
                continue
            fixed = torch.full((axis[channel_axis],), -1)
            affine: fx.Node | None = node
            if name == "batch_norm":
                (affine,) = self._operands(node) or (None,)
                if affine is not None and not (
                    self._is_weighted(affine) and len(affine.users) == 1
                ):
                    affine = None  # whoever else reads the layer would see it rescaled
            join, shortcut = self._join_of(node, affine or node)
            calibration_points.append(
                CalibrationPoint(
                    node.name,
                    None if affine is None else affine.name,
                    join,
                    shortcut,
                    channel_axis,
                    weight,
                    bias,
                    channels.groups if channels.free else fixed,
                    channels.members if channels.free else fixed,
                )
            )
        return calibration_points

    def _join_of(self, node: fx.Node, affine: fx.Node) -> tuple[str | None, str | None]:
        """Return the addition that takes a layer's output, and its other operand."""
        value = node
        while len(value.users) == 1 and op_name(next(iter(value.users))) in _SAME_VALUES:
            (value,) = value.users
        if len(value.users) != 1:
            return None, None
        (join,) = value.users
        others = [one for one in self._operands(join) if one is not value]
        if (
            op_name(join) != "add"
            or bound_operands(join).get("alpha", 1) != 1
            or len(others) != 1
            or self.channels.shapes[others[0].name] != self.channels.shapes[node.name]
            or self.order[others[0]] > self.order[affine]
        ):
            return None, None
        return join.name, others[0].name

    # --- insertion -----------------------------------------------------------------------------

    def _insertable(
        self, draft: _Draft
    ) -> tuple[Literal["identity", "zero"] | None, tuple[str, ...]]:
        if draft.kind == "chain" and self._can_be_identity(draft):
            return "identity", ()
        if draft.kind == "residual_block":
            last_write = self._last_write(draft)
            if last_write:
                return "zero", last_write
        return None, ()

    def _activated_alike(self, node: fx.Node | None, activations: Sequence[fx.Node]) -> bool:
        """Tell whether a value has already passed the activations that would follow it."""
        if not activations:
            return True
        if len({(op_name(one), self._settings(one)) for one in activations}) > 1:
            return False
        if op_name(activations[0]) not in _IDEMPOTENT:
            return False
        while node is not None and self._is_glue(node) and len(self._operands(node)) == 1:
            node = self._operands(node)[0]
        return node is not None and (op_name(node), self._settings(node)) == (
            op_name(activations[0]),
            self._settings(activations[0]),
        )

    def _can_be_identity(self, draft: _Draft) -> bool:
        affine, *rest = draft.nodes
        if rest and op_name(rest[0]) == "batch_norm":
            rest = rest[1:]
        operands = self._operands(affine)
        if len(operands) != 1 or not all(self._freedom(affine) or ()):
            return False
        before, after = (self.channels.nodes[one.name] for one in (operands[0], affine))
        if before.axis is None or before.axis != after.axis or bool((before.groups < 0).any()):
            return False
        if len(before.groups.unique()) > 1 or len(after.groups.unique()) > 1:
            return False
        if len(before.members.unique()) != len(before.members):
            return False  # several positions for each channel, as after a flatten
        if op_name(affine) in ("conv1d", "conv2d", "conv3d"):
            kernel, *_, groups = self._settings(affine)
            stride, padding, dilation = convolution_geometry(affine, kernel)
            same = all(
                2 * p == d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True)
            )
            odd = all(k % 2 == 1 for k in kernel)
            if not (same and odd and all(step == 1 for step in stride) and groups == 1):
                return False
        elif op_name(affine) != "linear":
            return False
        return self._activated_alike(operands[0], rest)

    def _last_write(self, draft: _Draft) -> tuple[str, ...]:
        """Return the parameters that silence a residual branch when they are zero."""
        joins = [node for node in draft.nodes if self._joins(node, draft)]
        if len(joins) != 1:
            return ()
        join = joins[0]
        after = draft.nodes[draft.nodes.index(join) + 1 :]
        if not self._activated_alike(draft.entry, after):
            return ()
        (node,) = (one for one in self._operands(join) if one is not draft.entry)
        while True:
            parameters = self._parameters(node)
            name = op_name(node)
            if parameters and self._is_weighted(node):
                return tuple(parameters)
            if parameters and name in _NORMS:
                bound = bound_operands(node)
                affine = (bound.get(role) for role in ("weight", "bias"))
                return tuple(self.sources[one] for one in affine if one in self.sources)
            operands = self._operands(node)
            if name == "mul" and parameters:
                return tuple(parameters)
            if len(operands) != 1 or not (self._is_glue(node) or name in _ZERO_AT_ZERO):
                return ()
            node = operands[0]

    def _joins(self, node: fx.Node, draft: _Draft) -> bool:
        operands = self._operands(node)
        return (
            op_name(node) == "add"
            and draft.entry is not None
            and len(operands) == 2
            and draft.entry in operands
            and bound_operands(node).get("alpha", 1) == 1
        )


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or op_name(node) in ("hardtanh", "relu6")
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
