"""Prove an analysis: permute every channel class of a copy and compare the outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import GraphVerificationError
from clafusion.graph import ChannelClass, ModelGraph, State, flatten_tensors

__all__ = ["permute_channels", "verify_graph"]

# Relative to the largest output. Float64 leaves 1e-16 a rounding, and deep networks amplify it.
# Float32 is the fallback for models that fix a dtype inside.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_ROUNDED_INSIDE = 1e-4  # float64 outside, but some values pass through float32


def permute_channels(
    state: State, classes: Sequence[ChannelClass], permutations: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return a copy of ``state`` in which channel ``permutation[i]`` has moved to place ``i``.

    Parameters
    ----------
    state
        Parameters and buffers by name.
    classes
        The classes to permute.
    permutations
        For each class a permutation ``(size,)``.
    """
    permuted = {name: tensor.detach().clone() for name, tensor in state.items()}
    for channel_class, permutation in zip(classes, permutations, strict=True):
        for slot in channel_class.slots:
            view = slot.use.view(permuted[slot.use.parameter])
            positions = slot.positions.to(view.device)
            source = positions[permutation.to(view.device)].reshape(-1)
            view.index_copy_(slot.axis, positions.reshape(-1), view.index_select(slot.axis, source))
    return permuted


def verify_graph(graph: ModelGraph, inputs: tuple[Tensor, ...], *, seed: int = 0) -> None:
    """Permute every class at random and compare the model's outputs with the original ones.

    The model itself runs, not the traced graph, in float64 where it allows that (bound 1e-9 of
    the largest output; 1e-4 where the model casts values to a shorter type inside), else in
    float32 (1e-3). The traced graph's own output is compared, too.

    Raises
    ------
    GraphVerificationError
        The outputs differ; the message names the classes that change them on their own.
    """
    with torch.no_grad():
        plain = copy.deepcopy(graph.model).eval()
        traced = [one for one in graph.run(inputs) if isinstance(one, Tensor)]
        fidelity = _difference(traced, _call(plain, {}, inputs, graph.keywords))
        model, inputs, expected = _reference(plain, inputs, graph.keywords)
    if not fidelity <= _TOLERANCE[torch.float32]:
        raise GraphVerificationError(
            f"the traced graph computes something else than the model (relative difference "
            f"{fidelity:.1e}); the model may depend on state or randomness that tracing froze"
        )
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(one.size, generator=generator) for one in graph.classes]
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    bound = _TOLERANCE.get(dtype, 1e-2)
    if dtype == torch.float64 and _casts(graph):
        bound = _ROUNDED_INSIDE
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in graph.state().items()
    }

    def permuted_difference(chosen: Sequence[ChannelClass]) -> float:
        permuted = permute_channels(state, chosen, [permutations[one.index] for one in chosen])
        permuted.update({name: permuted[source] for name, source in graph.aliases.items()})
        chosen_state = {name: permuted[name] for name in _names(model)}
        with torch.no_grad():
            return _difference(_call(model, chosen_state, inputs, graph.keywords), expected)

    total = permuted_difference(graph.classes)
    if total <= bound:
        return
    broken = [one for one in graph.classes if not permuted_difference([one]) <= bound]
    named = ", ".join(f"{one.name!r} ({one.size} channels)" for one in broken[:5]) or "none alone"
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    raise GraphVerificationError(
        f"permuting the channel classes changed the output (relative difference {total:.1e}, "
        f"bound {bound:.0e}); classes that break it: {named}{more}. The analysis does not "
        "understand this model: please open an issue with its code"
    )


def _casts(graph: ModelGraph) -> bool:
    """Tell whether the model turns values into a type shorter than float64."""
    short = {torch.float32, torch.float16, torch.bfloat16}
    return any(
        node.op == "call_function"
        and any(value in short for value in (*node.args, *node.kwargs.values()) if _is_dtype(value))
        for node in graph.module.graph.nodes
    )


def _is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest expected output."""
    worst = 0.0
    for one, reference in zip(outputs, expected, strict=True):
        if reference.numel() == 0:
            continue
        one, reference = one.double(), reference.double()
        same = (one == reference) | (one.isnan() & reference.isnan())
        gap = torch.where(same, 0.0, (one - reference).abs())
        finite = reference[reference.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        worst = max(worst, float(gap.max()) / (scale or 1.0))
    return worst


def _reference(
    model: torch.nn.Module, inputs: tuple[Tensor, ...], keywords: tuple[str, ...]
) -> tuple[torch.nn.Module, tuple[Tensor, ...], list[Tensor]]:
    """Return a model, the inputs and its outputs, in float64 where that works."""
    try:
        double = copy.deepcopy(model).double()
        wide = tuple(one.double() if one.is_floating_point() else one for one in inputs)
        outputs = _call(double, {}, wide, keywords)
        if all(one.dtype == torch.float64 for one in outputs if one.is_floating_point()):
            return double, wide, outputs
    except RuntimeError:  # a dtype is fixed somewhere inside
        pass
    return model, inputs, _call(model, {}, inputs, keywords)


def _call(
    model: torch.nn.Module, state: State, inputs: tuple[Tensor, ...], keywords: tuple[str, ...]
) -> list[Tensor]:
    arguments = () if keywords else inputs
    named = dict(zip(keywords, inputs, strict=True)) if keywords else {}
    outputs = torch.func.functional_call(
        model, dict(state), arguments, named, strict=False, tie_weights=True
    )
    return list(flatten_tensors(outputs))


def _names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
