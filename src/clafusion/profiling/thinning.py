"""Language models put out a number for each token and each word: at some positions only.

Samples x tokens x vocabulary would be gigabytes. What a fusion asks of these outputs, inner
products, statistics, goals of a regression, how near two networks are, a part of the positions
tells as well. So a *thinned* network computes its last layer at some positions of each input,
always the same ones, and never at the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from clafusion.profiling.masks import kept_of
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import affine_operands, batch_axis, op_name

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
_BY_ELEMENT = ("add", "sub", "mul", "div", "tanh", "neg", "to", "_to_copy", "clone", "contiguous")


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

    That is a linear layer of values ``(inputs, positions, channels)``, whose outputs, perhaps
    changed element by element, are outputs of the network and nothing else. Other networks are
    returned as they are, and so are those with few outputs.
    """
    if model.thinning is not None:
        return model
    for node in reversed(model.module.graph.nodes):
        if op_name(node) != "linear":
            continue
        value = node.meta.get("val")
        operand = affine_operands(node)["input"].meta.get("val")
        following = _following(node)
        if following is None or not (_has_positions(value) and _has_positions(operand)):
            return model
        positions, classes = int(value.shape[1]), int(value.shape[2])
        count = most_positions(classes)
        if count >= positions or batch_axis(node) != 0:
            return model
        names = frozenset({node.name, *(one.name for one in following)})
        return replace(model, thinning=Thinning(node.name, positions, count, model.keywords, names))
    return model


def _has_positions(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and isinstance(value.shape[1], int)
        and isinstance(value.shape[2], int)
    )


def _following(node: fx.Node) -> list[fx.Node] | None:
    """Return all nodes that come of a node; None where one mixes positions or knows their number.

    Beside the node's values they may read numbers and what is the same at every position.
    """
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output" or user in found:
                continue
            if op_name(user) not in _BY_ELEMENT:
                return None
            found[user] = None
            waiting.append(user)
    if all(_is_same_everywhere(one) for one in _beside(node, found)):
        return list(found)
    return None


def _beside(node: fx.Node, found: dict[fx.Node, None]) -> Iterator[fx.Node]:
    for user in found:
        for one in tree_leaves((user.args, user.kwargs)):
            if isinstance(one, fx.Node) and one is not node and one not in found:
                yield one


def _is_same_everywhere(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and all(size == 1 for size in value.shape[:-1])


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
