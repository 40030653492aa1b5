"""A copy of the source with fewer different channels, which fits the target's widths exactly.

Of ``n`` channels in the source and ``m`` in the target as many can differ as the greatest common
divisor ``d`` says. Where the source has only ``d`` different ones, each ``n / d`` times, the target
can hold them, each ``m / d`` times: what is read from copies is divided among them, and a norm over
the channels sees the same proportions. So the two compute the same, whatever the code fixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence, identity_correspondence
from clafusion.correspondence.moving import move_state
from clafusion.correspondence.shared_heads import lacks_heads
from clafusion.execution.lazy import overlaid
from clafusion.transport.plan import TransportPlan
from clafusion.weights.build import with_weights

__all__ = ["CopyingPlans", "copying_plans", "with_copied_channels"]


@dataclass(frozen=True)
class CopyingPlans:
    """Plans between channels of which only some differ.

    Attributes
    ----------
    within_source
        For each channel group of the source the plan that makes channels equal.
    into_target
        For each channel group of the target the plan from those, or None.
    """

    within_source: tuple[TransportPlan, ...]
    into_target: tuple[TransportPlan | None, ...]


def copying_plans(correspondence: Correspondence) -> CopyingPlans | None:
    """Return plans under which the source's function fits the target's widths.

    None where there are none: the target has fewer heads of queries that share others of keys, the
    numbers of channels that are added up without weights differ, or
    those of other channels have no common divisor, so that nothing of a network would be left.
    """
    target, source = correspondence.target, correspondence.source
    counts = correspondence.head_counts
    sizes: dict[int, list[tuple[int, int]]] = {}  # of the source's group: (heads, channels of one)
    for one, other in zip(target.groups, correspondence.groups, strict=True):
        if other < 0:
            continue
        partner = source.groups[other]
        of_source, of_target = counts.get(one.index, (1, 1))
        pair = partner.size // of_source, one.size // of_target
        if lacks_heads(one, partner, (of_target, of_source)):
            return None
        if pair[0] != pair[1] and (one.is_counted or partner.is_counted or math.gcd(*pair) == 1):
            return None
        sizes.setdefault(other, [(of_source, pair[0])]).append((of_target, pair[1]))
    # Several groups of the target may correspond to one of the source, about an inserted layer.
    kept = {
        other: tuple(math.gcd(*numbers) for numbers in zip(*every, strict=True))
        for other, every in sizes.items()
    }

    def classes(other: int, size: tuple[int, int]) -> Tensor:
        """Say which channels shall be equal, head after head."""
        heads, channels = (
            torch.arange(number) % number_kept
            for number, number_kept in zip(size, kept[other], strict=True)
        )
        return (heads[:, None] * kept[other][1] + channels).flatten()

    within = [TransportPlan.identity(one.size) for one in source.groups]
    into: list[TransportPlan | None] = []
    for one, other in zip(target.groups, correspondence.groups, strict=True):
        if other < 0:
            into.append(None)
            continue
        of_source, of_target = counts.get(one.index, (1, 1))
        own = classes(other, (of_source, source.groups[other].size // of_source))
        theirs = classes(other, (of_target, one.size // of_target))
        within[other] = _equal(own, own)
        into.append(_equal(own, theirs))
    return CopyingPlans(tuple(within), tuple(into))


def _equal(ones: Tensor, others: Tensor) -> TransportPlan:
    """Return the plan by which each channel gets mass 1 from every one of its class."""
    ordered, rows = ones.sort(stable=True)
    first, last = (torch.searchsorted(ordered, others, right=end) for end in (False, True))
    counts = last - first
    columns = torch.arange(len(others)).repeat_interleave(counts)
    turns = torch.arange(len(columns)) - (counts.cumsum(0) - counts)[columns]
    masses = torch.ones(len(columns), dtype=torch.float64)
    shape = len(ones), len(others)
    return TransportPlan.from_entries(shape, rows[first[columns] + turns], columns, masses)


def with_copied_channels(
    correspondence: Correspondence, within: Sequence[TransportPlan]
) -> Correspondence:
    """Return the correspondence of a copy of the source in which channels are made equal."""
    source = correspondence.source
    moved = move_state(identity_correspondence(source), within)
    state = overlaid(source.state(), moved)
    return replace(correspondence, source=with_weights(source, state))
