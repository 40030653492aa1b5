"""Means and deviations of the channels at a hook point."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clafusion.profiling.moments import channel_moments

__all__ = ["ChannelStatistics", "channel_statistics", "standardised"]

_IN_CACHE = 1 << 16  # numbers that stay close to a core
_ROUNDING = 1e-6  # of the largest value: what the mean of equal float32 values may be off


@dataclass(frozen=True)
class ChannelStatistics:
    """What the rows of a hook point say of its channels.

    Attributes
    ----------
    mean, deviation
        ``(num_channels,)``: the mean and the standard deviation of each.
    scale
        ``1 / deviation``, and 0 for a constant channel, also for one that varies by rounding.
    """

    mean: Tensor
    deviation: Tensor
    scale: Tensor


# One network meets many others, and its rows are the same each time.
_statistics: MutableMapping[Tensor, ChannelStatistics] = WeakTensorKeyDictionary()


def channel_statistics(rows: Tensor) -> ChannelStatistics:
    """Return the statistics of channels ``(num_rows, num_channels)``; kept as long as the rows."""
    known = _statistics.get(rows)
    if known is None:
        largest = [one.abs().amax(0) for one in rows.split(_together(rows))] if len(rows) else []
        rounding = _ROUNDING * torch.stack(largest).amax(0) if largest else 0.0
        mean, deviation = (one.to(rows.dtype) for one in channel_moments(rows, 1))
        scale = torch.where(deviation > rounding, 1.0 / deviation.clamp(min=1e-30), 0.0)
        known = _statistics[rows] = ChannelStatistics(mean, deviation, scale)
    return known


def standardised(rows: Tensor) -> Tensor:
    """Return channels ``(num_rows, num_channels)`` with zero mean and unit variance.

    A constant channel becomes 0: it correlates with nothing.
    """
    known = channel_statistics(rows)
    result = torch.empty_like(rows)
    count = _together(rows)
    for one, made in zip(rows.split(count), result.split(count), strict=True):
        torch.sub(one, known.mean, out=made).mul_(known.scale)
    return result


def _together(rows: Tensor) -> int:
    """Return how many rows stay close to a core from one operation to the next."""
    return max(_IN_CACHE // max(rows.size(1), 1), 1) if rows.is_cpu else max(len(rows), 1)
