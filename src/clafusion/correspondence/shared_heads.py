"""Heads of queries that share one of keys and values, of other numbers in two networks.

Such heads have no channel groups of their own: each channel of the keys and values stands for one
place of every head that shares it. Where other numbers share, a plan of the channels becomes one of
the places. Every place gets a head of the source's, and every head of the source's a place: where
the target has at least as many, the source's function stays as it is, for copies of a head divide
what reads them; where it has fewer, some of its heads are a mean of several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from clafusion.tracing.model import ChannelGroup
from clafusion.transport.plan import TransportPlan

__all__ = ["has_keys", "lacks_heads", "plan_of_places", "share_otherwise"]

_Head = tuple[int, int]  # a head of keys, and one of those of queries that share it


def share_otherwise(
    target: ChannelGroup, source: ChannelGroup, places: int, places_of_source: int
) -> bool:
    """Return whether other numbers of heads explain other numbers of places on an axis."""
    return places != places_of_source and (
        places * source.sharing == places_of_source * target.sharing
        or has_keys(target, source, places, places_of_source)
    )


def has_keys(
    target: ChannelGroup, source: ChannelGroup, places: int, places_of_source: int
) -> bool:
    """Return whether the places are of keys, too, behind those of the queries that share them."""
    return target.sharing != source.sharing and places * (
        source.sharing + 1
    ) == places_of_source * (target.sharing + 1)


def lacks_heads(target: ChannelGroup, source: ChannelGroup, counts: tuple[int, int]) -> bool:
    """Return whether not every head of queries of the source has a place in the target.

    ``counts`` says of how many heads of keys the groups are, those of the target first.
    """
    return (
        target.sharing != source.sharing and target.sharing * counts[0] < source.sharing * counts[1]
    )


def plan_of_places(
    plan: TransportPlan, target: ChannelGroup, source: ChannelGroup, *, keys: bool = False
) -> TransportPlan:
    """Return the plan of the places of channels that heads of queries share.

    Parameters
    ----------
    plan
        From the source's channels to the target's.
    target, source
        Their groups.
    keys
        Whether behind the places in the heads of queries each channel has one of its own.

    Returns
    -------
    TransportPlan
        Of ``source.size * source.sharing`` places to ``target.size * target.sharing``: the first
        channel's in all heads that share it, then the second one's. With ``keys`` each channel has
        one place more.
    """
    rows, columns, masses = plan.entries
    rows, columns = rows.long(), columns.long()
    heads = rows // (source.size // source.heads), columns // (target.size // target.heads)
    together = set(zip(*(one.tolist() for one in heads), strict=True))
    each = source.sharing + keys, target.sharing + keys  # places of a channel
    found = []
    for (i, s), (j, r) in _together(together, source.sharing, target.sharing):
        chosen = (heads[0] == i) & (heads[1] == j)
        found.append((rows[chosen] * each[0] + s, columns[chosen] * each[1] + r, masses[chosen]))
    if keys:
        behind = rows * each[0] + source.sharing, columns * each[1] + target.sharing
        found.append((*behind, masses))
    shape = source.size * each[0], target.size * each[1]
    if not found:
        empty = torch.empty(0, dtype=torch.int64)
        return TransportPlan.from_entries(shape, empty, empty, empty.double())
    return TransportPlan.from_entries(shape, *map(torch.cat, zip(*found, strict=True)))


def _together(
    keys: Iterable[tuple[int, int]], of_source: int, of_target: int
) -> list[tuple[_Head, _Head]]:
    """Return which heads of queries go together, given which of the keys (source, target) do.

    Each of the target's takes that of the source's which has been taken least often; those that
    are left go where fewest are.
    """
    keys = sorted(keys)
    taken: Counter[_Head] = Counter()
    held: Counter[_Head] = Counter()
    found: list[tuple[_Head, _Head]] = []

    def pair(source: _Head, target: _Head) -> None:
        taken[source] += 1
        held[target] += 1
        found.append((source, target))

    for j in sorted({j for _, j in keys}):
        partners = [(i, s) for i, of in keys if of == j for s in range(of_source)]
        for r in range(of_target):
            pair(min(partners, key=lambda one: (taken[one], one)), (j, r))
    for i in sorted({i for i, _ in keys}):
        places = [(j, r) for of, j in keys if of == i for r in range(of_target)]
        for s in range(of_source):
            if not taken[i, s]:
                pair((i, s), min(places, key=lambda one: (held[one], one)))
    return found
