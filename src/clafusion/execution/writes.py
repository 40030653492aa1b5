"""Which inputs of an exported graph its operations change in place."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import fx

__all__ = ["written_inputs"]

_known: WeakKeyDictionary[fx.GraphModule, Mapping[str, str]] = WeakKeyDictionary()


def written_inputs(module: fx.GraphModule) -> Mapping[str, str]:
    """Map each input that is changed in place, directly or through a view, to what changes it.

    Both by the names of their nodes: nodes would keep the graph alive.
    """
    if module not in _known:
        _known[module] = _written_inputs(module)
    return _known[module]


def _written_inputs(module: fx.GraphModule) -> dict[str, str]:
    memory_of: dict[fx.Node, fx.Node] = {}  # of what shares memory with an input
    written: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            memory_of[node] = node
            continue
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = memory_of.get(node.args[0])
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            for argument, value in zip(schema.arguments, node.args, strict=False):
                writes = argument.alias_info is not None and argument.alias_info.is_write
                if writes and isinstance(value, fx.Node) and value in memory_of:
                    written.setdefault(memory_of[value].name, node.name)
            if source is not None and schema.returns and schema.returns[0].alias_info is not None:
                memory_of[node] = source
        elif node.target is operator.getitem and source is not None:
            memory_of[node] = source
    return written
