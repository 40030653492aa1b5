"""Layers while their nodes are collected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from clafusion.tracing.flow import NORMS, Flow
from clafusion.tracing.operations import op_name
from clafusion.tracing.regions import Segment

__all__ = ["Draft", "drafts_of"]


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
        Nodes before and after it that only reshape or pool; also those behind ``norm`` that keep
        its values.
    stream
        The number of the stream that it lies on.
    norm, shortcut
        Where the block begins with the norm of the value that enters (post-norm): the norm, and
        what it puts out, to which the block adds. Else None.
    """

    kind: Literal["chain", "residual_block", "norm"]
    nodes: list[fx.Node]
    entry: fx.Node | None
    leading: list[fx.Node] = field(default_factory=list)
    trailing: list[fx.Node] = field(default_factory=list)
    stream: int = 0
    norm: fx.Node | None = None

    shortcut: fx.Node | None = None


def drafts_of(
    flow: Flow, segments: Iterable[Segment], entry: fx.Node | None, stream: int = 0
) -> list[Draft]:
    """Return the drafts of the layers along a stream.

    Parameters
    ----------
    flow
        The flow of the graph.
    segments
        The stream's.
    entry
        The value before the first of them.
    stream
        Its number.
    """
    drafts: list[Draft] = []
    pending: list[fx.Node] = []  # glue that may belong to the next layer
    previous = entry  # the last cut
    for one in segments:
        node = one.node
        if one.interior or one.is_open:
            nodes = [*one.interior, node]
            drafts.append(Draft("residual_block", nodes, previous, leading=pending))
            pending = []
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
    if drafts:
        drafts[-1].trailing = pending
    elif stream:  # another stream's values are only reshaped here
        drafts.append(Draft("residual_block", pending, entry))
    for draft in drafts:
        draft.stream = stream
    return drafts
