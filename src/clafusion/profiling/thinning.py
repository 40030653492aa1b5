"""Language models put out a number for each token and each word: at some positions only.

Samples x tokens x vocabulary would be gigabytes. What a fusion asks of these outputs, inner
products, statistics, goals of a regression, how near two networks are, a part of the positions
tells as well. So a *thinned* network computes its last layer at some positions of each input,
always the same ones, and never at the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clafusion.profiling.masks import kept_of
from clafusion.tracing.model import TracedModel
from clafusion.tracing.readout import find_readout

__all__ = [
    "MOST_NUMBERS",
    "Thinning",
    "alike",
    "as_thinned",
    "most_positions",
    "thinned",
    "whole_numbers",
]

MOST_NUMBERS = 1 << 18
"""Of an input's outputs that are looked at, where it has many positions."""

_LEAST_POSITIONS = 8
_SEED = 0  # of the choice of positions


@dataclass(frozen=True)
class Thinning:
    """At which positions of its inputs a network computes its last layer.

    Attributes
    ----------
    node
        The node of the layer, which is linear.
    positions, count
        How many positions an input has, and at how many the layer is computed.
    keywords
        What the network's inputs are called.
    thinned
        The names of all nodes that have values at these positions only: the layer and what follows.
    """

    node: str
    positions: int
    count: int
    keywords: tuple[str, ...]
    thinned: frozenset[str]

    def index(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the positions of each input, ``(num_inputs, count)``.

        None is at padding: an input with fewer tokens has some of them several times.
        """
        order = torch.randperm(self.positions, generator=torch.Generator().manual_seed(_SEED))
        order = order.to(inputs[0].device)
        mask = kept_of(self.keywords, inputs)
        if mask is None or mask.size(1) != self.positions:
            return order[: self.count].sort().values.expand(len(inputs[0]), -1)
        # Positions that count come first, in the order of chance.
        places = torch.argsort((~mask[:, order]).to(torch.int8), dim=1, stable=True)
        counting = mask.sum(1, keepdim=True)
        counting = torch.where(counting == 0, self.positions, counting)
        slots = torch.arange(self.count, device=order.device) % counting
        return order[places.gather(1, slots)].sort(1).values


def most_positions(classes: int) -> int:
    """Return at how many positions outputs with so many classes are looked at."""
    return max(MOST_NUMBERS // classes, _LEAST_POSITIONS)


def thinned(model: TracedModel) -> TracedModel:
    """Return a network that computes its last layer at some positions, where it has many outputs.

    See :class:`clafusion.tracing.readout.Readout`. Other networks are returned as they are, and so
    are those with few outputs.
    """
    if model.thinning is not None:
        return model
    readout = find_readout(model.module)
    if readout is None:
        return model
    count = most_positions(readout.channels)
    if count >= readout.positions:
        return model
    thinning = Thinning(readout.node, readout.positions, count, model.keywords, readout.nodes)
    return replace(model, thinning=thinning)


def alike(models: Sequence[TracedModel]) -> list[TracedModel]:
    """Return networks that all compute their last layer at the same positions, or all at all."""
    kinds = {
        None if one.thinning is None else (one.thinning.positions, one.thinning.count)
        for one in models
    }
    if len(kinds) == 1:
        return list(models)
    return [replace(one, thinning=None) for one in models]


def whole_numbers(model: TracedModel, output: int) -> int:
    """Return how many numbers an output has for each input, when the network itself is called."""
    numbers = math.prod(model.outputs[output][0])
    thinning = model.thinning
    return numbers if thinning is None else numbers * thinning.positions // thinning.count


def as_thinned(model: TracedModel, inputs: tuple[Tensor, ...], whole: Tensor) -> Tensor:
    """Return an output of a network itself as the thinned one has it."""
    thinning = model.thinning
    if thinning is None or whole.dim() != 3 or whole.size(1) != thinning.positions:
        return whole
    index = thinning.index(inputs).to(whole.device)
    return whole.gather(1, index[..., None].expand(-1, -1, whole.size(-1)))
