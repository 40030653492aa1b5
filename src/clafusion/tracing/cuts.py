"""Cut the flow of a graph into drafts of layers.

The cuts are the nodes through which every path from the input to the output passes. Where paths
part and join between two cuts lies a residual block; in between run chains of single layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from clafusion.tracing.flow import NORMS, Flow
from clafusion.tracing.operations import op_name

__all__ = ["Draft", "cut_into_drafts", "side_nodes"]


@dataclass
class Draft:
    """A layer while its nodes are collected.

    Attributes
    ----------
    kind
        As for :class:`clafusion.tracing.layer.Layer`.
    nodes
        The nodes that compute it; the last is its output.
    entry
        The cut before it, whose value it takes; None at the beginning.
    leading, trailing
        Nodes before and after it that only reshape or pool.
    """

    kind: Literal["chain", "residual_block", "norm"]
    nodes: list[fx.Node]
    entry: fx.Node | None
    leading: list[fx.Node] = field(default_factory=list)
    trailing: list[fx.Node] = field(default_factory=list)


def cut_into_drafts(flow: Flow) -> list[Draft]:
    """Return the drafts of all layers, in order."""
    cuts = _cuts(flow)
    drafts: list[Draft] = []
    pending: list[fx.Node] = []  # glue that may belong to the next layer
    interior: list[fx.Node] = []  # nodes since the last cut, on paths that have parted
    previous: fx.Node | None = None  # the last cut
    for node in flow.nodes:
        if node not in cuts:
            interior.append(node)
            continue
        if interior:
            drafts.append(Draft("residual_block", [*interior, node], previous, leading=pending))
            interior, pending = [], []
        elif flow.is_weighted(node):
            drafts.append(Draft("chain", [node], previous, leading=pending))
            pending = []
        elif op_name(node) in NORMS and (not drafts or drafts[-1].kind != "chain"):
            drafts.append(Draft("norm", [node], previous, leading=pending))
            pending = []
        elif flow.is_glue(node) or not drafts:
            pending.append(node)
        else:
            drafts[-1].nodes += [*pending, node]
            pending = []
        previous = node
    if interior:  # several outputs: nothing joins the last paths
        drafts.append(Draft("residual_block", interior, previous, leading=pending))
    elif drafts:
        drafts[-1].trailing = pending
    return drafts


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
