"""Streams in a region whose branches exchange values, as those of HRNet.

Where branches join and part again, no chain of post-dominators runs along one of them. But between
two exchanges the values of a branch follow one another alone: all that lies between two of them
reads the earlier one, and nothing else of the region. Such *stretches* are streams, if layers can
be inserted into them. What lies between them is computed for those that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from clafusion.tracing.flow import Flow
from clafusion.tracing.regions import Region, Run, Segment

__all__ = ["branches_of"]


@dataclass(frozen=True)
class _Link:
    """Two values of which the second is computed of nothing in the region but the first.

    ``interior`` are the nodes between them, ``is_all`` says whether nothing else reads the first.
    """

    node: fx.Node
    interior: list[fx.Node]
    is_all: bool


def branches_of(
    flow: Flow,
    nodes: Sequence[fx.Node],
    entry: fx.Node | None,
    has_exit: bool,
    holds_layers: Callable[[Sequence[Run]], list[bool]],
) -> list[Run] | None:
    """Return the stretches of a region, and last the run that ends at its last node.

    Parameters are those of :func:`clafusion.tracing.regions.runs_of`. None where no stretch holds
    layers, or where the region ends within one.
    """
    if entry is None:
        return None
    region = Region(flow, nodes, entry, has_exit)
    runs = _stretches(region)
    kept = [run for run, holds in zip(runs, holds_layers(runs), strict=True) if holds]
    if not kept:
        return None
    owner = {
        node: one for run in kept for one in run.segments for node in (*one.interior, one.node)
    }
    main = Segment(region.nodes[-1], is_open=not has_exit)
    if owner.setdefault(main.node, main) is not main:
        return None
    others: list[Run] = []
    for node in reversed(region.nodes):
        if node in owner:
            continue
        readers = {id(one): one for one in (owner.get(user, main) for user in node.users)}
        if len(readers) == 1:
            (into,) = readers.values()
            into.interior.insert(0, node)
        else:
            into = Segment(node)
            others.append(Run([into], None))
        owner[node] = into
    for run in (*kept, *others):
        for one in run.segments:
            one.interior.sort(key=region.place.__getitem__)
    main.interior.sort(key=region.place.__getitem__)
    return [*kept, *others, Run([main], entry)]


def _stretches(region: Region) -> list[Run]:
    """Return all stretches of a region, in graph order."""
    assert region.entry is not None
    consumed: set[fx.Node] = set()
    links: dict[fx.Node, list[_Link]] = {}
    before: dict[fx.Node, fx.Node] = {}
    for node in (region.entry, *region.nodes):
        if node in consumed:
            continue
        links[node] = _links(region, node)
        for one in links[node]:
            consumed.update(one.interior)
            before[one.node] = node
    runs = []
    for node in region.nodes:
        if node in consumed:
            continue
        previous = before.get(node)
        found = [one for one in links.get(previous, []) if one.node is node] if previous else []
        if found and found[0].is_all and previous is not region.entry:
            continue  # the stretch of that node goes on here
        segments = [Segment(node, list(found[0].interior) if found else [])]
        while len(links[node]) == 1 and links[node][0].is_all:
            (one,) = links[node]
            segments.append(Segment(one.node, list(one.interior)))
            node = one.node
        runs.append(Run(segments, previous))
    return runs


def _links(region: Region, node: fx.Node) -> list[_Link]:
    """Return what follows a node, of nothing else of the region."""
    users = [user for user in node.users if user in region.inside]
    found: list[_Link] = []
    taken: set[fx.Node] = set()
    for user in sorted(users, key=region.place.__getitem__):
        if user in taken:
            continue
        one = _link(region, node, user, users)
        if one is not None:
            found.append(one)
            taken.update((*one.interior, one.node))
    return found


def _link(region: Region, node: fx.Node, user: fx.Node, users: Sequence[fx.Node]) -> _Link | None:
    """Return the next value behind one of a node's users that is computed of the node alone."""
    end: fx.Node | None = user
    while end is not None:
        own = [one for one in users if _passes(region, one, end)]
        interior = _between(region, node, own, end)
        if interior is None:
            return None
        others = [one for one in users if one not in own and one not in interior]
        if not any(region.enters(end, one) for one in others):
            return _Link(end, interior, not others)
        end = region.next[end]
    return None


def _passes(region: Region, node: fx.Node, end: fx.Node) -> bool:
    """Return whether all paths from a node pass another one, or are it."""
    following: fx.Node | None = node
    while following is not None and region.place[following] < region.place[end]:
        following = region.next[following]
    return following is end


def _between(
    region: Region, node: fx.Node, first: Sequence[fx.Node], end: fx.Node
) -> list[fx.Node] | None:
    """Return the nodes on the ways from a node to another; None where others enter there."""
    found: set[fx.Node] = set()
    waiting = list(first)
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        if one is not end:
            waiting += [user for user in one.users if user in region.inside]
    inside = {node, *found}
    entering = {operand for one in found for operand in one.all_input_nodes} & region.inside
    if any(not region.flow.is_same_for_all(one) for one in entering - inside):
        return None
    return sorted(found - {end}, key=region.place.__getitem__)
