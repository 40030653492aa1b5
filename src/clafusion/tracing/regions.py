"""Split a region of a graph into the streams that run side by side in it.

A node's *post-dominator* is the next node through which all paths from it pass. The chain of
post-dominators of a value is the stream that it runs along, even where values of other streams
enter from the side: a decoder's sums follow one another, though all its blocks read the encoder's
states.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from clafusion.tracing.flow import Flow
from clafusion.tracing.operations import SAME_VALUES, bound_operands, op_name

__all__ = ["Region", "Run", "Segment", "divided", "runs_of"]


@dataclass
class Segment:
    """A node of a chain, with what is computed for it since the chain's node before.

    Attributes
    ----------
    node
        The node.
    interior
        The nodes between it and the one before, in graph order.
    is_head
        Whether a stream begins with it, as values from far away enter.
    is_open
        Whether nothing joins its paths, of which several end at outputs.
    """

    node: fx.Node
    interior: list[fx.Node] = field(default_factory=list)
    is_head: bool = False
    is_open: bool = False


@dataclass
class Run:
    """A stretch of a stream.

    Attributes
    ----------
    segments
        Its segments, in order.
    entry
        The value of the chain before the first segment; None where the chain begins here.
    """

    segments: list[Segment]
    entry: fx.Node | None

    @property
    def parts(self) -> list[Run]:
        """The run, divided where streams begin; nothing where a layer has taken all of it."""
        if not self.segments:
            return []
        starts = [i for i, one in enumerate(self.segments) if one.is_head or i == 0]
        return [
            Run(self.segments[start:end], self.segments[start - 1].node if start else self.entry)
            for start, end in zip(starts, [*starts[1:], len(self.segments)], strict=True)
        ]

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes, in the order of the segments."""
        return [node for one in self.segments for node in (*one.interior, one.node)]


