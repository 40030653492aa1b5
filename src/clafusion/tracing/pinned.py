"""Channels that keep their places although they might change them, and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.model import PinnedChannels, TracedModel
from clafusion.tracing.operations import module_path, op_name

__all__ = ["pinned_channels"]


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
    written = dict(_written(labels))
    found = []
    for draft in labels.lost:
        atoms = labels.roots(draft.atoms).unique()
        atoms = atoms[~(told | (in_heads if draft.as_wholes else free))[atoms]]
        told[atoms] = True
        by_parameter: dict[str, int] = {}
        for atom in atoms.tolist():
            if atom in written:
                by_parameter[written[atom]] = by_parameter.get(written[atom], 0) + 1
        found += [
            PinnedChannels(name, size, op_name(draft.node), module_path(draft.node), draft.why)
            for name, size in by_parameter.items()
            if size > 1
        ]
    return tuple(found)


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
