"""Which parameters make a value of a graph zero."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.tracing.flow import NORMS, Flow
from clafusion.tracing.operations import bound_operands, op_name

__all__ = ["parameters_for_zero", "summands"]

# Zero where their only operand is.
_ZERO_AT_ZERO = frozenset(
    "relu relu6 gelu silu tanh hardswish leaky_relu elu selu mish roll flip neg".split()
)
_FACTORS = (0.0, -1.0)  # of gains, and of gains that are stored less one


def summands(flow: Flow, node: fx.Node, block: Collection[fx.Node]) -> list[fx.Node]:
    """Return what a node adds up, by however many additions of its block.

    That is the node itself, where it adds nothing or is not of the block.
    """
    operands = flow.operands(node)
    is_sum = op_name(node) == "add" and bound_operands(node).get("alpha", 1) == 1
    if node not in block or not is_sum or len(operands) != 2 or len(node.all_input_nodes) != 2:
        return [node]
    return [one for operand in operands for one in summands(flow, operand, block)]


def parameters_for_zero(
    flow: Flow, node: fx.Node, block: Collection[fx.Node]
) -> dict[str, float] | None:
    """Return a block's parameters, with a value for each, by which a node of it is zero.

    None where there are no such ones.
    """
    while node in block:
        parts = summands(flow, node, block)
        if len(parts) > 1:
            found: dict[str, float] = {}
            for part in parts:
                of_part = parameters_for_zero(flow, part, block)
                if of_part is None:
                    return None
                found |= of_part
            return found
        parameters, name, operands = flow.parameters(node), op_name(node), flow.operands(node)
        if parameters and flow.is_weighted(node):
            return None if flow.has_computed_weight(node) else dict.fromkeys(parameters, 0.0)
        if parameters and name in NORMS:
            bound = bound_operands(node)
            affine = (bound.get(role) for role in ("weight", "bias"))
            names = [flow.sources[operand] for operand in affine if operand in flow.sources]
            return dict.fromkeys(names, 0.0) or None
        if name == "type_as":
            node = node.all_input_nodes[0]
            continue
        if name == "mul" and parameters:
            return _zero_factor(flow, node, parameters)
        is_scaled = name in ("mul", "div") and operands == node.all_input_nodes
        if len(operands) != 1 or not (flow.is_glue(node) or name in _ZERO_AT_ZERO or is_scaled):
            return None
        node = operands[0]
    return None


def _zero_factor(flow: Flow, node: fx.Node, parameters: list[str]) -> dict[str, float] | None:
    """Return a value of a product's parameters by which its factor is zero."""
    for value in _FACTORS:
        for operand in node.all_input_nodes:
            if operand in flow:
                continue
            factor = _evaluated(flow, operand, value)
            if isinstance(factor, Tensor) and not bool(factor.any()):
                return dict.fromkeys(parameters, value)
    return None


def _evaluated(flow: Flow, node: fx.Node, value: float) -> Any:
    """Return what a node computes of parameters that all have one value; None where it needs more.

    A table that is no trained parameter would have that value, too: the caller checks what it gets.
    """
    if node in flow.sources:
        return torch.full_like(flow.state[flow.sources[node]], value)
    if node.op != "call_function":
        return None
    known = {one: _evaluated(flow, one, value) for one in node.all_input_nodes}
    if any(one is None for one in known.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    return node.target(*args, **kwargs)