class Region:
    """The part of a graph between two values, as a graph of its own.

    Parameters
    ----------
    flow
        The flow of the whole graph.
    nodes
        The region's nodes, in graph order; the last is its exit if ``has_exit``.
    entry
        The value that enters it, or None.
    has_exit
        Whether all paths end at the last node. Else they end outside of the region.
    """

    def __init__(
        self, flow: Flow, nodes: Sequence[fx.Node], entry: fx.Node | None, has_exit: bool
    ) -> None:
        self.flow = flow
        self.entry = entry
        self.nodes = list(nodes)
        self.exit = self.nodes[-1] if has_exit else None
        self.inside = frozenset(nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.near = self._near_readers()
        self.next = self._post_dominators(self.near)
        self.after = self._descendants()

    def users(self, node: fx.Node, near: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the region's nodes that read a node; of the entry the given ones."""
        if node is self.entry:
            return list(near)
        return [user for user in node.users if user in self.inside]

    def _near_readers(self) -> list[fx.Node]:
        """Return the readers of the entry along which its stream goes on.

        Those from the last on are left out until the entry's post-dominator is not the exit.
        """
        if self.entry is None:
            return []
        readers = sorted(
            (user for user in self.entry.users if user in self.inside), key=self.place.__getitem__
        )
        while len(readers) > 1 and self._post_dominators(readers)[self.entry] is self.exit:
            readers.pop()
        return readers

    def _post_dominators(self, near: Sequence[fx.Node]) -> dict[fx.Node, fx.Node | None]:
        """Return for each node the next one that all its paths pass; None outside the region."""
        depth: dict[fx.Node | None, int] = {None: 0}
        found: dict[fx.Node, fx.Node | None] = {}

        def common(one: fx.Node | None, other: fx.Node | None) -> fx.Node | None:
            while one is not other:
                if depth[one] < depth[other]:
                    one, other = other, one
                assert one is not None
                one = found[one]
            return one

        first = [] if self.entry is None else [self.entry]
        for node in reversed([*first, *self.nodes]):
            users = [] if node is self.exit else self.users(node, near)
            leaves = node is not self.entry and len(users) < len(
                [user for user in node.users if user in self.flow]
            )
            if node is self.exit or not users or (leaves and self.exit is None):
                following = None
            else:
                following = users[0]
                for user in users[1:]:
                    following = common(following, user)
            found[node] = following
            depth[node] = depth[following] + 1
        return found

    def _descendants(self) -> dict[fx.Node, int]:
        """Return for each node, as bits by their places, the nodes that its value enters."""
        found: dict[fx.Node, int] = {}
        first = [] if self.entry is None else [self.entry]
        for node in reversed([*first, *self.nodes]):
            bits = 0
            for user in self.users(node, self.near):
                bits |= found[user] | 1 << self.place[user]
            found[node] = bits
        return found

    def enters(self, node: fx.Node, other: fx.Node) -> bool:
        """Return whether a node's value enters another node."""
        return bool(self.after[node] >> self.place[other] & 1) if other in self.place else False

    def sources(self) -> Iterator[fx.Node]:
        """Yield where streams begin: the entry, and nodes that read nothing of the region."""
        if self.entry is not None:
            yield self.entry
        near = frozenset(self.near)
        for node in self.nodes:
            if node not in near and not any(one in self.inside for one in node.all_input_nodes):
                yield node


def runs_of(
    flow: Flow,
    nodes: Sequence[fx.Node],
    entry: fx.Node | None,
    has_exit: bool,
    holds_layers: Callable[[Sequence[Run]], list[bool]],
) -> list[Run] | None:
    """Return the runs side by side in a region; None where nothing in it is worth a run.

    Parameters
    ----------
    flow, nodes, entry, has_exit
        The region: its nodes in graph order, the value that enters, and whether all paths end at
        the last node, which the last run then ends with.
    holds_layers
        Says of each of the runs whether layers can be inserted into it. One that has none is a part
        of the layer that reads it.
    """
    region = Region(flow, nodes, entry, has_exit)
    chain, before = _chains(region)
    left = _leave_blocks(region, chain, before)
    runs = _runs(region, chain, before)
    if runs is None:
        return None
    runs = _without_parts(region, runs, before, left, holds_layers)
    far = [user for user in ([] if entry is None else entry.users) if user in region.inside]
    far = [user for user in far if user not in region.near]
    for run in runs:
        for one in run.segments:
            one.is_head |= any(user in (*one.interior, one.node) for user in far)
        if far and run.entry is entry:
            run.segments[0].is_head = True
    return runs if any(holds_layers(runs)) else None


def _chains(region: Region) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
    """Return the nodes of all chains of post-dominators, and which goes on in which."""
    chain: set[fx.Node] = set()
    for source in region.sources():
        node: fx.Node | None = source
        while node is not None and node not in chain:
            chain.add(node)
            node = region.next[node]
    joined: dict[fx.Node, list[fx.Node]] = {}
    for node in (*([] if region.entry is None else [region.entry]), *region.nodes):
        following = region.next.get(node)
        if node in chain and following is not None:
            joined.setdefault(following, []).append(node)
    of_inputs = _of_inputs(region, chain)
    before = {}
    for node, several in joined.items():
        going_on = _going_on(region, node, several, of_inputs)
        if going_on is not None:
            before[node] = going_on
    return chain, before


def _of_inputs(region: Region, chain: Container[fx.Node]) -> set[fx.Node]:
    """Return the nodes of chains that begin with what depends on the model's inputs.

    Others begin with a table of positions, as that of an attention's biases.
    """
    found: set[fx.Node] = set()
    for source in region.sources():
        node: fx.Node | None = source
        is_of_inputs = source is region.entry or not region.flow.is_same_for_all(source)
        while is_of_inputs and node is not None and node in chain and node not in found:
            found.add(node)
            node = region.next[node]
    return found


def _going_on(
    region: Region, node: fx.Node, joined: Sequence[fx.Node], of_inputs: Container[fx.Node]
) -> fx.Node | None:
    """Return which of the chains that meet at a node goes on there; None where all end.

    It is the one that a residual addition takes as it is, or else the one whose values come last of
    all; where nothing is added up, of all those ``of_inputs``.
    """
    is_sum = op_name(node) == "add" and bound_operands(node).get("alpha", 1) == 1
    added = [one for one in joined if is_sum and one in node.all_input_nodes]
    for one in added:
        others = [other for other in node.all_input_nodes if other is not one]
        if any(region.enters(one, other) for other in others):
            return one
    if not is_sum:
        joined = [one for one in joined if one in of_inputs] or joined
    last = [one for one in joined if not any(region.enters(one, other) for other in joined)]
    if len(last) > 1:
        last = [one for one in last if one in added]
    return last[0] if len(last) == 1 else None


def _leave_blocks(
    region: Region, chain: set[fx.Node], before: dict[fx.Node, fx.Node]
) -> set[fx.Node]:
    """Take out of a chain what lies within a block of another one, and return where it ends then.

    A chain joins another one within a block, as keys and values do, or a table of positions. From
    there on, where the other chain's value enters its nodes, they belong to that block.
    """
    goes_on = set(before.values())
    ends = [node for node in region.nodes if node in chain and node not in goes_on]
    left = set()
    for end in ends:
        following = region.next[end]
        previous = None if following is None else before.get(following)
        if previous is None:
            continue
        path = [end]
        while before.get(path[-1]) not in (None, region.entry):
            path.append(before[path[-1]])
        inside = [node for node in path if region.enters(previous, node)]
        for node in inside:
            chain.discard(node)
            before.pop(node, None)
        if inside and len(inside) < len(path):
            left.add(path[len(inside)])
    return left


def _runs(region: Region, chain: set[fx.Node], before: dict[fx.Node, fx.Node]) -> list[Run] | None:
    """Return every chain with the nodes that belong to it; None where some belong to none."""
    interior: dict[fx.Node, list[fx.Node]] = {}
    for node in region.nodes:
        if node in chain:
            continue
        owner = _reader(region, chain, node)
        if owner is None:
            return None
        previous = before.get(owner)
        if previous is not None and region.enters(node, previous):
            return None  # an earlier layer reads it, too
        interior.setdefault(owner, []).append(node)
    goes_on = set(before.values())
    runs = []
    for node in region.nodes:
        if node not in chain or node in goes_on:
            continue
        segments, entry = [Segment(node, interior.get(node, []))], before.get(node)
        while entry is not None and entry is not region.entry:
            segments.append(Segment(entry, interior.get(entry, [])))
            entry = before.get(entry)
        runs.append(Run(segments[::-1], entry))
    return runs


def _reader(region: Region, chain: Container[fx.Node], node: fx.Node) -> fx.Node | None:
    """Return the node of a chain for which a node is computed."""
    following = region.next[node]
    while following is not None and following not in chain:
        following = region.next[following]
    return following


def _without_parts(
    region: Region,
    runs: Sequence[Run],
    before: dict[fx.Node, fx.Node],
    left: Container[fx.Node],
    holds_layers: Callable[[Sequence[Run]], list[bool]],
) -> list[Run]:
    """Return the runs that stay, with those put into a layer that are a part of it."""
    owner = {
        node: one for run in runs for one in run.segments for node in (*one.interior, one.node)
    }
    runs = sorted(runs, key=lambda one: region.place[one.segments[-1].node])
    chain = {one.node for run in runs for one in run.segments}
    readers = [_reader(region, chain, run.segments[-1].node) for run in runs]
    parts: list[list[Segment]] = []
    for run, reader in zip(runs, readers, strict=True):
        inside: list[Segment] = []
        if reader is not None and run.segments[-1].node in left:
            inside = _inside(region, run, before[reader], owner[reader].interior)
        parts.append(inside)
        run.segments = run.segments[: len(run.segments) - len(inside)]
    kept = []
    holds = holds_layers(runs)
    for run, reader, inside, stays in zip(runs, readers, parts, holds, strict=True):
        if reader is None:
            kept.append(run)
            continue
        if run.segments and stays:
            kept.append(run)
        else:
            inside = run.segments + inside
        nodes = [node for one in inside for node in (*one.interior, one.node)]
        if nodes:
            _put_into(region, owner, nodes, owner[reader])
    return kept


def _put_into(
    region: Region, owner: dict[fx.Node, Segment], nodes: Sequence[fx.Node], reader: Segment
) -> None:
    """Put nodes into the first segment that reads them."""
    inside = set(nodes)
    users = [user for node in nodes for user in region.users(node, ()) if user not in inside]
    first = min(users, key=region.place.__getitem__, default=None)
    into = reader if first is None else owner[first]
    into.interior = sorted([*into.interior, *nodes], key=region.place.__getitem__)
    owner.update(dict.fromkeys(nodes, into))


def _inside(region: Region, run: Run, previous: fx.Node, block: Sequence[fx.Node]) -> list[Segment]:
    """Return a run's last segments that belong to the block of another stream that reads it.

    Where a block makes keys and values at once of the run's value, the layer that does is of that
    block: of several blocks each has its own, and the run ends before. ``block`` are the block's
    nodes, ``previous`` is the other stream's value before it.
    """
    flow, segments = region.flow, run.segments
    end = segments[-1].node
    of_end = (node for node in block if region.enters(end, node))
    if any(flow.is_weighted(node) and not region.enters(previous, node) for node in of_end):
        return []
    start = len(segments)
    while start > 0 and flow.is_glue(segments[start - 1].node):
        start -= 1
    if start == 0 or not flow.is_weighted(segments[start - 1].node):
        return []
    start -= 1
    while start > 1 and flow.is_glue(segments[start - 1].node):
        if op_name(segments[start - 1].node) in SAME_VALUES:
            break
        start -= 1
    return segments[start:]


def divided(flow: Flow, runs: Sequence[Run]) -> list[Run] | None:
    """Divide runs behind every value that others read, and order them.

    So such a value stands at a run's end, whatever is inserted before it, and no run reads one that
    comes behind it. None where two runs read each other's values in turns.
    """
    owner = {node: i for i, run in enumerate(runs) for node in run.nodes}
    parts: list[Run] = []
    for i, run in enumerate(runs):
        segments: list[Segment] = []
        before = run.entry
        for one in run.segments:
            last = segments[-1].node if segments else None
            is_read = last is not None and any(
                user.op == "output" or owner.get(user, i) != i for user in last.users
            )
            if segments and (is_read or one.is_head):
                parts.append(Run(segments, before))
                segments, before = [], last
            segments.append(one)
        parts.append(Run(segments, before))
    return _ordered(flow, parts)


def _ordered(flow: Flow, runs: Sequence[Run]) -> list[Run] | None:
    """Return the runs, each behind those whose values it reads; None where there is no order."""
    owner = {node: i for i, run in enumerate(runs) for node in run.nodes}
    needs = [
        {owner[one] for node in run.nodes for one in node.all_input_nodes if one in owner} - {i}
        for i, run in enumerate(runs)
    ]
    first = [min(flow.order[node] for node in run.nodes) for run in runs]
    done: list[int] = []
    while len(done) < len(runs):
        ready = [i for i in range(len(runs)) if i not in done and needs[i] <= set(done)]
        if not ready:
            return None
        done.append(min(ready, key=first.__getitem__))
    return [runs[i] for i in done]
