"""Prove an analysis: permute every channel class of a copy and compare the outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import GraphVerificationError
from clafusion.graph import ChannelClass, ModelGraph, State, call_model

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

    Each class is moved by a cycle through all its channels and by a swap of two, which together
    generate every permutation; once with the model's own weights and once with random ones, for
    a gate at zero would hide a mistake behind it.

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
        fidelity = _difference(traced, call_model(plain, inputs, graph.keywords))
        model, inputs = _widest(plain, inputs, graph.keywords)
    if not fidelity <= _TOLERANCE[torch.float32]:
        raise GraphVerificationError(
            f"the traced graph computes something else than the model (relative difference "
            f"{fidelity:.1e}); the model may depend on state or randomness that tracing froze"
        )
    generator = torch.Generator().manual_seed(seed)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    bound = _TOLERANCE.get(dtype, 1e-2)
    if dtype == torch.float64 and _casts(graph):
        bound = _ROUNDED_INSIDE
    # A cycle through all channels and a swap of two generate every permutation of a class.
    cycles = [_cycle(one.size, generator) for one in graph.classes]
    swaps = [_swap(one.size, generator) for one in graph.classes]
    own = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in graph.state().items()
    }
    for state in (own, _redrawn(model, own, generator)):
        with torch.no_grad():
            expected = call_model(model, inputs, graph.keywords, state=_named(model, state, graph))
        for permutations in (cycles, swaps):
            _compare(graph, model, state, inputs, expected, permutations, bound)


def _compare(
    graph: ModelGraph,
    model: torch.nn.Module,
    state: State,
    inputs: tuple[Tensor, ...],
    expected: Sequence[Tensor],
    permutations: Sequence[Tensor],
    bound: float,
) -> None:
    def difference(chosen: Sequence[ChannelClass]) -> float:
        permuted = permute_channels(state, chosen, [permutations[one.index] for one in chosen])
        with torch.no_grad():
            outputs = call_model(
                model, inputs, graph.keywords, state=_named(model, permuted, graph)
            )
        return _difference(outputs, expected)

    total = difference(graph.classes)
    if total <= bound:
        return
    broken = [one for one in graph.classes if not difference([one]) <= bound]
    named = ", ".join(f"{one.name!r} ({one.size} channels)" for one in broken[:5]) or "none alone"
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    raise GraphVerificationError(
        f"permuting the channel classes changed the output (relative difference {total:.1e}, "
        f"bound {bound:.0e}); classes that break it: {named}{more}. The analysis does not "
        "understand this model: please open an issue with its code"
    )


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation that moves every channel, all in one cycle."""
    order = torch.randperm(size, generator=generator)
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(1)
    return permutation


def _swap(size: int, generator: torch.Generator) -> Tensor:
    """Return a permutation that swaps two random channels."""
    permutation = torch.arange(size)
    one, other = torch.randperm(size, generator=generator)[:2]
    permutation[one], permutation[other] = other, one
    return permutation


def _redrawn(model: torch.nn.Module, state: State, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the state with random weights: zero gates and tiny scales would hide mistakes."""
    drawn = dict(state)
    for name, parameter in model.named_parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.dim() > 1:
            noise = (2 * noise - 1) * (6 / max(parameter[0].numel(), 1)) ** 0.5
        drawn[name] = noise.to(parameter) if parameter.dim() > 1 else (0.5 + noise).to(parameter)
    return drawn


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


def _widest(
    model: torch.nn.Module, inputs: tuple[Tensor, ...], keywords: tuple[str, ...]
) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    """Return the model and its inputs in float64 where it runs in that, else as they are."""
    try:
        double = copy.deepcopy(model).double()
        wide = tuple(one.double() if one.is_floating_point() else one for one in inputs)
        outputs = call_model(double, wide, keywords)
        if all(one.dtype == torch.float64 for one in outputs if one.is_floating_point()):
            return double, wide
    except RuntimeError:  # a dtype is fixed somewhere inside
        pass
    return model, inputs


def _named(model: torch.nn.Module, state: State, graph: ModelGraph) -> dict[str, Tensor]:
    """Return what the module itself holds, under every one of its names."""
    full = {**state, **{name: state[source] for name, source in graph.aliases.items()}}
    return {name: full[name] for name, _ in (*model.named_parameters(), *model.named_buffers())}
