r"""How much each channel matters: the masses that transport moves instead of equal ones.

A channel of little mass may share its partner with others, and one of much mass may have several.
So useless channels do not take a partner away from one that matters. Masses say what a channel is
mixed from; what reads a source channel goes to its partners whole, however little its mass is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.config import IMPORTANCES
from clafusion.errors import InputError
from clafusion.profiling.batches import Data, in_chunks
from clafusion.profiling.masks import (
    counting_values,
    kept_positions,
    without_masked,
    zeroed,
)
from clafusion.threads import one_thread
from clafusion.tracing.model import TracedModel

__all__ = [
    "channel_importance",
    "equal_masses",
    "layer_sensitivities",
    "sensitivities",
]

_WITHOUT = (
    "importance='sensitivity' and layer_weights='sensitivity' need an output with a gradient; this "
    "model has none: use importance='norm' or 'activation', and layer_weights='uniform'"
)
_LEAST = 1e-3  # of the group's mean: every channel keeps some mass, or its row has no direction
_CHUNK = 64  # inputs whose activations are held for a gradient at once


def channel_importance(
    model: TracedModel,
    data: Data,
    kind: str,
    *,
    max_inputs: int | None = None,
    progress: Callable[[str, int], None] | None = None,
    products: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    r"""Return each channel group's masses ``(num_channels,)``, float64, with sum 1.

    A channel's mass is proportional to its score, but at least a thousandth of the group's mean.
    The scores:

    - ``"norm"``: the l2 norm of all weights, biases and norm parameters that make the channel
      (OTFusion, Singh and Jaggi, arXiv 1910.05653, section 4: importance of neurons).
    - ``"activation"``: the mean of :math:`|x|` over inputs and positions, behind the nonlinearity,
      where a dead channel shows.
    - ``"sensitivity"``: the sum of :math:`|\theta\, \partial L / \partial \theta|` over all
      parameters that make or read the channel: to first order what setting each to 0 would change
      (:func:`sensitivities`).

    Where all scores of a group are 0, its masses are equal.

    Parameters
    ----------
    model
        The traced model.
    data
        Unlabelled inputs; not read for ``"norm"``.
    kind
        Which score; for ``"uniform"`` the result is empty.
    max_inputs
        Read this many inputs only; None for all.
    progress
        Called with a text and the number of inputs done.
    products
        The model's :func:`sensitivities`, where they are known already.

    Raises
    ------
    InputError
        ``kind`` is unknown, no output depends on the weights in a way that has a gradient, or a
        score is not finite.
    """
    if kind == "uniform":
        return ()
    with one_thread():  # sums, and from them plans, would depend on how many there are
        if kind == "norm":
            squares = {name: one.square() for name, one in _parameters(model).items()}
            scores = [one.sqrt() for one in _over_axes(model, squares, ("out",))]
        elif kind == "activation":
            scores = _activations(model, _limited(model, data, max_inputs, progress))
        elif kind == "sensitivity":
            if products is None:
                products = sensitivities(model, data, max_inputs=max_inputs, progress=progress)
            scores = _over_axes(model, products, ("out", "in"))
        else:
            known = ", ".join(map(repr, IMPORTANCES))
            raise InputError(f"importance must be one of {known}; got {kind!r}")
        return tuple(
            _masses(score, one.name, kind) for score, one in zip(scores, model.groups, strict=True)
        )


def sensitivities(
    model: TracedModel,
    data: Data,
    *,
    max_inputs: int | None = None,
    progress: Callable[[str, int], None] | None = None,
    without: str = _WITHOUT,
) -> dict[str, Tensor]:
    r"""Return :math:`|\theta\, \partial L / \partial \theta|` of each parameter, in its shape.

    To first order this is what setting each to 0 would change (Sens-Merging, Liu et al., arXiv
    2502.12420, which has labels). Here :math:`L = \sum_x \lVert f(x) \rVert^2` over all inputs
    and outputs, which needs no labels (Aljundi et al., Memory aware synapses, ECCV 2018). It serves
    models that are no classifiers as well, and does not vanish where a classifier is certain, as
    its likelihood does. Signs are kept until all inputs are seen, so that it does not matter how
    they are batched. Parameters on which no output depends are left out.

    Raises
    ------
    InputError
        No output depends on the weights in a way that has a gradient; the message is ``without``.
    """
    state = model.state()
    leaves = {name: one.clone().requires_grad_() for name, one in _parameters(model).items()}
    with one_thread(), torch.enable_grad():
        for some in _limited(model, data, max_inputs, progress):
            mask = kept_positions(model, some)
            values = [
                one for one in model.run(some, state={**state, **leaves}) if isinstance(one, Tensor)
            ]
            outputs = [
                zeroed(one, counting_values(model, name, one, mask))
                for one, name in zip(values, model.output_names, strict=True)
                if one.requires_grad
            ]
            if not outputs:
                raise InputError(without)
            torch.stack([one.square().sum() for one in outputs]).sum().backward()
    return {
        name: (one.detach() * one.grad).abs()
        for name, one in leaves.items()
        if one.grad is not None
    }


def layer_sensitivities(model: TracedModel, products: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of each layer's :func:`sensitivities` ``(num_layers,)``, float64.

    Raises
    ------
    InputError
        A sum is not finite.
    """
    with one_thread():
        sums = {name: float(one.double().sum()) for name, one in products.items()}
    found = [
        math.fsum(sums[name] for name in dict.fromkeys(layer.parameters) if name in sums)
        for layer in model.layers
    ]
    for layer, one in zip(model.layers, found, strict=True):
        if not math.isfinite(one):
            raise InputError(
                f"layer_weights='sensitivity' is not finite for layer {layer.name!r}; use 'uniform'"
            )
    return torch.tensor(found, dtype=torch.float64)


