"""Channels that keep their places although they might change them, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from clafusion.tracing.labels.drafts import DraftPin
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.model import PinnedChannels, TracedModel
from clafusion.tracing.operations import module_path, op_name

__all__ = ["movable_share", "pinned_channels"]


def pinned_channels(traced: TracedModel, labels: LabelPropagation) -> tuple[PinnedChannels, ...]:
    """Return the channels that a rule of the labels lost, and that nothing else moves.

    Parameters
    ----------
    traced
        The model with its groups and its proved heads.
    labels
        The run on labels from which the groups come.
    """
    count = len(labels.parents)
    free, in_heads, told = (torch.zeros(count, dtype=torch.bool) for _ in range(3))
    told[labels.roots(torch.tensor(sorted(labels.returned), dtype=torch.int64))] = True
    for one in traced.groups:
        free[one.atoms] = one.size > 1
    for heads in traced.heads:
        for index in {index for head in heads.members for index in head}:
            in_heads[traced.groups[index].atoms] = True
            # A module of a list has one channel of its router, which moves with it alone.
            free[traced.groups[index].atoms] |= bool(heads.parameters)
    written, elements = dict(_written(labels)), dict(_elements(labels))
    found = []
    for draft in labels.lost:
        atoms = labels.roots(draft.atoms).unique()
        atoms = atoms[~(told | (in_heads if draft.as_wholes else free))[atoms]]
        told[atoms] = True
        by_parameter: dict[str, int] = {}
        for atom in atoms.tolist():
            name = written.get(atom) or (elements.get(atom) if draft.with_elements else None)
            if name is not None:
                by_parameter[name] = by_parameter.get(name, 0) + 1
        found += [_pinned(draft, name, size) for name, size in by_parameter.items() if size > 1]
    return tuple(found)


def _pinned(draft: DraftPin, parameter: str, size: int) -> PinnedChannels:
    node = draft.node
    return PinnedChannels(parameter, size, op_name(node), module_path(node), draft.why)


def movable_share(traced: TracedModel) -> float:
    """Return which part of a model's trained weights can move, with channels or whole heads."""
    in_heads = {index for one in traced.heads for head in one.members for index in head}
    sizes = {
        traced.aliases.get(name, name): value.numel()
        for name, value in traced.model.named_parameters()
    }
    movable = 0
    for name in sizes:
        for use in traced.uses_by_parameter.get(name, ()):
            kept = list(use.size)
            for group, one in traced.axes_by_parameter.get(name, ()):
                if one.use.index == use.index and (group.size > 1 or group.index in in_heads):
                    kept[one.axis] -= len(one.positions.unique())
            movable += math.prod(use.size) - math.prod(kept)
    return movable / max(sum(sizes.values()), 1)


def _elements(labels: LabelPropagation) -> Iterator[tuple[int, str]]:
    """Yield the roots of all elements of parameters that are no channels of a weight."""
    for name, ids in labels.elements.items():
        yield from ((root, name) for root in labels.roots(ids).tolist())


def _written(labels: LabelPropagation) -> Iterator[tuple[int, str]]:
    """Yield the roots of all channels that a weight writes, with the first such weight."""
    seen: set[int] = set()
    for use in labels.uses.values():
        for axis, ids in use.axes.items():
            if use.role == "element" or use.directions[axis] == "in":
                continue
            roots = labels.roots(ids[ids >= 0]).unique().tolist()
            yield from ((root, use.name) for root in roots if root not in seen)
            seen.update(roots)
