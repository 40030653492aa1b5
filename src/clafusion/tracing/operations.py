"""What a node of an exported graph says about its operation: name, place and operands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx

__all__ = [
    "RESHAPES",
    "SAME_VALUES",
    "affine_operands",
    "batch_axis",
    "bound_operands",
    "convolution_geometry",
    "is_affine_product",
    "is_transposed",
    "module_path",
    "op_name",
    "rows_kind",
    "value_operands",
    "works_in_place",
]

# Operations in eval mode that leave every value as it is, and those that only move values.
SAME_VALUES = frozenset("contiguous clone detach alias dropout feature_dropout identity".split())
RESHAPES = SAME_VALUES | frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t squeeze unsqueeze expand
    movedim swapaxes mT to _to_copy getitem""".split()
)


def op_name(node: fx.Node) -> str:
    """Return the base name of a node's ATen operation: ``relu`` for ``aten.relu_.default``."""
    return _name_of(node.target)


@lru_cache(4096)
def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        inplace = name.endswith("_") and not name.endswith("__")
        return name[:-1] if inplace else name
    return str(getattr(target, "__name__", target))


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node came from; empty at the top level."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    paths = [str(entry[0]) for entry in stack if not str(entry[0]).startswith("_empty_nn_module")]
    return paths[-1] if paths else ""


def bound_operands(node: fx.Node) -> dict[str, Any]:
    """Return a node's operands by the names of its operation's schema, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    bound = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


# What these read of an operand is its shape.
_SHAPED_AS = frozenset("expand_as view_as reshape_as".split())
_MADE = frozenset(
    """new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like rand_like
    randn_like""".split()
)


def value_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of which a node reads values, not only the shape."""
    name = op_name(node)
    if name in _MADE:
        return []
    operands: list[fx.Node] = node.all_input_nodes
    return operands[:1] if name in _SHAPED_AS else operands


_BY_MATRIX = {
    "addmm": {"input": "mat1", "weight": "mat2", "bias": "self"},
    "mm": {"input": "self", "weight": "mat2"},
    "matmul": {"input": "self", "weight": "other"},
}


def affine_operands(node: fx.Node) -> dict[str, Any]:
    """Return what a linear layer, a convolution or a norm reads: "input", "weight" and "bias".

    A product with a matrix is a linear layer. The weight is the one before it is transposed; see
    :func:`is_transposed`.
    """
    bound = bound_operands(node)
    roles = _BY_MATRIX.get(op_name(node), {role: role for role in ("input", "weight", "bias")})
    found = {role: bound[name] for role, name in roles.items() if bound.get(name) is not None}
    if _is_turned(found.get("weight")):
        found["weight"] = found["weight"].args[0]
    return found


def is_affine_product(node: fx.Node) -> bool:
    """Return whether a node may be a linear layer that is written as a product of matrices."""
    return op_name(node) in _BY_MATRIX


def is_transposed(node: fx.Node) -> bool:
    """Return whether a layer's weight has its outputs on the second axis, not on the first."""
    bound, name = bound_operands(node), op_name(node)
    weight = bound.get(_BY_MATRIX.get(name, {}).get("weight", "weight"))
    return (name in _BY_MATRIX) != _is_turned(weight)


def _is_turned(weight: Any) -> bool:
    """Return whether an operand is the transpose of a matrix, and nobody else reads that."""
    if not isinstance(weight, fx.Node) or len(weight.users) != 1:
        return False
    name = op_name(weight)
    return name in ("t", "transpose", "mT", "numpy_T") or (
        name == "permute" and list(weight.args[1]) in ([1, 0], [-1, 0], [-1, -2], [1, -2])
    )


def convolution_geometry(
    node: fx.Node, kernel: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return a convolution's stride, padding and dilation, one number for each spatial axis.

    For a padding ``"same"`` that is uneven, the padding is that of the smaller side.
    """
    bound = bound_operands(node)

    def per_axis(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return tuple(int(number) for number in values) * (len(kernel) if len(values) == 1 else 1)

    stride, dilation = per_axis(bound["stride"]), per_axis(bound["dilation"])
    padding = bound["padding"]
    if padding == "same":
        return (
            stride,
            tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)),
            dilation,
        )
    return stride, per_axis(0 if padding == "valid" else padding), dilation


def batch_axis(node: fx.Node) -> int | None:
    """Return the axis along which a node's value holds the batch's inputs.

    None where the model's code has merged positions into that axis. In a graph network it is the
    axis of the nodes, edges or graphs.
    """
    if "rows" in node.meta:
        return int(node.meta["rows"][0])
    value = node.meta["val"]
    shape = (value[0] if isinstance(value, (tuple, list)) else value).shape
    free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if not free:  # the model admits one batch size only
        return 0
    return free[0] if shape[free[0]].node.expr.is_Symbol else None


def works_in_place(node: fx.Node) -> bool:
    """Return whether an operation writes its result to its first operand."""
    schema = getattr(node.target, "_schema", None)
    # __or__ is not mutable
    return schema is not None and schema.is_mutable and schema.name.endswith("_")


def rows_kind(node: fx.Node) -> str:
    """Return what a node's value has rows for: "nodes", "edges" or "graphs" of a graph network.

    In all others "" stands for the inputs of the batch.
    """
    return str(node.meta["rows"][1]) if "rows" in node.meta else ""
