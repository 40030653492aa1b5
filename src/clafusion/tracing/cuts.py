"""Cut the flow of a graph into streams, and those into drafts of layers.

Where the whole graph narrows to one value there is a *cut*: a node through which every path from
the input to the output passes. Where paths part and join between two cuts lies a residual block; in
between run chains of single layers. Such a network has one stream, its trunk.

Where layers lie *within* a region between two cuts (in an encoder whose states all blocks of a
decoder read, on a level of a U-Net), the region has streams of its own: see
:mod:`clafusion.tracing.regions`, and where they exchange values :mod:`clafusion.tracing.branches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import fx

from clafusion.tracing.branches import branches_of
from clafusion.tracing.drafts import Draft, drafts_of
from clafusion.tracing.flow import Flow
from clafusion.tracing.insertion import insertion
from clafusion.tracing.operations import op_name
from clafusion.tracing.post_norm import with_norms_before
from clafusion.tracing.regions import Run, Segment, divided, runs_of

__all__ = ["cut_into_drafts", "side_nodes"]


def cut_into_drafts(flow: Flow) -> list[Draft]:
    """Return the drafts of all layers: stream after stream, each behind those that it reads.

    Regions are divided into streams with and without exchanges between them, and the way is taken
    by which more residual blocks can be inserted.
    """
    runs = _runs(flow, exchange=False)
    found = _drafts(flow, runs)
    others = _runs(flow, exchange=True)
    if [run.nodes for run in others] != [run.nodes for run in runs]:
        drafts = _drafts(flow, others)
        if _count_blocks(flow, drafts) > _count_blocks(flow, found):
            return drafts
    return found


def _runs(flow: Flow, *, exchange: bool) -> list[Run]:
    """Return the runs of a graph; the trunk alone where streams read each other in turns."""
    runs = _with_inner_runs(flow, Run(_segments(flow), None), exchange=exchange)
    if len(runs) > 1 or any(one.is_head for one in runs[0].segments):
        return divided(flow, runs) or [Run(_segments(flow), None)]
    return runs


def _drafts(flow: Flow, runs: Sequence[Run]) -> list[Draft]:
    """Return the drafts of all runs. Streams count from 1; a trunk alone is stream 0."""
    drafts = []
    for i, run in enumerate(runs):
        stream = i if len(runs) == 1 else i + 1
        drafts += with_norms_before(flow, drafts_of(flow, run.segments, run.entry, stream))
    return drafts


def _count_blocks(flow: Flow, drafts: Sequence[Draft]) -> int:
    """Return how many residual blocks can be inserted."""
    return sum(insertion(flow, one).insertable == "zero" for one in drafts)


def _segments(flow: Flow) -> list[Segment]:
    """Return the cuts, each with what lies between the one before and itself."""
    cuts = _cuts(flow)
    segments: list[Segment] = []
    interior: list[fx.Node] = []  # nodes since the last cut, on paths that have parted
    for node in flow.nodes:
        if node in cuts:
            segments.append(Segment(node, interior))
            interior = []
        else:
            interior.append(node)
    if interior:  # several outputs: nothing joins the last paths
        segments.append(Segment(interior[-1], interior[:-1], is_open=True))
    return segments


def _with_inner_runs(flow: Flow, run: Run, *, exchange: bool) -> list[Run]:
    """Return a run with the regions in which layers lie taken apart, and the runs within those.

    The last continues the run to its end. With ``exchange`` a region that is no layer as a whole is
    divided by :func:`clafusion.tracing.branches.branches_of`, where that finds streams.
    """
    found: list[Run] = []
    segments: list[Segment] = []
    begin, before = run.entry, run.entry
    for one in run.segments:
        inner = None
        if one.interior:
            nodes = [*one.interior, one.node]
            holds = _holds_layers(flow, before, one.node)
            if exchange and not _is_insertable(flow, nodes, before):
                inner = branches_of(flow, nodes, before, not one.is_open, holds)
            inner = inner or runs_of(flow, nodes, before, not one.is_open, holds)
        if inner is None:
            segments.append(one)
        else:
            inner = [
                part for each in inner for part in _with_inner_runs(flow, each, exchange=exchange)
            ]
            *beside, main = inner
            found += beside
            if main.entry is not before or main.segments[0].is_head:
                if segments:
                    found.append(Run(segments, begin))
                segments, begin = [], main.entry
            segments += main.segments
        before = one.node
    return [*found, Run(segments, begin)]


def _is_insertable(flow: Flow, nodes: Sequence[fx.Node], entry: fx.Node | None) -> bool:
    """Say whether a region as a whole is a layer that can be inserted."""
    draft = Draft("residual_block", list(nodes), entry)
    return insertion(flow, draft).insertable is not None


def _holds_layers(
    flow: Flow, entry: fx.Node | None, join: fx.Node
) -> Callable[[Sequence[Run]], list[bool]]:
    """Return what says of each run of a region whether it holds layers that make it a stream.

    They are residual blocks; inside another block these must have two layers with weights, for a
    block may add up a little on its own. Layers of a chain do so on a level of a U-Net: the only
    way from ``entry`` to ``join`` on which there are fewer positions.
    """
    least = 1 if entry is None else 2

    def drafts(run: Run) -> Iterator[Draft]:
        for part in run.parts:
            yield from drafts_of(flow, part.segments, part.entry, 1)

    def has_block(run: Run) -> bool:
        return any(
            sum(flow.is_weighted(node) for node in draft.nodes) >= least
            and insertion(flow, draft).insertable == "zero"
            for draft in drafts(run)
        )

    def is_level(run: Run) -> bool:
        return any(
            1 < math.prod(flow.positions(draft.nodes[-1])) < math.prod(flow.positions(join))
            and insertion(flow, draft).insertable == "identity"
            for draft in drafts(run)
        )

    def holds(runs: Sequence[Run]) -> list[bool]:
        levels = [False] * len(runs)
        joins = op_name(join) in ("cat", "add") and entry is not None
        if joins and flow.positions(join) == flow.positions(entry):
            levels = [is_level(run) for run in runs]
        if levels.count(True) > 1:  # pyramid pooling: branches, all parts of one layer
            levels = [False] * len(runs)
        return [level or has_block(run) for level, run in zip(levels, runs, strict=True)]

    return holds


def _cuts(flow: Flow) -> set[fx.Node]:
    """Return the nodes through which every path passes.

    All paths pass through a node, if the paths to it times the paths from it are all paths that
    there are. Python's integers count them exactly.
    """
    (output,) = (node for node in flow.graph.nodes if node.op == "output")
    ends = {node for node in output.all_input_nodes if node in flow}
    before: dict[fx.Node, int] = {}
    for node in flow.nodes:
        operands = flow.operands(node)
        before[node] = sum(before[operand] for operand in operands) if operands else 1
    after: dict[fx.Node, int] = {}
    for node in reversed(flow.nodes):
        after[node] = sum(after[user] for user in node.users if user in flow)
        after[node] += node in ends
    total = sum(before[node] for node in ends)
    return {node for node in flow.nodes if before[node] * after[node] == total}


def side_nodes(flow: Flow, drafts: Sequence[Draft]) -> Mapping[int, list[fx.Node]]:
    """Return the nodes beside the flow that use a parameter, by the draft they belong to.

    Each belongs to the first draft that needs its value.
    """
    owner: dict[fx.Node, int] = {}
    for i, draft in enumerate(drafts):
        owner.update(dict.fromkeys([*draft.leading, *draft.nodes, *draft.trailing], i))
    owned = frozenset(owner)
    side: dict[int, list[fx.Node]] = {}
    for node in reversed(flow.graph.nodes):
        if node.op != "call_function" or node in owned:
            continue
        users = [owner[user] for user in node.users if user in owner]
        if users:
            owner[node] = min(users)
            if flow.parameters(node):
                side.setdefault(owner[node], []).insert(0, node)
    return side
