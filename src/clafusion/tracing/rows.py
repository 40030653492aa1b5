"""Whether the rows of a batch see each other, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.execution.call import flatten_tensors, rounding_of
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import module_path, op_name

__all__ = ["mix_rows", "mixing_operation"]

_PART = 1 << 20  # elements that are compared at a time


def mix_rows(outputs: Sequence[Tensor], of_fewer: Sequence[Tensor], bound: float) -> bool:
    """Say whether what values have for a row, or how many there are, depends on the other rows.

    Parameters
    ----------
    outputs, of_fewer
        Values for a batch, and for all of its rows but the last ones.
    bound
        Up to which difference, relative to the largest, two values are the same.
    """
    for one, other in zip(outputs, of_fewer, strict=True):
        if one.dim() != other.dim() or one.dim() == 0 or one.shape == other.shape:
            continue
        if one.shape[1:] != other.shape[1:] or _differ(one[: len(other)], other, bound):
            return True
    return False


def _differ(one: Tensor, other: Tensor, bound: float) -> bool:
    if not one.is_floating_point() or not other.numel():
        return False
    atol = bound * max(float(part.abs().nan_to_num().amax()) for part in _in_parts(other))
    return not all(
        torch.allclose(a.double(), b.double(), rtol=0.0, atol=atol, equal_nan=True)
        for a, b in zip(_in_parts(one), _in_parts(other), strict=True)
    )


def _in_parts(value: Tensor) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = value.flatten().split(_PART)
    return parts


def mixing_operation(model: TracedModel) -> str:
    """Name the first operation of a model whose value for a row depends on the other rows."""
    rows = model.example_inputs[0].size(0)
    bound = rounding_of(model.state().values())
    found: list[dict[fx.Node, list[Tensor]]] = []
    for count in (rows, rows - 1):
        values: dict[fx.Node, list[Tensor]] = {}

        def keep(node: fx.Node, value: Any, values: dict[fx.Node, list[Tensor]] = values) -> Any:
            values[node] = [one.clone() for one in flatten_tensors(value)]
            return value

        with torch.no_grad():
            model.run(tuple(one[:count] for one in model.example_inputs), replace=keep)
        found.append(values)
    for node, ones in found[0].items():
        if node.name in model.reshapes:
            continue
        others = found[1].get(node, ones)
        alike = [(a, b) for a, b in zip(ones, others, strict=True) if a.shape == b.shape]
        if mix_rows(ones, others, bound) or any(_differ(a, b, bound) for a, b in alike):
            return f"operation {op_name(node)!r} in {module_path(node) or 'forward'!r}"
    return "an operation"
