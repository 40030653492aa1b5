"""Products of two activations: which channels they contract, and which stay."""

from __future__ import annotations

import torch
from torch import Tensor

from clafusion.tracing.labels.ids import collapse, fixed_ids, sequence_ids
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rules.common import CROSSED, collapse_within

__all__ = ["contracted"]

_SEVERAL = "its operands have channels along several axes"


def contracted(propagation: LabelPropagation, text: str, left: Tensor, right: Tensor) -> Tensor:
    """Return the labels of a product of two activations.

    Parameters
    ----------
    propagation
        The running propagation.
    text
        Names the product.
    left, right
        Labels ``(..., m, k)`` and ``(..., k, n)``; the leading axes broadcast.

    Returns
    -------
    Tensor
        Labels ``(..., m, n)``.
    """
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    m, k, n = left.size(-2), left.size(-1), right.size(-1)
    left, right = left.expand(*batch, m, k), right.expand(*batch, k, n)
    moving = [bool((collapse(ids)[0] >= 0).any()) for ids in (left, right)]
    places = fixed_ids(text, (*batch, 1))  # an id for each product in the batch
    if not any(moving):
        return fixed_ids(text, (*batch, m, n))
    if propagation.unite_stacked(left, -1) | propagation.unite_stacked(right, -2):
        left, right = propagation.roots(left), propagation.roots(right)
    if not moving[1]:
        return contracted(propagation, text, right.mT, left.mT).mT
    if not moving[0]:
        if _constant_along(right, -2):
            # The left side mixes positions (attention): the channels of the right side stay.
            weights = sequence_ids(left.flatten(-2))
            propagation.meet(right[..., 0, :], weights.unsqueeze(-1).expand(*batch, n))
            return right[..., :1, :].expand(*batch, m, n)
        if _constant_along(right, -1):
            propagation.count(right[..., 0])
            propagation.meet(right[..., 0], sequence_ids(left.mT))
            return fixed_ids(text, (*batch, m, n))
        propagation.pin(right)
        propagation.lose(right, _SEVERAL)
        return fixed_ids(text, (*batch, m, n))
    if _constant_along(left, -2) and _constant_along(right, -1):
        # The product contracts channels (query with key): they move together, and the result
        # moves with none.
        propagation.unite(left[..., 0, :], right[..., :, 0])
        propagation.count(left[..., 0, :])
        propagation.meet(left[..., 0, :], places.expand(*batch, k))
        return fixed_ids(text, (*batch, m, n))
    if _constant_along(right, -2):
        # The left side mixes positions of the right side's channels: attention whose scores hold
        # trained biases, or keys that were multiplied with values first (linear attention). A label
        # names one channel, that of the right side. Those of the left side keep their places in it.
        propagation.outer.append(left)
        if not (_constant_along(left, -1) and _constant_along(left, -2)):  # else it is of heads
            propagation.lose(left, CROSSED)
        propagation.meet(left, fixed_ids(text + "_left", (*batch, m, k)))
        weights = sequence_ids(propagation.fixed(left).flatten(-2))
        propagation.meet(right[..., 0, :], weights.unsqueeze(-1).expand(*batch, n))
        return right[..., :1, :].expand(*batch, m, n)
    if _constant_along(left, -1):
        return contracted(propagation, text, right.mT, left.mT).mT
    for ids in (left, right):
        propagation.pin(ids)
        propagation.lose(ids, _SEVERAL)
    return fixed_ids(text, (*batch, m, n))


def _constant_along(ids: Tensor, axis: int) -> bool:
    return collapse_within(ids, [axis % ids.dim()]).size(axis) == 1
