"""Where a model can be cut in two, and where it is cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import op_name

__all__ = ["Cut", "batch_sizes", "chosen_cuts", "cuts_behind_layers", "cuts_of"]


@dataclass(frozen=True)
class Cut:
    """A value through which all passes that a model computes of its inputs.

    Attributes
    ----------
    node
        The name of its node.
    axis
        The axis of its channels.
    channels
        How many they are.
    positions
        Its shape without the batch and the channels.
    is_positive
        Whether a ReLU has made it.
    """

    node: str
    axis: int
    channels: int
    positions: tuple[int, ...]
    is_positive: bool


def cuts_of(model: TracedModel) -> tuple[Cut, ...]:
    """Return the places at which a model can be cut, one between each two layers with weights.

    A place has layers with weights on both sides. Of the values between two such layers the last
    counts that is no mere reshaping.
    """
    order = list(model.module.graph.nodes)
    flow = _flow(model, order)
    alone = _passing_alone(model, flow)
    places: list[fx.Node] = []
    weighted: list[bool] = []  # whether a layer with weights lies between a place and the next
    is_after = False
    for node in order:
        if node not in flow or node.op == "output":
            continue
        is_after |= _has_weight(model, node)
        if places and _has_weight(model, node):
            weighted[-1] = True
        if is_after and node in alone:
            if places and not weighted[-1] and node.name not in model.reshapes:
                places[-1] = node
            elif not places or weighted[-1]:
                places.append(node)
                weighted.append(False)
    return tuple(_cut(model, one) for one, counts in zip(places, weighted, strict=True) if counts)


def cuts_behind_layers(model: TracedModel) -> tuple[Cut | None, ...]:
    """Return for each layer its output as a cut; None where other values pass beside it."""
    nodes = {node.name: node for node in model.module.graph.nodes}
    alone = _passing_alone(model, _flow(model, list(model.module.graph.nodes)))
    outputs = (nodes[layer.output] for layer in model.layers)
    return tuple(_cut(model, one) if one in alone else None for one in outputs)


def _passing_alone(model: TracedModel, flow: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Return the values through which alone passes all that a model computes of its inputs."""
    order = list(model.module.graph.nodes)
    sizes = batch_sizes(model)
    last_use: dict[fx.Node, int] = {}
    for i, node in enumerate(order):
        for operand in node.all_input_nodes:
            last_use[operand] = i
    found: set[fx.Node] = set()
    alive: set[fx.Node] = set()
    for i, node in enumerate(order):
        alive = {one for one in alive if last_use.get(one, -1) > i}
        if node not in flow or node.op == "output":
            continue
        if last_use.get(node, -1) > i and node not in sizes:
            alive.add(node)
        if alive == {node} and _is_value(model, node):
            found.add(node)
    return frozenset(found)


def batch_sizes(model: TracedModel) -> frozenset[fx.Node]:
    """Return the nodes that are nothing but the number of inputs."""
    inputs = {
        node
        for node, name in zip(
            (one for one in model.module.graph.nodes if one.op == "placeholder"),
            model.placeholders,
            strict=True,
        )
        if name is None
    }
    return frozenset(
        node
        for node in model.module.graph.nodes
        if op_name(node) == "sym_size" and node.args[0] in inputs and node.args[1] == 0
    )


def _flow(model: TracedModel, order: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """Return the nodes that the inputs enter."""
    found: set[fx.Node] = set()
    for node in order:
        if (node.op == "placeholder" and node not in model.entries) or any(
            one in found for one in node.all_input_nodes
        ):
            found.add(node)
    return frozenset(found)


def _has_weight(model: TracedModel, node: fx.Node) -> bool:
    """Say whether a node reads a parameter of two axes or more."""
    state = model.module_state()
    entries = (model.entries.get(one) for one in node.all_input_nodes)
    return any(name is not None and state[name].dim() > 1 for name in entries)


def _is_value(model: TracedModel, node: fx.Node) -> bool:
    value = node.meta.get("val")
    rows = model.example_inputs[0].size(0)
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 1
        and (isinstance(value.shape[0], torch.SymInt) or value.shape[0] == rows)
        and all(isinstance(one, int) for one in value.shape[1:])
    )


def _cut(model: TracedModel, node: fx.Node) -> Cut:
    value: Tensor = node.meta["val"]
    hooks = [point for layer in model.layers for point in layer.hook_points]
    known = next((one.axis for one in hooks if one.post == node.name), None)
    axis = known if known is not None else -1 if value.dim() == 3 else 1
    axis %= value.dim()
    shape = [int(one) for one in value.shape[1:]]
    channels = shape.pop(axis - 1)
    return Cut(node.name, axis, channels, tuple(shape), _is_positive(node))


def _is_positive(node: fx.Node) -> bool:
    """Say whether a value is what a ReLU put out, perhaps pooled or reshaped."""
    while op_name(node) not in ("relu", "relu_"):
        is_kept = "pool" in op_name(node) or op_name(node) in ("flatten", "view", "dropout")
        if not is_kept or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return True


def chosen_cuts(change: NDArray[np.float64], count: int) -> tuple[int, ...]:
    """Return which ``count`` of all places to cut at: there little changes around them.

    Parameters
    ----------
    change
        For each place how much the network's values change just before and just after it.
    count
        How many.

    Returns
    -------
    tuple
        Positions in order, each a share of ``1 / (2 (count + 1))`` of all places or more from the
        next and from the ends; among those the sum of the changes is the least.
    """
    total = len(change)
    apart = max(math.ceil((total + 1) / (2 * (count + 1))), 1)
    best = np.full((count + 1, total + 1), np.inf)  # so many cuts among the places before
    best[0] = 0.0
    taken = np.zeros((count + 1, total + 1), dtype=bool)
    for cuts in range(1, count + 1):
        for end in range(1, total + 1):
            place = end - 1
            before = max(place + 1 - apart, 0)
            here = np.inf
            if place + 1 >= cuts * apart and total - place >= (count - cuts + 1) * apart:
                here = best[cuts - 1][before] + change[place]
            taken[cuts, end] = here < best[cuts][end - 1]
            best[cuts][end] = min(here, best[cuts][end - 1])
    found: list[int] = []
    end = total
    for cuts in range(count, 0, -1):
        while not taken[cuts, end]:
            end -= 1
        found.append(end - 1)
        end = max(end - apart, 0)
    return tuple(reversed(found))
