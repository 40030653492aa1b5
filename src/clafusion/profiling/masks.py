"""Which positions of an input count: those that its attention mask does not leave out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.tracing.model import TracedModel
from clafusion.tracing.padding import mask_place

__all__ = [
    "counted_inputs",
    "counting_outputs",
    "counting_values",
    "joined_masks",
    "kept_of",
    "kept_positions",
    "masks_of_parts",
    "without_masked",
    "zeroed",
]


def kept_positions(model: TracedModel, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Return which positions of each input count, ``(num_inputs, num_positions)``; None for all.

    Only a mask (:func:`clafusion.tracing.padding.mask_place`) of zeros and ones counts.
    """
    return kept_of(model.keywords, inputs)


def kept_of(keywords: Sequence[str], inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Return what :func:`kept_positions` does, given what the network's inputs are called."""
    place = mask_place(keywords)
    if place is None:
        return None
    mask = inputs[place]
    if mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    kept = mask == 1
    # A batch without any position is the network's own affair.
    return None if bool(kept.all()) or not bool(kept.any()) else kept


def masks_of_parts(mask: Tensor | None, parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor | None]:
    """Return the mask of a batch in the parts that the batch is split into."""
    if mask is None:
        return [None] * len(parts)
    return list(mask.split([one[0].size(0) for one in parts]))


def joined_masks(masks: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """Return the masks of several batches of ``counts`` inputs as one; None for all positions."""
    known = next((one for one in masks if one is not None), None)
    if known is None:
        return None
    sized = zip(masks, counts, strict=True)
    return torch.cat(
        [
            known.new_ones(count, known.size(1)) if one is None else one.to(known.device)
            for one, count in sized
        ]
    )


def counting_values(
    model: TracedModel, node: str, value: Tensor, mask: Tensor | None
) -> Tensor | None:
    """Return what of a node's value counts: True and False in a shape that broadcasts to it.

    None for all of it: where there is no mask, or the value has no positions that it is of.
    """
    axes = None if mask is None else model.padded_axes.get(node)
    if mask is None or axes is None:
        return None
    shape = [1] * value.dim()
    if axes.inputs == axes.positions:
        rows = (mask.T if axes.positions_first else mask).flatten()
        shape[axes.inputs] = len(rows)
    else:
        rows = mask if axes.inputs < axes.positions else mask.T
        shape[axes.inputs], shape[axes.positions] = mask.shape
    if any(size not in (1, of_value) for size, of_value in zip(shape, value.shape, strict=True)):
        return None
    return rows.reshape(shape).to(value.device)


def counting_outputs(model: TracedModel, mask: Tensor | None, output: int) -> Tensor | None:
    """Return the mask of an output ``(num_inputs, num_positions, ...)``; None for others."""
    if mask is None:
        return None
    axes = model.padded_axes.get(model.output_names[output])
    is_usual = axes is not None and (axes.inputs, axes.positions) == (0, 1)
    return mask if is_usual else None


def without_masked(value: Tensor, axis: int, counting: Tensor | None) -> tuple[Tensor, int]:
    """Return what of a value counts, and its axis of channels then.

    ``counting`` is that of :func:`counting_values`.
    """
    if counting is None:
        return value, axis
    last = value.movedim(axis, -1)
    chosen = counting.movedim(axis, -1)[..., 0].expand(last.shape[:-1])
    return last[chosen].contiguous(), 1


def zeroed(value: Tensor, counting: Tensor | None) -> Tensor:
    """Return a value with zeros where it does not count: see :func:`counting_values`."""
    return value if counting is None else torch.where(counting, value, 0.0)


def counted_inputs(masks: Sequence[Tensor | None], counts: Sequence[int]) -> int:
    """Return how many inputs without padding would have as many rows."""
    positions = next((one.size(1) for one in masks if one is not None), 1)
    rows = sum(
        count * positions if mask is None else int(mask.sum())
        for mask, count in zip(masks, counts, strict=True)
    )
    return max(1, rows // positions)
