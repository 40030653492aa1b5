"""Prove an analysis: permute every channel class of a copy and compare the outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import GraphVerificationError
from clafusion.graph import ChannelClass, ModelGraph, State, flatten_tensors

__all__ = ["permute_channels", "verify_graph"]

# Relative to the largest output. Float64 leaves 1e-16 a rounding, and deep networks amplify it;
# float32 is the fallback for models that fix a dtype inside.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


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
    the largest output), else in float32 (1e-3). The traced graph's own output is compared, too.

    Raises
    ------
    GraphVerificationError
        The outputs differ; the message names the classes that change them on their own.
    """
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(one.size, generator=generator) for one in graph.classes]
    model, inputs, expected = _reference(graph, inputs)
    dtype = next((one.dtype for one in expected if one.is_floating_point()), torch.float32)
    bound = _TOLERANCE.get(dtype, 1e-2)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in graph.state().items()
    }

    def difference(outputs: Sequence[Tensor]) -> float:
        worst = 0.0
        for one, reference in zip(outputs, expected, strict=True):
            one, reference = one.double(), reference.double()
            scale = float(reference.abs().nan_to_num().max()) if reference.numel() else 0.0
            gap = (one - reference).abs()
            gap = torch.where(one.isnan() & reference.isnan() | (one == reference), 0.0, gap)
            worst = max(worst, float(gap.max()) / (scale or 1.0) if gap.numel() else 0.0)
        return worst

    def permuted_difference(chosen: Sequence[ChannelClass]) -> float:
        permuted = permute_channels(state, chosen, [permutations[one.index] for one in chosen])
        permuted.update({name: permuted[source] for name, source in graph.aliases.items()})
        with torch.no_grad():
            chosen_state = {name: permuted[name] for name in _names(model)}
            return difference(_call(model, chosen_state, inputs, graph.keywords))

    with torch.no_grad():
        traced = difference([one for one in graph.run(inputs, state=state) if _is_tensor(one)])
    if not traced <= bound:
        raise GraphVerificationError(
            f"the traced graph computes something else than the model (relative difference "
            f"{traced:.1e}); the model may depend on state or randomness that tracing froze"
        )
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


def _reference(
    graph: ModelGraph, inputs: tuple[Tensor, ...]
) -> tuple[torch.nn.Module, tuple[Tensor, ...], list[Tensor]]:
    """Return a copy of the model, the inputs and its outputs, in float64 where that works."""
    model = copy.deepcopy(graph.model).eval()
    with torch.no_grad():
        try:
            double = model.double()
            wide = tuple(one.double() if one.is_floating_point() else one for one in inputs)
            outputs = _call(double, {}, wide, graph.keywords)
            if all(one.dtype == torch.float64 for one in outputs if one.is_floating_point()):
                return double, wide, outputs
        except RuntimeError:  # a dtype is fixed somewhere inside
            pass
        model = copy.deepcopy(graph.model).eval()
        return model, inputs, _call(model, {}, inputs, graph.keywords)


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


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
