"""Channels that keep their places although they might change them, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

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
    written = _Owners(count, _written(labels))
    elements = _Owners(count, reversed(list(_elements(labels))))  # of several the last
    found = []
    for draft in labels.lost:
        atoms = labels.roots(draft.atoms).unique()
        atoms = atoms[~(told | (in_heads if draft.as_wholes else free))[atoms]]
        told[atoms] = True
        owners = written.of(atoms)
        if draft.with_elements:
            owners = [one or other for one, other in zip(owners, elements.of(atoms), strict=True)]
        by_parameter = Counter(name for name in owners if name is not None)
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


class _Owners:
    """For each atom the name of the first parameter that owns it, if any."""

    def __init__(self, count: int, owned: Iterable[tuple[str, Tensor]]) -> None:
        self._names: list[str | None] = [None]
        self._numbers = torch.zeros(count, dtype=torch.int64)
        for name, atoms in owned:
            self._numbers[atoms[self._numbers[atoms] == 0]] = len(self._names)
            self._names.append(name)

    def of(self, atoms: Tensor) -> list[str | None]:
        """Return the names for some atoms."""
        return [self._names[number] for number in self._numbers[atoms].tolist()]


def _elements(labels: LabelPropagation) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name with the roots of its elements that are no channels."""
    for name, ids in labels.elements.items():
        roots = labels.roots(ids)
        yield name, roots[roots >= 0]


def _written(labels: LabelPropagation) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight's name with the roots of the channels that it writes."""
    for use in labels.uses.values():
        for axis, ids in use.axes.items():
            if use.role != "element" and use.directions[axis] != "in":
                yield use.name, labels.roots(ids[ids >= 0])
