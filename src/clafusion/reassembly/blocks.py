"""Models, cut -> blocks: what they compute, and modules that compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from clafusion.execution.call import State
from clafusion.reassembly.cutting import Cut, batch_sizes
from clafusion.tracing.model import TracedModel

__all__ = ["Block", "block_module", "blocks_between", "nodes_between"]


@dataclass(frozen=True)
class Block:
    """A part of a model, between two of its cuts.

    Attributes
    ----------
    model
        The model's name.
    index
        Its place among the model's blocks.
    start, end
        The cut whose value it reads, None for the model's inputs; and the one whose value it puts
        out, None for the model's outputs.
    layers
        The names of the layers in it.
    parameters
        How many parameters it has.
    """

    model: str
    index: int
    start: Cut | None
    end: Cut | None
    layers: tuple[str, ...]
    parameters: int

    def __repr__(self) -> str:
        return f"<Block {self.index} of {self.model!r}: {self.text}>"

    @property
    def text(self) -> str:
        """Its layers, from the first to the last."""
        if not self.layers:
            return "no layer"
        first, last = self.layers[0], self.layers[-1]
        return first if first == last else f"{first} to {last}"

    def follows(self, other: Block) -> bool:
        """Say whether it comes right after another block in its own model."""
        return self.model == other.model and self.index == other.index + 1


def blocks_between(name: str, model: TracedModel, cuts: tuple[Cut, ...]) -> tuple[Block, ...]:
    """Return the blocks into which a model is cut."""
    state = model.state()
    ends = [*cuts, None]
    found = []
    for i, (start, end) in enumerate(zip([None, *cuts], ends, strict=True)):
        nodes = nodes_between(model, start, end)
        names = {model.entries[one] for one in nodes if one in model.entries}
        inside = {one.name for one in nodes}
        layers = tuple(
            layer.name for layer in model.layers if _first_reader(model, layer.nodes) in inside
        )
        trained = dict(model.model.named_parameters(remove_duplicate=False))
        count = sum(state[one].numel() for one in names if one in trained)
        found.append(Block(name, i, start, end, layers, count))
    return tuple(found)


def _first_reader(model: TracedModel, names: tuple[str, ...]) -> str:
    """Return the first of some nodes that reads a parameter."""
    nodes = _by_name(model)
    readers = (
        name for name in names if any(one in model.entries for one in nodes[name].all_input_nodes)
    )
    return next(readers, names[0])


def _by_name(model: TracedModel) -> dict[str, fx.Node]:
    return {node.name: node for node in model.module.graph.nodes}


def nodes_between(model: TracedModel, start: Cut | None, end: Cut | None) -> list[fx.Node]:
    """Return what computes the end's value from the start's, in order, without that."""
    nodes = _by_name(model)
    stop = None if start is None else nodes[start.node]
    last = model.module.graph.output_node() if end is None else nodes[end.node]
    sizes = batch_sizes(model) if stop is not None else frozenset[fx.Node]()
    needed, waiting = set[fx.Node](), [last]
    while waiting:
        node = waiting.pop()
        if node is stop or node in needed or node in sizes:
            continue
        needed.add(node)
        waiting += node.all_input_nodes
    return [node for node in model.module.graph.nodes if node in needed]


def block_module(model: TracedModel, block: Block) -> fx.GraphModule:
    """Return a module that computes a block, in eval mode, with copies of its weights.

    The first block takes the model's inputs, by their names where the model does; every other one
    the value at its start. The last one returns a model's output tensor, of several a tuple.
    """
    root, graph = nn.Module(), fx.Graph()
    state, trained = model.state(), dict(model.model.named_parameters(remove_duplicate=False))
    made: dict[fx.Node, Any] = {}
    nodes = _by_name(model)
    inputs = [node for node in model.module.graph.nodes if node.op == "placeholder"]
    own = [node for node in inputs if node not in model.entries]
    if block.start is None:
        names = model.keywords or tuple(f"input_{i}" for i in range(len(own)))
        for node, name in zip(own, names, strict=True):
            made[node] = graph.placeholder(name)
    else:
        value = graph.placeholder("x")
        made[nodes[block.start.node]] = value
        for node in batch_sizes(model):
            made[node] = graph.call_function(torch.ops.aten.sym_size.int, (value, 0))
    for node in nodes_between(model, block.start, block.end):
        if node in made or node.op == "output":
            continue
        if node in model.entries:
            entry = model.entries[node]
            name = entry.replace(".", "__")
            if not hasattr(root, name):
                _register(root, name, entry, state, trained)
            made[node] = graph.get_attr(name)
        elif node.op == "get_attr":
            name = str(node.target).replace(".", "__")
            root.register_buffer(name, getattr(model.module, str(node.target)).detach().clone())
            made[node] = graph.get_attr(name)
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    if block.end is not None:
        graph.output(made[nodes[block.end.node]])
    else:
        leaves = pytree.tree_leaves(model.module.graph.output_node().args[0])
        found = [made[one] for one in leaves if isinstance(one, fx.Node)]
        graph.output(found[0] if len(found) == 1 else tuple(found))
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph, class_name="Block")


def _register(
    root: nn.Module, name: str, entry: str, state: State, trained: Mapping[str, Tensor]
) -> None:
    value = state[entry].detach().clone()
    if entry in trained:
        root.register_parameter(name, nn.Parameter(value, trained[entry].requires_grad))
    else:
        root.register_buffer(name, value)
