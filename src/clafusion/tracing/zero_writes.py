"""Which parameters make a value of a graph zero."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.tracing.flow import NORMS, Flow
from clafusion.tracing.operations import RESHAPES, affine_operands, bound_operands, op_name

__all__ = ["parameters_for_zero", "summands"]

# Zero where their only operand is.
_ZERO_AT_ZERO = frozenset(
    """relu relu6 gelu silu tanh hardswish leaky_relu elu selu mish roll flip neg glu erf sin
    square abs cumsum""".split()
)
# Zero where all that they join is.
_JOINS = frozenset(["cat", "stack"])
# Zero where one of their operands is.
_PRODUCTS = frozenset("mul matmul mm bmm einsum".split())
# Zero where the operand of this name is: the others say which of its values are taken.
_TAKEN_FROM = {
    "index": "self",
    "index_select": "self",
    "gather": "self",
    "type_as": "self",
    "scaled_dot_product_attention": "value",
}
# Rows that are added up, or of which the largest are taken: zero where all are and so was the sum.
_COLLECTED = {"scatter_add": "src", "scatter_reduce": "src", "index_add": "source"}
_ZEROS = frozenset(["new_zeros", "zeros", "zeros_like"])
# Products of every row with the matrix of its expert.
_OF_EXPERTS = frozenset("grouped_mm _grouped_mm grouped_mm_fallback".split())
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

    None where there are no such ones. Of a product's factors the first that can be zero is.
    """
    if node not in block:
        return None
    name, parameters, operands = op_name(node), flow.parameters(node), flow.operands(node)
    parts = summands(flow, node, block)
    if len(parts) > 1 or (name in _JOINS and operands == node.all_input_nodes):
        return _all_zero(flow, parts if len(parts) > 1 else operands, block)
    if parameters and (flow.is_weighted(node) or name in _OF_EXPERTS):
        if flow.has_computed_weight(node):
            return _zero_of_computed(flow, node, block)
        return dict.fromkeys(parameters, 0.0)
    if parameters and name in NORMS:
        bound = bound_operands(node)
        affine = (bound.get(role) for role in ("weight", "bias"))
        names = [flow.sources[operand] for operand in affine if operand in flow.sources]
        return dict.fromkeys(names, 0.0) or None
    factor = _zero_factor(flow, node, parameters) if name == "mul" and parameters else None
    if factor is not None:
        return factor
    if name in _PRODUCTS:
        choices = (parameters_for_zero(flow, operand, block) for operand in operands)
        return next((one for one in choices if one is not None), None)
    if name in _TAKEN_FROM:
        return parameters_for_zero(flow, bound_operands(node)[_TAKEN_FROM[name]], block)
    if name in _COLLECTED and op_name(bound_operands(node)["self"]) in _ZEROS:
        return parameters_for_zero(flow, bound_operands(node)[_COLLECTED[name]], block)
    if name == "add" and parameters and len(operands) == 1:  # a bias
        before = parameters_for_zero(flow, operands[0], block)
        return None if before is None else before | dict.fromkeys(parameters, 0.0)
    if name == "div" and _is_positive(bound_operands(node)["other"]):
        return parameters_for_zero(flow, bound_operands(node)["self"], block)
    is_scaled = name == "div" and operands == node.all_input_nodes
    if len(operands) == 1 and (flow.is_glue(node) or name in _ZERO_AT_ZERO or is_scaled):
        return parameters_for_zero(flow, operands[0], block)
    return None


def _is_positive(node: Any) -> bool:
    """Say whether a value is surely above zero, as a count from one on or the root of a sum."""
    if not isinstance(node, fx.Node):
        return isinstance(node, (int, float)) and node > 0
    name, bound = op_name(node), bound_operands(node)
    if name in ("clamp", "clamp_min"):
        return isinstance(bound.get("min"), (int, float)) and bound["min"] > 0
    if name == "add":  # as a norm's eps, to a variance
        return isinstance(bound["other"], float) and bound["other"] > 0
    is_moved = name in RESHAPES or name in ("sqrt", "expand_as", "index", "index_select")
    return is_moved and _is_positive(bound["self"])


