"""Where the values of a network hold the positions of its inputs that an attention mask leaves out.

A network may lay out inputs and positions in any way: (inputs, positions, channels), (positions,
inputs, channels), (inputs, channels, positions), rows of inputs times positions. Shapes do not
tell, for as many inputs as positions look alike, and a second sequence may be as long. So it is
tried: the last positions of the first two inputs are left out by the mask, and other tokens are put
there. What differs then is what belongs to those positions, and its places tell the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clafusion.execution.walk import Walk, in_lockstep

if TYPE_CHECKING:
    from clafusion.tracing.model import TracedModel

__all__ = ["MASK", "PaddedAxes", "find_padded_axes", "mask_place"]

MASK = "attention_mask"
"""What networks of transformers call the mask of their positions: 1 for a token, 0 for padding."""

_TRIED = 2  # inputs; that a single one stands where it should may be chance
_ROUNDING = 1e-5  # relative to the largest value


@dataclass(frozen=True)
class PaddedAxes:
    """Where a value holds inputs and positions.

    Attributes
    ----------
    inputs, positions
        The axes; the same one where rows are pairs of both.
    positions_first
        Whether such rows come position by position, not input by input.
    """

    inputs: int
    positions: int
    positions_first: bool = False


def mask_place(keywords: Sequence[str]) -> int | None:
    """Return which input is the mask of the positions; None for no mask that says which count.

    With a second sequence, of a decoder, there is none: the mask does not belong to that one.
    """
    if MASK not in keywords or any(one.startswith("decoder_") for one in keywords):
        return None
    return keywords.index(MASK)


def find_padded_axes(model: TracedModel) -> Mapping[str, PaddedAxes]:
    """Return the axes of each node whose values at padding depend on nothing but that padding.

    Nodes whose values mix positions, or have none, are left out. Empty for a network without an
    mask (:func:`mask_place`) of the shape ``(num_inputs, num_positions)``.
    """
    inputs, place = model.example_inputs, mask_place(model.keywords)
    if place is None or inputs[place].dim() != 2 or inputs[place].size(1) < 2:
        return {}
    mask = torch.ones_like(inputs[place])
    mask[:_TRIED, -1] = 0
    given = [mask if i == place else one for i, one in enumerate(inputs)]
    fitting = [i for i, one in enumerate(given) if i != place and one.shape[:2] == mask.shape]
    # Beside tokens a sequence of real numbers is another one, as an image's patches.
    tokens = [i for i in fitting if not given[i].is_floating_point()] or fitting
    others = [_with_another_token(one) if i in tokens else one for i, one in enumerate(given)]
    found = {}
    with torch.no_grad():
        walks = [Walk(model, tuple(one), model.state(), set()) for one in (given, others)]
        for node in in_lockstep(walks):
            values = [walk.value(node) for walk in walks]
            if all(isinstance(one, Tensor) and one.is_floating_point() for one in values):
                axes = _axes(_differing(*values), mask == 0)
                if axes is not None:
                    found[node.name] = axes
    return found


def _with_another_token(value: Tensor) -> Tensor:
    """Return an input with other values at the last position of the first inputs."""
    changed = value.clone()
    if value.is_floating_point():
        changed[:_TRIED, -1] += 1.0
        return changed
    for i in range(min(_TRIED, len(value))):
        unlike = value[value != value[i, -1].flatten()[0]]
        if len(unlike):
            changed[i, -1] = unlike[0]
    return changed


def _differing(one: Tensor, other: Tensor) -> Tensor:
    """Say where two values differ, or are no numbers."""
    scale = one.abs().nan_to_num(0.0).max() if one.numel() else one.new_zeros(())
    return ~((one - other).abs() <= _ROUNDING * scale)


def _axes(differing: Tensor, padding: Tensor) -> PaddedAxes | None:
    """Return the axes along which a value differs at padding, ``(num_inputs, num_positions)``."""
    for axis, size in enumerate(differing.shape):
        if size == padding.numel():
            along = differing.movedim(axis, 0).reshape(size, -1).any(1)
            for rows in (padding, padding.T):
                if torch.equal(along, rows.flatten()):
                    return PaddedAxes(axis, axis, positions_first=rows is not padding)
    for axes in permutations(range(differing.dim()), 2):
        if tuple(differing.shape[axis] for axis in axes) == padding.shape:
            along = differing.movedim(axes, (0, 1)).reshape(*padding.shape, -1).any(2)
            if torch.equal(along, padding):
                return PaddedAxes(*axes)
    return None
