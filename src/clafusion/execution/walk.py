"""Run exported graphs, as a whole or node by node, with weights from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from clafusion.execution.call import State, flatten_tensors
from clafusion.execution.channels_last import ChannelsLast, can_be_moved
from clafusion.execution.layouts import laid_out
from clafusion.execution.writes import written_inputs

__all__ = [
    "HALF_WIDER",
    "WIDER",
    "Executable",
    "PickedPositions",
    "RowState",
    "Walk",
    "in_lockstep",
    "run_graph",
    "run_widened",
]

_LARGE = 1 << 21  # elements: a weight of more is read by rows, from a state that can


class PickedPositions(Protocol):
    """At which positions of its inputs a network computes its last layer."""

    @property
    def node(self) -> str:
        """The node of the layer, which is linear."""
        ...

    @property
    def positions(self) -> int:
        """How many positions an input has."""
        ...

    @property
    def count(self) -> int:
        """At how many the layer is computed."""
        ...

    @property
    def thinned(self) -> frozenset[str]:
        """All nodes that have values at these positions only."""
        ...

    def index(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the positions of each input, ``(num_inputs, count)``."""
        ...


class Executable(Protocol):
    """An exported graph with the parameters as its first inputs, such as a traced model's."""

    @property
    def module(self) -> fx.GraphModule:
        """The graph."""
        ...

    @property
    def placeholders(self) -> tuple[str | None, ...]:
        """For each input of the graph the state entry that feeds it, or None for a model input."""
        ...

    @property
    def types(self) -> Mapping[torch.dtype, torch.dtype]:
        """Types to compute in, in place of those of the weights and of those the graph asks for."""
        ...

    @property
    def layouts(self) -> Mapping[str, tuple[int, ...]]:
        """State entries that do not lie in memory as usual, with their axes as they lie there."""
        ...

    @property
    def thinning(self) -> PickedPositions | None:
        """At which positions the last layer is computed; None for all."""
        ...


@runtime_checkable
class RowState(Protocol):
    """A state that can make some rows of a large tensor without making the whole."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        ...

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows ``rows``, a vector of indices, of a tensor."""
        ...


def run_graph(
    graph: Executable,
    inputs: tuple[Tensor, ...],
    state: State,
    replace: Callable[[fx.Node, Any], Any] | None = None,
) -> tuple[Any, ...]:
    """Return a graph's outputs in one flat tuple.

    Parameters
    ----------
    graph
        The graph.
    inputs
        The model's inputs.
    state
        Parameters, buffers and constants by name.
    replace
        Called as ``replace(node, value)`` for every node that computes, in order; the run goes on
        with what it returns.
    """
    return Walk(graph, inputs, state, set(), replace=replace).finish()


WIDER: Mapping[torch.dtype, torch.dtype] = dict.fromkeys(
    (torch.float32, torch.float16, torch.bfloat16), torch.float64
)
"""The types that a widened run replaces by float64."""

HALF_WIDER: Mapping[torch.dtype, torch.dtype] = dict.fromkeys(
    (torch.float16, torch.bfloat16), torch.float32
)
"""The types that are for weights in files; what is computed with them is in float32."""


def run_widened(
    graph: Executable, inputs: tuple[Tensor, ...], state: State
) -> tuple[tuple[Any, ...], bool]:
    """Return a graph's outputs in float64, and True; else, where it fixes a type, those of its own.

    Parameters are those of :func:`run_graph`.
    """
    try:
        return Walk(graph, inputs, state, set(), WIDER).finish(), True
    except RuntimeError:
        return run_graph(graph, inputs, state), False


def in_lockstep(walks: Sequence[Walk]) -> Iterator[fx.Node]:
    """Run several walks of one graph side by side; yield each node when all have run it."""
    for steps in zip(*walks, strict=True):
        yield steps[0]


