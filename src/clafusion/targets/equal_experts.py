"""Mixtures with other numbers of experts: the smaller ones get copies of theirs.

Of an expert whose share is a softmax over all experts, copies divide the share among them: equally
many of each change nothing, and with a bias in the router any number, for a bias that is less by
``log(n)`` makes each of ``n`` copies count for one n-th. Where a router chooses ``k`` experts,
``m`` copies of each change nothing if it chooses ``m * k``: all copies of those that it chose
before, for a copy has its original's score. Of other numbers the copies of one would take the place
of others.

Experts are modules of a list, or lie in one tensor whose first axis they are. The numbers that a
mixture's code has for them are attributes of its modules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.targets.completing import own_state, with_more_children
from clafusion.tracing.layer import common_path
from clafusion.tracing.model import HeadPartition, TracedModel
from clafusion.tracing.operations import bound_operands, op_name

__all__ = ["with_equal_experts"]

# In the names of attributes. What is found so is tried, and kept if the network computes the same.
_OF_EXPERTS = re.compile(r"expert")
_OF_CHOSEN = re.compile(r"top_?k|per_tok|chosen|selected|active|^k$")


def with_equal_experts(models: Sequence[TracedModel]) -> list[TracedModel]:
    """Give mixtures as many experts as the largest at their place has.

    Mixtures correspond by their paths, but for the numbers in them. A network that would compute
    something else stays as it is.
    """
    mixtures = [_mixtures(model) for model in models]
    longest: dict[str, int] = {}
    for of_model in mixtures:
        for path, heads in of_model.items():
            longest[_kind(path)] = max(longest.get(_kind(path), 0), len(heads.members))
    found = []
    for model, of_model in zip(models, mixtures, strict=True):
        smaller = {
            path: (heads, longest[_kind(path)])
            for path, heads in of_model.items()
            if len(heads.members) < longest[_kind(path)]
        }
        found.append(_completed(model, smaller) if smaller else model)
    return found


def _mixtures(model: TracedModel) -> dict[str, HeadPartition]:
    """Return the experts that can change places, by the path of their list or of their mixture."""
    found = {
        common_path(names[0] for names in heads.parameters): heads
        for heads in model.heads
        if heads.parameters
    }
    for heads in model.heads:
        names = _stacked(model, heads)
        if names:
            found[common_path(name.rpartition(".")[0] for name in names)] = heads
    return found


def _stacked(model: TracedModel, heads: HeadPartition) -> list[str]:
    """Return the parameters of experts that lie in one tensor; none where they do not."""
    if heads.parameters or heads.is_shared:
        return []
    shapes = {name: tensor.shape for name, tensor in model.module_state().items()}
    axes = [one for index in heads.members[0] for one in model.groups[index].axes]
    uses = [one.use for one in axes if shapes[one.use.parameter][0] == len(heads.members)]
    is_stack = any(len(use.size) == len(shapes[use.parameter]) - 1 == 2 for use in uses)
    return list(dict.fromkeys(use.parameter for use in uses)) if is_stack else []


def _kind(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)


def _completed(model: TracedModel, smaller: dict[str, tuple[HeadPartition, int]]) -> TracedModel:
    """Return a network with copies of the experts, or itself if all that changes it."""
    state = own_state(model)
    additions: dict[str, dict[str, str]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for path, (heads, count) in smaller.items():
        own = len(heads.members)
        chosen = _chosen(model, heads)
        if chosen and count % own:
            return model
        if heads.parameters:
            keys = [names[0].removeprefix(f"{path}.").split(".")[0] for names in heads.parameters]
            if keys != [str(i) for i in range(len(keys))]:
                return model
            originals = [i % own for i in range(count)]
            additions[path] = {str(i): str(originals[i]) for i in range(own, count)}
            for i in range(own, count):
                start = f"{path}.{originals[i]}."
                for name in heads.parameters[originals[i]]:
                    state[f"{path}.{i}.{name.removeprefix(start)}"] = state[name]
            _copy_channels(model, heads, originals, state)
            mixture = path.rpartition(".")[0]
        else:
            if count % own:
                return model
            mixture = path
            for name in [one for one in state if one.startswith(f"{path}.")]:
                if state[name].dim() and len(state[name]) == own:
                    state[name] = torch.cat([state[name]] * (count // own))
        numbers |= _numbers(model, mixture, own, count, chosen)
    return with_more_children(model, additions, state, numbers) or model


def _chosen(model: TracedModel, heads: HeadPartition) -> int | None:
    """Return how many of some experts take part; None where all do."""
    inside = set(model.layers[heads.layer].nodes)
    for node in model.module.graph.nodes:
        if node.name in inside and op_name(node) == "topk":
            return int(bound_operands(node)["k"])
    return None


def _numbers(
    model: TracedModel, mixture: str, own: int, count: int, chosen: int | None
) -> dict[tuple[str, str], int]:
    """Return the attributes of a mixture's modules that say how many experts there are."""
    found = {}
    for path, module in model.model.get_submodule(mixture).named_modules(prefix=mixture):
        for name, value in vars(module).items():
            if type(value) is not int:
                continue
            if value == own and _OF_EXPERTS.search(name):
                found[path, name] = count
            elif value == chosen and _OF_CHOSEN.search(name):
                found[path, name] = value * count // own
    return found


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
