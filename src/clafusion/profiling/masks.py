"""Which positions of an input count: those that its attention mask does not leave out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.tracing.model import TracedModel

__all__ = [
    "MASK",
    "counted_inputs",
    "joined_masks",
    "kept_of",
    "kept_positions",
    "kept_rows",
    "without_masked",
    "zeroed",
]

MASK = "attention_mask"
"""What networks of transformers call the mask of their positions: 1 for a token, 0 for padding."""


def kept_positions(model: TracedModel, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Return which positions of each input count, ``(num_inputs, num_positions)``; None for all.

    Only a mask of zeros and ones, called ``attention_mask``, is one; and none where the network has
    a second sequence, of a decoder, to which the mask does not belong.
    """
    return kept_of(model.keywords, inputs)


def kept_of(keywords: Sequence[str], inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Return what :func:`kept_positions` does, given what the network's inputs are called."""
    if MASK not in keywords or any(one.startswith("decoder_") for one in keywords):
        return None
    mask = inputs[keywords.index(MASK)]
    if mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    kept = mask == 1
    # A batch without any position is the network's own affair.
    return None if bool(kept.all()) or not bool(kept.any()) else kept


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


def without_masked(value: Tensor, axis: int, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return what a value holds at positions that count, and its axis of channels then.

    A value without such positions, as a classifier's, is returned as it is.
    """
    if mask is None:
        return value, axis
    last = value.movedim(axis, -1)
    if last.dim() == 3 and last.shape[:2] == mask.shape:
        return last[mask].contiguous(), 1
    if last.dim() == 2 and len(last) == mask.numel():
        return last[mask.flatten()].contiguous(), 1
    return value, axis


def zeroed(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return a value ``(num_inputs, num_positions, ...)`` with zeros where positions do not count.

    Positions may also be rows of their own.
    """
    if mask is None:
        return value
    if value.dim() > 2 and value.shape[:2] == mask.shape:
        return value * mask.to(value.dtype).view(*mask.shape, *[1] * (value.dim() - 2))
    if value.dim() == 2 and len(value) == mask.numel():
        return value * mask.to(value.dtype).view(-1, 1)
    return value


def kept_rows(mask: Tensor | None, positions: int, chosen: Tensor) -> Tensor | None:
    """Return which rows count, where rows are the inputs at ``chosen`` of so many positions.

    They come position by position. None for all.
    """
    if mask is None or mask.size(1) != positions:
        return None
    rows = mask[:, chosen.to(mask.device)].T.flatten().nonzero().squeeze(1)
    return None if len(rows) == mask.size(0) * len(chosen) else rows


def counted_inputs(masks: Sequence[Tensor | None], counts: Sequence[int], positions: int) -> int:
    """Return how many inputs without padding would have as many rows, at so many positions."""
    rows = sum(
        count * positions if mask is None or mask.size(1) != positions else int(mask.sum())
        for mask, count in zip(masks, counts, strict=True)
    )
    return max(1, rows // positions)