class Walk:
    """A run of a graph that stops at any node, so that parameters can change on the way.

    Each node runs once. The walk drops a value when no later node needs it. It keeps the values
    named in ``keep`` until :meth:`release`, as their nodes made them, even if a later operation
    changes their memory in place. An operation that changes a parameter or a buffer in place
    changes a copy.

    Parameters
    ----------
    graph, inputs, state
        As for :func:`run_graph`. A node reads its parameters from ``state`` when it runs: the state
        may make them then. Of a :class:`RowState`, embeddings read the rows that they need, and
        linear layers read large weights in parts.
    keep
        Names of the nodes whose values stay; the walk removes the released ones from this set.
    types
        Types to compute in, in place of those of inputs, weights and graph; default the graph's.
    replace
        As for :func:`run_graph`.
    fastest
        Whether values may lie in memory otherwise than the model makes them, where that is faster:
        see :mod:`clafusion.execution.channels_last`.
    """

    def __init__(
        self,
        graph: Executable,
        inputs: tuple[Tensor, ...],
        state: State,
        keep: set[str],
        types: Mapping[torch.dtype, torch.dtype] | None = None,
        replace: Callable[[fx.Node, Any], Any] | None = None,
        *,
        fastest: bool = False,
    ) -> None:
        self._module = graph.module
        self._replace = replace
        self._state = state
        self._rows = state if isinstance(state, RowState) else None
        self._keep = keep
        self._types = graph.types if types is None else types
        self._layouts = graph.layouts
        self._values: dict[fx.Node, Any] = {}
        may_move = fastest and not self._types and not self._layouts and can_be_moved(graph.module)
        self._order = ChannelsLast(self._values) if may_move else None
        self._spared: dict[str, Tensor] = {}
        self._skipped: set[fx.Node] = set()
        self._parameters: dict[fx.Node, str] = {}
        self._by_name: dict[str, fx.Node] = {}
        nodes = list(graph.module.graph.nodes)
        feed = iter(inputs)
        names = iter(graph.placeholders)
        written = written_inputs(graph.module)
        for node in nodes:
            self._by_name[node.name] = node
            if node.op != "placeholder":
                continue
            name = next(names)
            if name is None:
                self._values[node] = self._computed(next(feed))
            elif node.name in written:
                value = self._weight(name)
                self._values[node] = value.clone() if value is state[name] else value
            else:
                self._parameters[node] = name
        self._thinned: fx.Node | None = None
        if graph.thinning is not None:
            self._thinned = self._by_name[graph.thinning.node]
            self._picked = graph.thinning.index(inputs)
        self._rest = iter([node for node in nodes if node.op in ("get_attr", "call_function")])
        self._pending = {node: len(node.users) for node in nodes}

    def reach(self, name: str) -> Any:
        """Run all nodes up to a node that have not run yet; return its value."""
        if name in self._spared:
            return self._spared[name]
        wanted = self._by_name[name]
        while wanted not in self._values:
            self._step(next(self._rest))
        return self._values[wanted]

    def reach_for(self, name: str, reader: str) -> Any:
        """Return what :meth:`reach` does, as the node ``reader`` reads it: perhaps in part."""
        value = self.reach(name)
        return self._pick(value) if self._is_thinned(self._by_name[reader]) else value

    def __iter__(self) -> Iterator[fx.Node]:
        """Run the nodes that have not run yet, one by one."""
        for node in self._rest:
            self._step(node)
            yield node

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node that has run, or None where it is dropped."""
        return self._values.get(node)

    def finish(self) -> tuple[Any, ...]:
        """Run all nodes that have not run yet; return the graph's outputs in one flat tuple.

        Of the values only those stay that are kept.
        """
        for node in self._rest:
            self._step(node)
        outputs = tuple(fx.map_arg(self._module.graph.output_node().args[0], self._value))
        for node in [node for node in self._values if node.name not in self._keep]:
            del self._values[node]
        return outputs

    def output_tensors(self) -> list[Tensor]:
        """Do what :meth:`finish` does; return those outputs that are tensors, in order."""
        return list(flatten_tensors(list(self.finish())))

    def before(self, last: Collection[str]) -> Iterator[fx.Node]:
        """Run the nodes that have not run yet but those of some names; yield each when it has run.

        No other node may read those.
        """
        left = []
        for node in self._rest:
            if node.name in last:
                left.append(node)
            else:
                self._step(node)
                yield node
        self._rest = iter(left)

    def known_outputs(self) -> list[Any]:
        """Return those of the graph's outputs whose nodes have run."""
        leaves = pytree.tree_leaves(self._module.graph.output_node().args[0])
        nodes = [one for one in leaves if isinstance(one, fx.Node)]
        return [self._values[node] for node in nodes if node in self._values]

    def rows_of(
        self,
        layer: str,
        following: Sequence[str],
        rows: Tensor,
        positions: Tensor | None = None,
    ) -> list[Tensor]:
        """Return some channels of the outputs that come of a linear layer, which has not run.

        Parameters
        ----------
        layer
            The layer's node; what it reads has run.
        following
            The nodes that come of it, which do the same to every channel.
        rows
            The channels: rows of its weight.
        positions
            Where on the second axis of what the layer reads; None for all of it.
        """
        node = self._by_name[layer]
        inputs, weight, *bias = node.args
        name = self._parameters.get(weight) if isinstance(weight, fx.Node) else None
        if name is not None and self._rows is not None:
            part = self._computed(self._rows.rows(name, rows))
        else:
            part = self._value(weight)[rows]
        of_rows = (None if one is None else self._value(one)[rows] for one in bias)
        read = self._value(inputs)
        read = read if positions is None else read[:, positions.to(read.device)]
        made: dict[Any, Any] = {node: F.linear(read, part, *of_rows)}
        for one in map(self._by_name.__getitem__, following):
            arguments, keywords = fx.map_arg(
                (one.args, one.kwargs), lambda n: made[n] if n in made else self._value(n)
            )
            arguments, keywords = pytree.tree_map(self._retyped, (arguments, keywords))
            target: Any = one.target
            made[one] = target(*arguments, **keywords)
        leaves = pytree.tree_leaves(self._module.graph.output_node().args[0])
        return [made[one] for one in leaves if isinstance(one, fx.Node) and one in made]

    def release(self, name: str) -> None:
        """Stop keeping a node's value; drop it unless a later node needs it."""
        self._keep.discard(name)
        self._spared.pop(name, None)
        self._drop(self._by_name[name])

    def supply(self, name: str, value: Any, instead_of: Collection[str], like: str) -> None:
        """Give a node's value. The nodes ``instead_of``, ``name`` among them, do not run.

        It lies in memory as the value of the node ``like`` does.
        """
        node = self._by_name[name]
        self._values[node] = value
        self._skipped.update(self._by_name[one] for one in instead_of)
        if self._order is not None:
            self._order.supplied(node, self._by_name[like])

    def forget(self, name: str) -> None:
        """Drop a node's value although later nodes read it, which cannot run then."""
        self._keep.discard(name)
        self._spared.pop(name, None)
        self._values.pop(self._by_name[name], None)

    def _is_thinned(self, node: fx.Node) -> bool:
        return self._thinned is not None and node is self._thinned

    def _pick(self, value: Tensor) -> Tensor:
        """Return what the thinned layer reads."""
        index = self._picked.to(value.device)
        return value.gather(1, index[..., None].expand(-1, -1, value.size(-1)))

    def _step(self, node: fx.Node) -> None:
        if node not in self._skipped:
            self._compute(node)
        for operand in node.all_input_nodes:
            self._pending[operand] -= 1
            self._drop(operand)

    def _compute(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = getattr(self._module, str(node.target))
            self._values[node] = self._computed(value) if isinstance(value, Tensor) else value
            return
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            self._spare(node)
        value = self._by_rows(node) if self._rows is not None else None
        if value is None:
            formats = {} if self._order is None else self._order.formats(node)

            def laid_out_value(one: fx.Node) -> Any:
                found = self._value(one)
                return found.contiguous(memory_format=formats[one]) if one in formats else found

            read = laid_out_value if formats else self._value
            arguments, keywords = fx.map_arg((node.args, node.kwargs), read)
            if self._is_thinned(node):
                arguments = (self._pick(arguments[0]), *arguments[1:])
            if self._types:
                arguments, keywords = pytree.tree_map(self._retyped, (arguments, keywords))
            value = target(*arguments, **keywords)
            if self._order is not None:
                self._order.made(node, value, formats)
        self._values[node] = value if self._replace is None else self._replace(node, value)

    def _weight(self, name: str) -> Tensor:
        """Return a weight in the type to compute in, laid out as the model's own."""
        value = self._computed(self._state[name])
        axes = self._layouts.get(name)
        return value if axes is None else laid_out(value, axes)

    def _computed(self, value: Tensor) -> Tensor:
        """Return an input or a weight in the type to compute in."""
        return value.to(self._types.get(value.dtype, value.dtype))

    def _retyped(self, value: Any) -> Any:
        """Return a value as it is, but in place of a type the one to compute in."""
        return self._types.get(value, value) if isinstance(value, torch.dtype) else value

    def _by_rows(self, node: fx.Node) -> Tensor | None:
        """Compute what reads a large weight from its rows; None for all other nodes."""
        table = _ROWS_READ.get(node.target)
        weight = node.args[table] if table is not None and len(node.args) > table else None
        name = self._parameters.get(weight) if isinstance(weight, fx.Node) else None
        if name is None or self._rows is None:
            return None
        shape = self._rows.shape(name)
        if len(shape) != 2 or shape[0] * shape[1] <= _LARGE:
            return None
        if table == 0:  # an embedding: what else it is given changes its gradients only
            indices = self._value(node.args[1])
            wanted, places = indices.unique(return_inverse=True)
            return F.embedding(places, self._computed(self._rows.rows(name, wanted)))
        inputs, *bias = [self._value(one) for i, one in enumerate(node.args) if i != 1]
        if self._is_thinned(node):
            inputs = self._pick(inputs)
        count = max(_LARGE // shape[1], 1)
        result: Tensor = inputs.new_empty(*inputs.shape[:-1], shape[0])
        for rows in torch.arange(shape[0], device=inputs.device).split(count):
            of_rows = (None if one is None else one[rows] for one in bias)
            part = self._computed(self._rows.rows(name, rows))
            result[..., rows[0] : rows[-1] + 1] = F.linear(inputs, part, *of_rows)
        return result

    def _spare(self, node: fx.Node) -> None:
        """Copy the kept values that share memory with an operand of ``node``, which changes it."""
        touched = {
            value.untyped_storage().data_ptr()
            for operand in node.all_input_nodes
            if isinstance(value := self._value(operand), Tensor)
        }
        for name in self._keep - self._spared.keys():
            value = self._values.get(self._by_name[name])
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in touched:
                self._spared[name] = value.clone()

    def _value(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        name = self._parameters.get(node)
        return self._values[node] if name is None else self._weight(name)

    def _drop(self, node: fx.Node) -> None:
        if self._pending[node] == 0 and node.name not in self._keep:
            self._values.pop(node, None)


_ROWS_READ: Mapping[Any, int] = {
    torch.ops.aten.embedding.default: 0,
    torch.ops.aten.linear.default: 1,
}
"""Operations that can read a weight row by row, with its place among their arguments."""
