"""Mixtures with other numbers of experts: the smaller ones get copies of theirs.

Of an expert whose share is a softmax over all experts, copies divide the share among them: equally
many of each change nothing, and with a bias in the router any number, for a bias that is less by
``log(n)`` makes each of ``n`` copies count for one n-th. Where a router chooses a few experts, the
copies of one would take the place of others, so that nothing can be added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.targets.completing import own_state, with_more_children
from clafusion.tracing.layer import common_path
from clafusion.tracing.model import HeadPartition, TracedModel

__all__ = ["with_equal_experts"]


def with_equal_experts(models: Sequence[TracedModel]) -> list[TracedModel]:
    """Give lists of modules that can change places as many as the longest such list has.

    Lists correspond by their paths, but for the numbers in them. A network that would compute
    something else stays as it is.
    """
    lists = [_lists(model) for model in models]
    longest: dict[str, int] = {}
    for of_model in lists:
        for path, heads in of_model.items():
            longest[_kind(path)] = max(longest.get(_kind(path), 0), len(heads.members))
    found = []
    for model, of_model in zip(models, lists, strict=True):
        shorter = {
            path: (heads, longest[_kind(path)])
            for path, heads in of_model.items()
            if len(heads.members) < longest[_kind(path)]
        }
        found.append(_completed(model, shorter) if shorter else model)
    return found


def _lists(model: TracedModel) -> dict[str, HeadPartition]:
    """Return the modules that can change places, by the path of their list."""
    return {
        common_path(names[0] for names in heads.parameters): heads
        for heads in model.heads
        if heads.parameters
    }


def _kind(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)


def _completed(model: TracedModel, shorter: dict[str, tuple[HeadPartition, int]]) -> TracedModel:
    """Return a network with copies of the modules, or itself if all that changes it."""
    state = own_state(model)
    additions: dict[str, dict[str, str]] = {}
    for path, (heads, count) in shorter.items():
        keys = [names[0].removeprefix(f"{path}.").split(".")[0] for names in heads.parameters]
        if keys != [str(i) for i in range(len(keys))]:
            return model
        originals = [i % len(keys) for i in range(count)]
        additions[path] = {str(i): str(originals[i]) for i in range(len(keys), count)}
        for i in range(len(keys), count):
            start = f"{path}.{originals[i]}."
            for name in heads.parameters[originals[i]]:
                state[f"{path}.{i}.{name.removeprefix(start)}"] = state[name]
        _copy_channels(model, heads, originals, state)
    return with_more_children(model, additions, state) or model


def _copy_channels(
    model: TracedModel, heads: HeadPartition, originals: Sequence[int], state: dict[str, Tensor]
) -> None:
    """Copy the channels outside of the modules that belong to one each, as those of a router."""
    copies = torch.tensor([originals.count(i) for i in originals])
    columns = [
        [model.groups[index] for index in column]
        for column in zip(*heads.members, strict=True)
        if model.groups[column[0]].size == 1
    ]
    for column in columns:
        for axes in zip(*(one.axes for one in column), strict=True):
            name, axis = axes[0].use.parameter, axes[0].axis
            own = torch.cat([one.positions.flatten() for one in axes])
            if axes[0].positions.numel() != 1 or len(own) != state[name].size(axis):
                continue
            value = state[name].index_select(axis, own[list(originals)].to(state[name].device))
            if value.dim() == 1 and axes[0].direction == "out":
                value = value - copies.to(value).log()
            state[name] = value