def equal_masses(size: int) -> Tensor:
    """Return the masses of channels that all matter as much ``(num_channels,)``, float64."""
    return torch.full((size,), 1 / size, dtype=torch.float64)


def _masses(scores: Tensor, name: str, kind: str) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise InputError(
            f"importance={kind!r} is not finite for the channels of {name!r}; use another one"
        )
    mean = scores.mean()
    if mean == 0:
        return equal_masses(len(scores))
    kept = scores.clamp(min=float(_LEAST * mean))
    return kept / kept.sum()


def _parameters(model: TracedModel) -> dict[str, Tensor]:
    """Return the weights, without buffers: those are statistics of activations."""
    names = {name for name, _ in model.model.named_parameters(remove_duplicate=False)}
    return {
        name: one
        for name, one in model.state().items()
        if name in names and one.is_floating_point()
    }


def _over_axes(
    model: TracedModel, values: Mapping[str, Tensor], directions: tuple[str, ...]
) -> list[Tensor]:
    """Add up what the parameters have in each channel's axes."""
    totals = []
    for one in model.groups:
        total = torch.zeros(one.size, dtype=torch.float64)
        for group_axis in one.axes:
            if group_axis.direction in directions and group_axis.use.parameter in values:
                on_axis = group_axis.use.view(values[group_axis.use.parameter]).movedim(
                    group_axis.axis, 0
                )
                mine = on_axis[group_axis.positions.reshape(-1)].reshape(one.size, -1)
                total += mine.double().sum(1).cpu()
        totals.append(total)
    return totals


def _limited(
    model: TracedModel,
    data: Data,
    max_inputs: int | None,
    progress: Callable[[str, int], None] | None,
) -> Iterator[tuple[Tensor, ...]]:
    seen = 0
    for inputs in in_chunks(data, model, max_inputs, _CHUNK, device=model.device):
        yield inputs
        seen += inputs[0].size(0)
        if progress is not None:
            progress("importance", seen)


def _activations(model: TracedModel, inputs: Iterator[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return each channel's mean magnitude over inputs, positions and hook points."""
    points = {point.post: point for layer in model.layers for point in layer.hook_points}
    totals = {
        name: torch.zeros(len(one.groups), dtype=torch.float64) for name, one in points.items()
    }
    count = 0
    mask: Tensor | None = None

    def observe(node: fx.Node, value: Any) -> Any:
        if node.name in points:
            counting = counting_values(model, node.name, value, mask)
            kept, axis = without_masked(value, points[node.name].axis, counting)
            flat = kept.movedim(axis, -1).flatten(0, -2)
            per_input = len(flat) / size
            totals[node.name] += flat.abs().double().sum(0).cpu() / per_input
        return value

    state = model.state()
    with torch.no_grad():
        for some in inputs:
            size = some[0].size(0)
            mask = kept_positions(model, some)
            count += size
            model.run(some, state=state, replace=observe)
    scores = []
    for one in model.groups:
        total, shown = torch.zeros(2, one.size, dtype=torch.float64)
        for name, point in points.items():
            places = torch.nonzero(point.groups == one.index).squeeze(1)
            members = point.members[places]
            total.index_add_(0, members, totals[name][places] / count)
            shown.index_add_(0, members, torch.ones(len(members), dtype=torch.float64))
        scores.append(total / shown.clamp(min=1))
    return scores
