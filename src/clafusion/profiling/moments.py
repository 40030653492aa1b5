"""The mean and standard deviation of channels, of a batch or streamed, and a batch's parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from clafusion import _native
from clafusion.execution.channels_last import is_channels_last
from clafusion.execution.walk import Walk
from clafusion.profiling.batches import Data, batches
from clafusion.profiling.masks import (
    counting_values,
    kept_positions,
    masks_of_parts,
    without_masked,
)
from clafusion.tracing.model import TracedModel

__all__ = [
    "BatchMoments",
    "Moments",
    "batch_moments",
    "channel_moments",
    "inputs_in_cache",
    "is_plain",
    "joint_moments",
    "moment_axes",
    "observed_moments",
    "plain_view",
    "side_by_side",
]

BatchMoments = Mapping[str, tuple[Tensor, Tensor]]
"""Calibration point's node -> its channels' means and standard deviations on a batch, float64."""

_IN_CACHE = 1 << 19  # numbers of an activation that stay close to a core
_SIDE_BY_SIDE = 1 << 22  # the same where all parts of a batch run layer by layer
_FEWEST_INPUTS = 8  # that are worth an operation, and no batch of one, which is special


@dataclass
class Moments:
    """Streamed mean and standard deviation of each channel."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, count: int, mean: Tensor, deviation: Tensor) -> None:
        """Add a batch of ``count`` values a channel."""
        self.count += count
        self.total = self.total + mean * count
        self.squares = self.squares + (deviation.square() + mean.square()) * count

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation."""
        mean = self.total / self.count
        return mean, _deviation(mean, self.squares / self.count)


def channel_moments(value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and standard deviation over all other axes, in float64."""
    plain = plain_view(value, axis)
    if plain is not None:
        mean, variance = _native.channel_moments(*plain)
        return mean, variance.sqrt()
    flat = value.movedim(axis, -1).reshape(-1, value.size(axis)).double()
    mean = flat.mean(0)
    return mean, _deviation(mean, flat.square().mean(0))


def is_plain(value: Tensor) -> bool:
    """Say whether the compiled loops over channels take a tensor as it is."""
    return (
        value.dtype == torch.float32
        and value.device.type == "cpu"
        and value.is_contiguous()
        and value.numel() > 0
    )


def plain_view(value: Tensor, axis: int) -> tuple[Tensor, int] | None:
    """Return a tensor's own memory as the compiled loops over channels take it, and their axis.

    None where they do not take it.
    """
    if axis in (1, -3) and is_channels_last(value):
        value, axis = value.permute(0, 2, 3, 1), 3
    return (value, axis) if is_plain(value) else None


def joint_moments(
    values: Iterable[Tensor], axis: int, counting: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and standard deviation over all of several values.

    ``counting`` says what of each counts: see
    :func:`clafusion.profiling.masks.counting_values`.
    """
    moments = Moments()
    for value, of_value in zip(values, counting, strict=True):
        kept, at = without_masked(value, axis, of_value)
        moments.add(kept.numel(), *channel_moments(kept, at))
    return moments.result()


def _deviation(mean: Tensor, squares: Tensor) -> Tensor:
    return (squares - mean.square()).clamp(min=0).sqrt()


def observed_moments(model: TracedModel, data: Data) -> list[BatchMoments]:
    """Return for each batch the moments of all values that ``repair`` may ask of a network.

    Raises
    ------
    InputError
        ``data`` is empty or does not fit the model.
    """
    axes = moment_axes(model)
    with torch.no_grad():
        return [
            batch_moments(model, inputs, axes)
            for inputs in batches(data, model.example_inputs, model.keywords, device=model.device)
        ]


def moment_axes(model: TracedModel) -> dict[str, int]:
    """Return the nodes of which :func:`observed_moments` tells, with their channel axes."""
    axes = {point.post: point.axis for layer in model.layers for point in layer.hook_points}
    axes |= {point.node: point.axis for layer in model.layers for point in layer.calibration_points}
    return axes


def batch_moments(
    model: TracedModel, inputs: tuple[Tensor, ...], axes: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a network and return the nodes' means and deviations on this batch."""
    found = {node: Moments() for node in axes}
    mask: Tensor | None = None

    def observe(node: fx.Node, value: Any) -> Any:
        if node.name in axes:
            counting = counting_values(model, node.name, value, mask)
            kept, axis = without_masked(value, axes[node.name], counting)
            found[node.name].add(kept.numel(), *channel_moments(kept, axis))
        return value

    state = model.state()
    in_parts = side_by_side(model, inputs)  # as a profile does
    masks = masks_of_parts(kept_positions(model, inputs), in_parts)
    for part, of_part in zip(in_parts, masks, strict=True):
        mask = of_part
        Walk(model, part, state, set(), replace=observe, fastest=True).finish()
    return {node: moments.result() for node, moments in found.items()}


def inputs_in_cache(model: TracedModel, most: int = _IN_CACHE) -> int | None:
    """Return for how many inputs none of a model's activations has more than ``most`` numbers.

    By default so many that they stay in a core's cache.

    Running more at once makes memory the bottleneck. None where a batch cannot be split, or where
    the model is not on a CPU.
    """
    points = [point for layer in model.layers for point in layer.hook_points]
    if model.takes_whole_batches or model.device.type != "cpu":
        return None
    if any(point.batch is None for point in points):  # the order of inputs and positions is unknown
        return None
    sizes = [math.prod(point.positions) * len(point.groups) for point in points]
    return max(most // max(sizes, default=1), _FEWEST_INPUTS)


def side_by_side(model: TracedModel, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Split a batch into parts that run layer by layer, each waiting for the others.

    None of them stays in a core's cache, so that larger parts, which take fewer steps, are faster
    than those of :func:`inputs_in_cache`.
    """
    fitting = inputs_in_cache(model, _SIDE_BY_SIDE)
    if fitting is None or inputs[0].device.type != "cpu":
        return [inputs]
    pieces = [one.tensor_split(math.ceil(inputs[0].size(0) / fitting)) for one in inputs]
    return list(zip(*pieces, strict=True))
