"""The source's weights in the target's structure, in the source's own channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.execution.lazy import LazyState
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import bound_operands, op_name

__all__ = ["resized_shape", "structured_state"]


def structured_state(correspondence: Correspondence) -> LazyState[str]:
    """Return the source's state in the target's structure and in its own widths."""
    target_state, source_state = correspondence.target.state(), correspondence.source.state()
    sizes = {
        one.index: correspondence.source.groups[other].size
        for one, other in zip(correspondence.target.groups, correspondence.groups, strict=True)
        if other >= 0
    }

    fillings = correspondence.target.fillings

    def make(name: str) -> Tensor:
        tensor, origin = target_state[name], correspondence.origins[name]
        if name in correspondence.products:
            return correspondence.products[name].to(tensor)
        if name in correspondence.names:
            return source_state[correspondence.names[name]]
        shape = resized_shape(correspondence.target, name, tensor.shape, sizes)
        if origin == "identity" and name in fillings:
            return torch.full(shape, fillings[name]).to(tensor)
        if origin == "identity":
            return _identity(correspondence.target, name, shape).to(tensor)
        if origin == "zero_residual" and name in fillings:
            return torch.full(shape, fillings[name]).to(tensor)
        if origin == "zero_residual" or shape != tuple(tensor.shape):
            # Any value will do inside an inserted block; where the widths differ, zero is one.
            return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        return tensor

    return LazyState(target_state, make)


def resized_shape(
    model: TracedModel, name: str, shape: Sequence[int], sizes: Mapping[int, int]
) -> tuple[int, ...]:
    """Return a parameter's shape where channel groups (by index) have other sizes."""
    resized = list(shape)
    for use in model.uses_by_parameter.get(name, ()):
        if use.size != tuple(shape):
            continue  # flattened elements: no axis of their own
        for group, axis in model.axes_by_parameter.get(name, ()):
            if axis.use == use and group.index in sizes:
                grown = sizes[group.index] - group.size
                resized[axis.axis] += grown * axis.positions.size(1)
    return tuple(resized)


def _identity(target: TracedModel, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return what makes an inserted layer the identity."""
    layer = next(one for one in target.layers if name in one.parameters)
    if len(shape) > 1:  # a linear layer, or a convolution that passes its centre on
        weight = torch.zeros(shape)
        centre = weight
        for size in reversed(shape[2:]):
            centre = centre.select(-1, size // 2)
        centre.fill_diagonal_(1.0)
        return weight
    if name.endswith("running_var"):
        # (x - 0) / sqrt(var + eps) = x
        return torch.ones(shape) - _epsilon(target, layer)
    norm = {p.rsplit(".", 1)[0] for p in layer.parameters if p.endswith("running_var")}
    is_scale = name.endswith("weight") and name.rsplit(".", 1)[0] in norm
    return torch.ones(shape) if is_scale else torch.zeros(shape)


def _epsilon(model: TracedModel, layer: Layer) -> float:
    for node in model.module.graph.nodes:
        if node.name in layer.nodes and op_name(node) == "batch_norm":
            return float(bound_operands(node)["eps"])
    return 0.0