def _all_zero(
    flow: Flow, nodes: Sequence[fx.Node], block: Collection[fx.Node]
) -> dict[str, float] | None:
    """Return the parameters by which all of some nodes are zero."""
    found: dict[str, float] = {}
    for node in nodes:
        of_node = parameters_for_zero(flow, node, block)
        if of_node is None:
            return None
        found |= of_node
    return found


def _zero_factor(flow: Flow, node: fx.Node, parameters: list[str]) -> dict[str, float] | None:
    """Return a value of a product's parameters by which its factor is zero."""
    for value in _FACTORS:
        for operand in node.all_input_nodes:
            if operand in flow:
                continue
            factor = _evaluated(flow, operand, _all_are(flow, value))
            if isinstance(factor, Tensor) and not bool(factor.any()):
                return dict.fromkeys(parameters, value)
    return None


def _zero_of_computed(
    flow: Flow, node: fx.Node, block: Collection[fx.Node]
) -> dict[str, float] | None:
    """Return the parameters by which a layer writes zero whose weight is computed from several.

    Where the weight follows one of them in proportion, as the gain of a normalised weight, that one
    is zero. Else the layer's input is, and if none of the block's parameters make that, all
    parameters that make the weight.
    """
    bound = affine_operands(node)
    if bound.get("weight") is None:
        return None
    bias = _zero_of_operand(flow, bound["bias"]) if "bias" in bound else {}
    if bias is None:
        return None
    weight = _zero_of_operand(flow, bound["weight"], in_proportion=True)
    if weight is None and "input" in bound:
        weight = parameters_for_zero(flow, bound["input"], block)
    if weight is None:
        weight = _zero_of_operand(flow, bound["weight"])
    return None if weight is None else {**weight, **bias}


def _zero_of_operand(
    flow: Flow, operand: fx.Node, *, in_proportion: bool = False
) -> dict[str, float] | None:
    """Return the parameters by which what is computed from parameters is zero.

    The smallest one that is enough; or with ``in_proportion`` of those that the result follows in
    proportion; or all.
    """
    names = _entries(flow, operand)
    trained = [name for name in names if name not in flow.channels.labels.buffers]
    single = sorted(trained, key=lambda name: flow.state[name].numel())
    for zeroed in [[one] for one in single] + ([] if in_proportion else [trained]):
        if _is_zero(flow, operand, zeroed) and not (
            in_proportion and not _is_proportional(flow, operand, zeroed)
        ):
            return dict.fromkeys(zeroed, 0.0)
    return None


def _entries(flow: Flow, node: fx.Node) -> list[str]:
    """Return the state entries from which a node's value is computed."""
    if node in flow.sources:
        return [flow.sources[node]]
    found = [name for one in node.all_input_nodes for name in _entries(flow, one)]
    return list(dict.fromkeys(found))


def _is_zero(flow: Flow, node: fx.Node, zeroed: Collection[str]) -> bool:
    """Say whether a value is zero where some parameters are."""
    value = _evaluated(flow, node, _scaled(flow, zeroed, 0.0))
    return isinstance(value, Tensor) and not bool(value.any())  # NaN is not zero


def _is_proportional(flow: Flow, node: fx.Node, names: Collection[str]) -> bool:
    """Say whether half the parameters give half the value."""
    whole, half = (_evaluated(flow, node, _scaled(flow, names, one)) for one in (1.0, 0.5))
    return torch.allclose(2 * half, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def _all_are(flow: Flow, value: float) -> Callable[[str], Tensor]:
    return lambda name: torch.full_like(flow.state[name], value)


def _scaled(flow: Flow, names: Collection[str], factor: float) -> Callable[[str], Tensor]:
    return lambda name: flow.state[name] * factor if name in names else flow.state[name]


def _evaluated(flow: Flow, node: fx.Node, state: Callable[[str], Tensor]) -> Any:
    """Return what a node computes of state entries; None where it needs more.

    A table that is no trained parameter may be changed, too: the caller checks what it gets.
    """
    if node in flow.sources:
        return state(flow.sources[node])
    if node.op != "call_function":
        return None
    known = {one: _evaluated(flow, one, state) for one in node.all_input_nodes}
    if any(one is None for one in known.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    return node.target(*args, **kwargs)
