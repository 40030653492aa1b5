"""Inputs that are graphs: which of them have a row for each node, edge or graph; small examples.

A graph network takes the nodes' features ``x``, the edges as pairs of nodes ``edge_index``
``(2, num_edges)``, and beside them what else nodes, edges or graphs have. ``batch`` says of each
node to which of several graphs it belongs. Nothing of that can be cut to the first rows, for
indices point beyond. Whole graphs can be taken out, or some nodes with the edges between them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from clafusion.errors import InputError

__all__ = [
    "BATCH",
    "EDGES",
    "GraphInputs",
    "counts_traced",
    "example_of_graph",
    "graph_inputs",
    "mark_rows",
    "named_graph",
    "samples_of_nodes",
    "with_other_size",
]

EDGES = "edge_index"
"""What graph networks call their edges: by this input they are known."""

BATCH = "batch"
"""What they call the number of the graph that each node belongs to."""

Kind = Literal["nodes", "edges", "index", "graphs"]

_NODES = 48  # of an example: few, for labels are as large as activations
_GRAPHS = 3
_OF_NODES = ("x", BATCH, "pos", "z", "node_attr")  # whose first axis tells how many nodes there are


@dataclass(frozen=True)
class GraphInputs:
    """What each of a graph network's inputs has rows for.

    Attributes
    ----------
    names
        The inputs' names. The first one has a row for each node.
    kinds
        ``"nodes"``, ``"edges"`` or ``"graphs"``: of what each has rows; ``"index"`` for the edges
        themselves, ``(2, num_edges)``.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]

    def place(self, name: str) -> int | None:
        """Return which input has a name; None for none."""
        return self.names.index(name) if name in self.names else None

    def edges(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the edges ``(2, num_edges)``."""
        return inputs[self.names.index(EDGES)]

    def membership(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return to which graph each node belongs, ``(num_nodes,)``."""
        place = self.place(BATCH)
        if place is None:
            return self.edges(inputs).new_zeros(inputs[0].size(0))
        return inputs[place]

    def num_graphs(self, inputs: Sequence[Tensor]) -> int:
        """Return how many graphs there are: 1 where no input says which node is of which."""
        place = self.place(BATCH)
        return 1 if place is None else int(inputs[place].max()) + 1

    def rows_of(self, inputs: Sequence[Tensor], kind: Kind) -> int:
        """Return how many rows inputs of a kind have."""
        if kind == "nodes":
            return inputs[0].size(0)
        return self.num_graphs(inputs) if kind == "graphs" else self.edges(inputs).size(1)

    def checked(self, inputs: Sequence[Tensor], where: str) -> None:
        """Refuse inputs that are no graph.

        Raises
        ------
        InputError
            An edge points beyond the nodes, or an input has other rows than its kind has.
        """
        edges, nodes = self.edges(inputs), inputs[0].size(0)
        if edges.dim() != 2 or edges.size(0) != 2 or edges.dtype != torch.int64:
            raise InputError(
                f"{where}{EDGES!r} must hold pairs of nodes, int64 of shape (2, num_edges); got "
                f"{edges.dtype} of shape {tuple(edges.shape)}"
            )
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < nodes:
            beyond = int(edges.max()) if int(edges.max()) >= nodes else int(edges.min())
            raise InputError(
                f"{where}{EDGES!r} names the node {beyond}, but there are {nodes} nodes "
                f"({self.names[0]!r} has so many rows), from 0 on: an edge must not point beyond. "
                "Of several graphs in one batch, the numbers of the later ones must go on from "
                "those before, as a loader of torch_geometric makes them"
            )
        if BATCH in self.names:
            self._check_membership(self.membership(inputs), nodes, where)
        for name, kind, value in zip(self.names, self.kinds, inputs, strict=True):
            count = self.rows_of(inputs, kind)
            if kind != "index" and (value.dim() == 0 or value.size(0) != count):
                raise InputError(
                    f"{where}{name!r} has the shape {tuple(value.shape)}, but must have a row for "
                    f"each of the {count} {kind}"
                )

    def _check_membership(self, of_node: Tensor, nodes: int, where: str) -> None:
        is_known = of_node.dtype == torch.int64 and tuple(of_node.shape) == (nodes,)
        if not is_known or int(of_node[0]) != 0 or bool((of_node.diff() < 0).any()):
            raise InputError(
                f"{where}{BATCH!r} must be the number of each node's graph, int64 of shape "
                f"({nodes},), in order and from 0 on; got {of_node.dtype} of shape "
                f"{tuple(of_node.shape)}"
            )

    def taken(self, inputs: Sequence[Tensor], nodes: Tensor, graphs: Tensor) -> list[Tensor]:
        """Return some nodes with the edges between them, and their graphs, as inputs.

        Parameters
        ----------
        inputs
            The inputs.
        nodes, graphs
            Masks: which nodes are taken, and which graphs.
        """
        edges = self.edges(inputs)
        kept = nodes[edges[0]] & nodes[edges[1]]
        found = []
        for name, kind, value in zip(self.names, self.kinds, inputs, strict=True):
            if kind == "index":
                found.append((nodes.cumsum(0) - 1)[value[:, kept]])
            elif name == BATCH:
                found.append((graphs.long().cumsum(0) - 1)[value[nodes]])
            else:
                found.append(value[{"nodes": nodes, "edges": kept, "graphs": graphs}[kind]])
        return found


def named_graph(model: nn.Module, inputs: Any) -> dict[str, Any] | None:
    """Return inputs by the names in a network's forward, where they are a graph; else None.

    They come by name, or by position, or as ``Data`` of torch_geometric, also several. What is None
    is left out.
    """
    inputs = _of_library(model, inputs)
    if isinstance(inputs, (tuple, list)):
        inputs = dict(zip(inspect.signature(model.forward).parameters, inputs, strict=False))
    if not isinstance(inputs, Mapping) or EDGES not in inputs:
        return None
    return {name: one for name, one in inputs.items() if one is not None}


def _of_library(model: nn.Module, inputs: Any) -> Any:
    """Return ``Data`` of torch_geometric, or a list of it, as the inputs that a forward names."""
    library = sys.modules.get("torch_geometric.data")
    if library is None:
        return inputs
    if isinstance(inputs, (tuple, list)) and inputs:
        if not all(isinstance(one, library.Data) for one in inputs):
            return inputs
        inputs = inputs[0] if len(inputs) == 1 else library.Batch.from_data_list(list(inputs))
    if not isinstance(inputs, library.Data):
        return inputs
    found = {name: one for name, one in inputs.to_dict().items() if isinstance(one, Tensor)}
    if BATCH not in found and EDGES in found:
        found[BATCH] = found[EDGES].new_zeros(inputs.num_nodes)
    known = getattr(model, "__signature__", None) or inspect.signature(model.forward)
    return {name: one for name, one in found.items() if name in known.parameters}


def graph_inputs(inputs: Mapping[str, Tensor], where: str = "") -> GraphInputs | None:
    """Return what each of some inputs has rows for; None where they are no graph.

    A graph has an input that is called ``edge_index``. What is called ``edge_...`` has a row for
    each edge. Of others the number of rows tells.

    Raises
    ------
    InputError
        The inputs are no graph although they have edges: see :meth:`GraphInputs.checked`.
    """
    if EDGES not in inputs:
        return None
    ordered = _nodes_first(inputs, where)
    nodes = next(iter(ordered.values())).size(0)
    edges = ordered[EDGES]
    many = edges.size(-1) if edges.dim() else 0
    kinds: list[Kind] = []
    for name, value in ordered.items():
        if name == EDGES:
            kinds.append("index")
        elif name.startswith("edge_"):
            kinds.append("edges")
        elif name in _OF_NODES or (value.dim() and value.size(0) == nodes):
            kinds.append("nodes")
        else:
            kinds.append("edges" if value.dim() and value.size(0) == many else "graphs")
    found = GraphInputs(tuple(ordered), tuple(kinds))
    found.checked(list(ordered.values()), where)
    return found


def _nodes_first(inputs: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return inputs in an order in which the first one has a row for each node."""
    known = [name for name in _OF_NODES if name in inputs]
    known += [name for name in inputs if not name.startswith("edge_")]
    if not known:
        raise InputError(
            f"{where}{EDGES!r} comes without nodes: give their features, 'x', with a row for each "
            "node"
        )
    first = inputs[known[0]]
    if first.dim() == 0 or first.size(0) == 0:
        raise InputError(f"{where}{known[0]!r} must have a row for each node; it has none")
    return {known[0]: first, **inputs}


def example_of_graph(given: GraphInputs, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return a small graph of the same kind to trace a network with.

    Of several graphs some are taken, of one graph some nodes with the edges between them. Numbers
    of nodes, edges and graphs all differ, and none is 1, which is special to torch.export.

    Raises
    ------
    InputError
        The graph has no edges.
    """
    if given.edges(inputs).size(1) == 0:
        raise InputError(
            f"{EDGES!r} of the example is empty: a graph network is traced along edges. Give a "
            "graph, or a batch of several graphs, of which some nodes are joined"
        )
    if BATCH in given.names and given.num_graphs(inputs) == 1:
        inputs = _twice(given, inputs)
    inputs = _few_graphs(given, inputs)
    if inputs[0].size(0) > _NODES:
        inputs = _few_nodes(given, inputs)
    counts = {inputs[0].size(0), given.num_graphs(inputs), 1}
    while given.edges(inputs).size(1) in counts:
        inputs = _with_edge_again(given, inputs)
    return tuple(inputs)


def with_other_size(given: GraphInputs, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return a graph with one edge more, the first one again, and one node more, the last again."""
    found = []
    for kind, value in zip(given.kinds, inputs, strict=True):
        found.append(torch.cat([value, value[-1:]]) if kind == "nodes" else value)
    return tuple(_with_edge_again(given, found))


def _with_edge_again(given: GraphInputs, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = []
    for kind, value in zip(given.kinds, inputs, strict=True):
        if kind == "index":
            value = torch.cat([value, value[:, :1]], 1)
        found.append(torch.cat([value, value[:1]]) if kind == "edges" else value)
    return found


def _twice(given: GraphInputs, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return a graph beside itself."""
    nodes = inputs[0].size(0)
    found = []
    for name, kind, value in zip(given.names, given.kinds, inputs, strict=True):
        more = value + (nodes if kind == "index" else 1 if name == BATCH else 0)
        found.append(torch.cat([value, more], 1 if kind == "index" else 0))
    return found


def _few_graphs(given: GraphInputs, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the first graphs of many, some of which have edges."""
    count = given.num_graphs(inputs)
    if count <= _GRAPHS:
        return inputs
    of_node = given.membership(inputs)
    joined = of_node[given.edges(inputs)[0]].unique()
    first = int(joined[0])
    graphs = torch.zeros(count, dtype=torch.bool, device=of_node.device)
    start = min(first, count - _GRAPHS)
    graphs[start : start + _GRAPHS] = True
    return given.taken(inputs, graphs[of_node], graphs)


def _few_nodes(given: GraphInputs, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return those nodes of each graph that its first edges join, and the edges between them."""
    of_node, edges = given.membership(inputs), given.edges(inputs)
    count = given.num_graphs(inputs)
    nodes = torch.zeros(len(of_node), dtype=torch.bool, device=of_node.device)
    for graph in range(count):
        own = edges[:, of_node[edges[0]] == graph]
        nodes[own[:, : max(_NODES // (2 * count), 2)].flatten()] = True
        nodes[(of_node == graph).nonzero()[:1]] = True  # a graph without edges stays one
    return given.taken(inputs, nodes, torch.ones(count, dtype=torch.bool, device=of_node.device))


# --- rows of values -----------------------------------------------------------------------------


def mark_rows(
    graph: fx.Graph, given: GraphInputs, inputs: Sequence[Tensor], values: Mapping[fx.Node, Any]
) -> None:
    """Note in each node of an exported graph along which axis it has rows, and of what.

    Parameters
    ----------
    graph
        The exported graph; ``meta["rows"]`` of its nodes becomes the axis and the kind.
    given, inputs
        The inputs of a run.
    values
        What the nodes had in that run.
    """
    kinds = {1: "graphs", given.num_graphs(inputs): "graphs", inputs[0].size(0): "nodes"}
    for node in graph.nodes:
        value = values.get(node)
        value = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(value, Tensor) and value.dim():
            shown = node.meta["val"]
            shown = shown[0] if isinstance(shown, (tuple, list)) else shown
            free = [axis for axis, size in enumerate(shown.shape) if not isinstance(size, int)]
            axis = free[0] if free else 0
            node.meta["rows"] = axis, kinds.get(value.size(axis), "edges")


def samples_of_nodes(
    rows: Tensor, kind: str, given: GraphInputs, inputs: Sequence[Tensor]
) -> Tensor:
    """Return a sample for each node of rows ``(num_rows, ...)`` of nodes, graphs or edges.

    Of a graph all its nodes have the row. Those of edges, to which a network may add loops of its
    own, are added up, each to the node whose number is its own modulo that of the nodes: as many
    sums for every network, in which each row takes part.
    """
    nodes = inputs[0].size(0)
    if kind == "nodes":
        return rows
    if kind == "graphs":
        return (
            rows[given.membership(inputs)] if len(rows) > 1 else rows.expand(nodes, *rows.shape[1:])
        )
    into = torch.arange(len(rows), device=rows.device) % nodes
    return rows.new_zeros(nodes, *rows.shape[1:]).index_add_(0, into, rows)


# --- what torch.export needs --------------------------------------------------------------------


class _MeansInt(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)


class _TracedInt(int, metaclass=_MeansInt):
    """What ``int`` is while a network is exported: of a tensor it returns a symbol.

    The built-in one asks for the number itself, so that ``int(batch.max()) + 1``, how many graphs
    there are, could not be exported.
    """

    def __new__(cls, value: Any = 0, *args: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_floating_point():
            return value.item()
        return int(value, *args)


@contextmanager
def counts_traced(model: nn.Module) -> Iterator[None]:
    """Let torch.export follow how a graph network's code counts graphs and nodes, for a while.

    That is the code of torch_geometric and of the network's own modules.
    """
    own = {type(one).__module__ for one in model.modules()}
    changed: list[ModuleType] = []
    try:
        for name, module in list(sys.modules.items()):
            package = name.partition(".")[0]
            is_concerned = package == "torch_geometric" or (name in own and package != "torch")
            if is_concerned and "int" not in vars(module):
                vars(module)["int"] = _TracedInt
                changed.append(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("int", None)
