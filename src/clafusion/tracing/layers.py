"""Exported graph + channels -> the layers that can be matched, inserted or removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from clafusion.execution.call import State
from clafusion.tracing.cuts import cut_into_drafts, side_nodes
from clafusion.tracing.drafts import Draft
from clafusion.tracing.fixed_values import Constant, FixedValues
from clafusion.tracing.flow import Flow
from clafusion.tracing.groups import Channels
from clafusion.tracing.insertion import insertion
from clafusion.tracing.layer import Layer, common_path
from clafusion.tracing.operations import RESHAPES, module_path, op_name, rows_kind
from clafusion.tracing.points import calibration_points, hook_points

__all__ = ["find_layers"]


def find_layers(
    module: fx.GraphModule,
    placeholders: Sequence[str | None],
    state: State,
    channels: Channels,
    buffers: frozenset[str],
) -> tuple[Layer, ...]:
    """Return the layers of an exported graph, in topological order, stream after stream.

    Parameters
    ----------
    module, placeholders, state, buffers
        As for :func:`clafusion.tracing.groups.find_channels`.
    channels
        What it returned.
    """
    flow = Flow(module, placeholders, state, channels)
    fixed = FixedValues(flow, module, buffers - flow.statistics)
    drafts = cut_into_drafts(flow)
    streams = _Streams(flow, drafts)
    side = side_nodes(flow, drafts)
    counts: dict[str, int] = {}
    layers = []
    for i, draft in enumerate(drafts):
        name = _name(flow, draft)
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            name = f"{name}#{counts[name]}"
        layers.append(_layer(flow, fixed, streams, i, name, draft, side.get(i, [])))
    return tuple(layers)


class _Streams:
    """Which node of a graph lies on which stream."""

    def __init__(self, flow: Flow, drafts: Sequence[Draft]) -> None:
        self._flow = flow
        self._of = {
            node: draft.stream
            for draft in drafts
            for node in (*draft.leading, *draft.nodes, *draft.trailing)
        }
        self._inside = {node: i for i, draft in enumerate(drafts) for node in draft.nodes[:-1]}
        self._lenders: dict[int, int] = {}
        self._numbers = list(dict.fromkeys(draft.stream for draft in drafts))

    def of(self, node: fx.Node) -> int | None:
        """Return the number of a node's stream."""
        return self._of.get(node)

    def position(self, stream: int) -> int:
        """Return a stream's position among all streams that have layers."""
        return self._numbers.index(stream)

    def lender(self, index: int, nodes: Sequence[fx.Node]) -> int:
        """Return the first layer of those that share a value within them with a layer."""
        lenders = [
            self._lenders[owner]
            for node in nodes
            for operand in node.all_input_nodes
            if (owner := self._inside.get(operand, index)) < index
        ]
        self._lenders[index] = min(lenders, default=index)
        return self._lenders[index]

    def inputs(self, draft: Draft, nodes: Sequence[fx.Node]) -> tuple[int | str, ...]:
        """Return the other streams and inputs of the model that a draft's nodes read."""
        if len(self._numbers) == 1:
            return ()
        found: dict[int | str, None] = {}
        for operand in (one for node in nodes for one in node.all_input_nodes):
            stream = self._of.get(operand)
            if stream is not None and stream != draft.stream:
                found[self.position(stream)] = None
            elif operand in self._flow.inputs:
                found[f"input {self._flow.inputs.index(operand)}"] = None
        return tuple(found)


def _layer(
    flow: Flow,
    fixed: FixedValues,
    streams: _Streams,
    index: int,
    name: str,
    draft: Draft,
    side: Sequence[fx.Node],
) -> Layer:
    before = sorted([*side, *draft.leading, *draft.nodes], key=flow.order.__getitem__)
    nodes = [*before, *draft.trailing]
    output = draft.nodes[-1]
    found = insertion(flow, draft)
    structure, beside = _structure(flow, fixed, streams, draft, side)
    parameters = dict.fromkeys(entry for node in nodes for entry in flow.parameters(node))
    return Layer(
        index,
        name,
        draft.kind,
        tuple(node.name for node in nodes),
        output.name,
        structure,
        beside,
        tuple(node.name for node in draft.leading),
        tuple(
            _glue(flow, node)
            for node in [*draft.leading, *draft.trailing]
            if op_name(node) not in RESHAPES
        ),
        tuple(parameters),
        hook_points(flow, draft),
        calibration_points(flow, draft),
        found.insertable,
        found.last_write,
        flow.positions(output),
        found.obstacle,
        found.fillings,
        streams.position(draft.stream),
        streams.lender(index, nodes),
        streams.inputs(draft, nodes),
        rows_kind(output),
        found.mixes_nodes,
    )


def _glue(flow: Flow, node: fx.Node) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Describe an operation between layers; means over the same axes are alike however written."""
    name, settings = op_name(node), flow.settings(node)
    shape = flow.channels.shapes.get(node.all_input_nodes[0].name) if node.all_input_nodes else None
    given = dict(settings)
    axes: Sequence[int] | None = None
    if name == "mean" and shape is not None:
        dim = given.get("dim")
        axes = [dim] if isinstance(dim, int) else dim
    elif name.startswith("adaptive_avg_pool") and set(given.get("output_size", ())) == {1}:
        axes = range(-len(given["output_size"]), 0)
    if axes is None or shape is None:
        return name, settings
    return "mean", (("dim", tuple(sorted(axis % len(shape) - len(shape) for axis in axes))),)


def _name(flow: Flow, draft: Draft) -> str:
    """Return the module path that all weighted nodes of a layer have in common."""
    if draft.kind != "residual_block":
        return module_path(draft.nodes[0]) or op_name(draft.nodes[0])
    paths = [module_path(node) for node in draft.nodes if flow.is_weighted(node)]
    return common_path(paths or [module_path(draft.nodes[-1])]) or op_name(draft.nodes[-1])


def _structure(
    flow: Flow, fixed: FixedValues, streams: _Streams, draft: Draft, side: Sequence[fx.Node]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Describe operations, their settings and how they are wired, but no widths.

    And, in the same way, the operations beside the flow whose results they read.
    """
    own = sorted([*side, *draft.nodes], key=flow.order.__getitem__)
    beside = fixed.before(own)
    place = {node: str(i) for i, node in enumerate(own)}
    place |= {node: f"beside {i}" for i, node in enumerate(beside)}
    if draft.norm is not None:
        behind = (one for one in draft.leading if flow.order[one] > flow.order[draft.norm])
        place |= dict.fromkeys(behind, place[draft.norm])

    def described(node: fx.Node) -> tuple[Any, ...]:
        wiring = tuple(
            _wire(flow, fixed, streams, draft, place, one) for one in node.all_input_nodes
        )
        return op_name(node), flow.settings(node), wiring, flow.freedom(node)

    return (draft.kind, *map(described, own)), tuple(map(described, beside))


def _wire(
    flow: Flow,
    fixed: FixedValues,
    streams: _Streams,
    draft: Draft,
    place: Mapping[fx.Node, str],
    operand: fx.Node,
) -> str | Constant:
    """Say where an operand comes from."""
    if operand in place:
        return place[operand]
    if operand is draft.entry:
        return "entry"
    constant = fixed.constant(operand)
    if constant is not None:
        return constant
    if operand.op == "placeholder" and operand not in flow.sources:
        return f"input {flow.inputs.index(operand)}"
    if operand in flow:
        other = streams.of(operand)
        return "outside" if other in (None, draft.stream) else f"stream {streams.position(other)}"
    return "size" if operand.name not in flow.channels.shapes else "parameter"
