"""Means and deviations of the channels at a hook point."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["ChannelStatistics", "channel_statistics", "standardised"]

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
        rounding = _ROUNDING * rows.abs().amax(0) if len(rows) else 0.0
        mean = rows.mean(0)
        deviation = (rows - mean).square_().mean(0).sqrt()
        scale = torch.where(deviation > rounding, 1.0 / deviation.clamp(min=1e-30), 0.0)
        known = _statistics[rows] = ChannelStatistics(mean, deviation, scale)
    return known


def standardised(rows: Tensor) -> Tensor:
    """Return channels ``(num_rows, num_channels)`` with zero mean and unit variance.

    A constant channel becomes 0: it correlates with nothing.
    """
    known = channel_statistics(rows)
    return (rows - known.mean).mul_(known.scale)
