"""The source's weights in the target's structure, in the source's own channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.correspondence.correspondence import Correspondence
from clafusion.errors import StructureError
from clafusion.execution.call import call_model, flatten_tensors
from clafusion.execution.lazy import LazyState
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import bound_operands, op_name
from clafusion.weights.build import with_state

__all__ = ["check_inserted", "inserted_model", "resized_shape", "structured_state"]


def structured_state(correspondence: Correspondence) -> LazyState:
    """Return the source's state in the target's structure and in its own widths."""
    target_state, source_state = correspondence.target.state(), correspondence.source.state()
    sizes = {
        one.index: correspondence.source.groups[other].size
        for one, other in zip(correspondence.target.groups, correspondence.groups, strict=True)
        if other >= 0
    }

    def make(name: str) -> Tensor:
        tensor, origin = target_state[name], correspondence.origins[name]
        if name in correspondence.products:
            return correspondence.products[name].to(tensor)
        if name in correspondence.names:
            return source_state[correspondence.names[name]]
        shape = resized_shape(correspondence.target, name, tensor.shape, sizes)
        if origin == "identity":
            return _identity(correspondence.target, name, shape).to(tensor)
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


def inserted_model(target: nn.Module, correspondence: Correspondence) -> nn.Module:
    """Build the source with the target's structure: it computes the same as the source.

    Its widths are the source's; ``in_channels`` and the like are set accordingly.

    Raises
    ------
    StructureError
        A width is fixed in the target module's code, so that what is built does not run or
        computes something else.
    """
    aliases = correspondence.target.aliases
    built = with_state(target, structured_state(correspondence), aliases)
    try:
        found = _outputs_of(built, correspondence)
    except RuntimeError as error:
        raise StructureError(
            "the source with the target's layers does not run: a width is fixed in the target "
            f"module's code ({error})"
        ) from error
    _compare(found, correspondence)
    return built


def check_inserted(correspondence: Correspondence) -> None:
    """Check that the layers that are inserted into the source leave its function as it is.

    What does not run, since a width is fixed in the target module's code, is not refused: the
    result has the target's widths. Networks with other numbers of heads, or heads of another size,
    have none in common to run: code that was made for one size of head divides scores by the root
    of that. Of them what lies between the layers is compared.

    Raises
    ------
    StructureError
        They change it.
    """
    target = correspondence.target
    if target.united_heads or _has_heads_of_another_size(correspondence):
        if set(_between(correspondence.source)) != set(_between(target)):
            raise StructureError(_reason(correspondence))
        return
    state = structured_state(correspondence)
    if all(state[name].shape == one.shape for name, one in target.state().items()):
        with torch.no_grad():
            outputs = target.run(target.example_inputs, state=state)
        found = list(flatten_tensors(list(outputs)))
    else:
        built = with_state(target.model, state, target.aliases)
        try:
            found = _outputs_of(built, correspondence)
        except RuntimeError:
            return
    _compare(found, correspondence)


def _has_heads_of_another_size(correspondence: Correspondence) -> bool:
    """Say whether the target counts other numbers of channels than the source, as of a head."""
    source, target = correspondence.source, correspondence.target
    return any(
        one.is_counted and other >= 0 and source.groups[other].size != one.size
        for one, other in zip(target.groups, correspondence.groups, strict=True)
    )


def _outputs_of(built: nn.Module, correspondence: Correspondence) -> list[Tensor]:
    target = correspondence.target
    mode = built.training
    try:
        with torch.no_grad():
            return call_model(built.eval(), target.example_inputs, target.keywords)
    finally:
        built.train(mode)


def _compare(found: Sequence[Tensor], correspondence: Correspondence) -> None:
    with torch.no_grad():
        inputs = correspondence.target.example_inputs
        wanted = correspondence.source.output_tensors(inputs)
    for one, other in zip(found, wanted, strict=True):
        if other.numel() == 0:
            continue
        one, other = one.double(), other.double()
        gap = float((one - other).abs().max())
        if not gap <= 1e-3 * max(float(other.abs().max()), 1e-30):
            raise StructureError(
                f"in the result's structure the network's outputs change by {gap:.1e}: "
                f"{_reason(correspondence)}"
            )


def _between(model: TracedModel) -> list[tuple[str, Any]]:
    """Return what lies between a network's layers, in order."""
    return [entry for layer in model.layers for entry in layer.between]


def _reason(correspondence: Correspondence) -> str:
    """Say what may change a network's outputs in the target's structure."""
    between = [_between(one) for one in (correspondence.source, correspondence.target)]
    only = [
        [one for one in dict.fromkeys(mine) if mine.count(one) != rest.count(one)]
        for mine, rest in (between, between[::-1])
    ]
    own, other = (", ".join(_shown(one, rest) for one in mine) for mine, rest in (only, only[::-1]))
    if own or other:
        return f"between its layers lies {own or 'nothing'}, and in the result {other or 'nothing'}"
    if -1 in correspondence.layer_map:
        return "the inserted layers change them, or layers share parameters"
    return "its module's code fixes a number, such as a size, that the result's code has otherwise"


def _shown(
    entry: tuple[str, tuple[tuple[str, Any], ...]], others: Sequence[tuple[str, Any]]
) -> str:
    """Name an operation, with the settings in which it differs from another of that name."""
    name, settings = entry
    twin = next((dict(of) for other, of in others if other == name), dict(settings))
    text = ", ".join(f"{key} {value}" for key, value in settings if twin.get(key) != value)
    return f"{name} ({text})" if text else name
