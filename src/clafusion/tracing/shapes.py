"""Reshapes by the shape of another value -> reshapes by numbers.

``y.reshape_as(x)`` reads nothing of ``x`` but its shape. As an operand of the graph's, ``x`` would
seem to flow around what lies between the two, as around a residual block.
"""

from __future__ import annotations

import torch
from torch import fx

from clafusion.tracing.operations import op_name

__all__ = ["inline_shapes"]


def inline_shapes(module: fx.GraphModule) -> None:
    """Let no reshape of an exported graph read the value whose shape it takes, in place.

    Sizes that are free come from the model's inputs. Where one does not, a reshape stays as it is,
    and so does one by the shape of an input or a parameter, around which nothing flows.
    """
    sizes = _Sizes(module.graph)
    changed = False
    for node in list(module.graph.nodes):
        if op_name(node) not in ("reshape_as", "view_as") or len(node.all_input_nodes) != 2:
            continue
        value, like = node.args
        if like.op != "call_function":
            continue
        shape = [sizes.of(one) for one in like.meta["val"].shape]
        if any(one is None for one in shape):
            continue
        with module.graph.inserting_before(node):
            made = module.graph.call_function(torch.ops.aten.reshape.default, (value, shape))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
        changed = True
    if changed:
        module.recompile()


class _Sizes:
    """The nodes of a graph that hold the sizes of its inputs."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._first = next((node for node in graph.nodes if node.op != "placeholder"), None)
        self._axes: dict[str, tuple[fx.Node, int]] = {}
        for node in inputs:
            for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if not isinstance(size, int):
                    self._axes.setdefault(str(size), (node, axis))
        self._known: dict[str, fx.Node] = {}

    def of(self, size: int | torch.SymInt) -> int | fx.Node | None:
        """Return a number, a node that holds a free size, or None where no input has that size."""
        if isinstance(size, int):
            return size
        name = str(size)
        if name not in self._known and name in self._axes:
            assert self._first is not None
            operand, axis = self._axes[name]
            with self._graph.inserting_before(self._first):
                made = self._graph.call_function(torch.ops.aten.sym_size.int, (operand, axis))
            made.meta["val"] = size
            self._known[name] = made
        return self._known.get(name)
