"""Run exported graphs as a whole or node by node, with weights from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from clafusion.execution.call import State

__all__ = ["Executable", "Walk", "run_graph"]


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
        Called as ``replace(node, value)`` for every node, in order; the run goes on with what it
        returns.
    """
    feed = iter(inputs)
    arguments = [next(feed) if name is None else state[name] for name in graph.placeholders]
    outputs = _Executor(graph.module, replace).run(*arguments, enable_io_processing=False)
    return tuple(outputs)


class Walk:
    """A run of a graph that stops at any node, so that parameters can change on the way.

    Each node runs once. The walk drops a value when no later node needs it. It keeps the values
    named in ``keep`` until :meth:`release`, as their nodes made them, even if a later operation
    changes their memory in place.

    Parameters
    ----------
    graph, inputs, state
        As for :func:`run_graph`. A node reads its parameters from ``state`` when it runs.
    keep
        Names of the nodes whose values stay; the walk removes the released ones from this set.
    """

    def __init__(
        self, graph: Executable, inputs: tuple[Tensor, ...], state: State, keep: set[str]
    ) -> None:
        self._module = graph.module
        self._state = state
        self._keep = keep
        self._values: dict[fx.Node, Any] = {}
        self._spared: dict[str, Tensor] = {}
        self._parameters: dict[fx.Node, str] = {}
        self._by_name: dict[str, fx.Node] = {}
        nodes = list(graph.module.graph.nodes)
        feed = iter(inputs)
        names = iter(graph.placeholders)
        for node in nodes:
            self._by_name[node.name] = node
            if node.op == "placeholder":
                name = next(names)
                if name is None:
                    self._values[node] = next(feed)
                else:
                    self._parameters[node] = name
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

    def finish(self) -> tuple[Any, ...]:
        """Run all nodes that have not run yet; return the graph's outputs in one flat tuple."""
        for node in self._rest:
            self._step(node)
        outputs = fx.map_arg(self._module.graph.output_node().args[0], self._value)
        return tuple(outputs)

    def release(self, name: str) -> None:
        """Stop keeping a node's value; drop it unless a later node needs it."""
        self._keep.discard(name)
        self._spared.pop(name, None)
        self._drop(self._by_name[name])

    def _step(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._values[node] = getattr(self._module, str(node.target))
            return
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            self._spare(node)
        arguments, keywords = fx.map_arg((node.args, node.kwargs), self._value)
        self._values[node] = target(*arguments, **keywords)
        for operand in node.all_input_nodes:
            self._pending[operand] -= 1
            self._drop(operand)

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

    def _value(self, node: fx.Node) -> Any:
        name = self._parameters.get(node)
        return self._values[node] if name is None else self._state[name]

    def _drop(self, node: fx.Node) -> None:
        if self._pending[node] == 0 and node.name not in self._keep:
            self._values.pop(node, None)


class _Executor(fx.Interpreter):
    """Run a graph node by node; free each value after its last use."""

    def __init__(
        self, module: fx.GraphModule, replace: Callable[[fx.Node, Any], Any] | None
    ) -> None:
        super().__init__(module)
        self._replace = replace

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value if self._replace is None or n.op == "output" else self._replace(n, value)
