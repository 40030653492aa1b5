"""Whether a layer can be inserted without changing what a network computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import fx

from clafusion.tracing.drafts import Draft
from clafusion.tracing.flow import Flow
from clafusion.tracing.operations import (
    SAME_VALUES,
    bound_operands,
    convolution_geometry,
    is_affine_product,
    op_name,
    rows_kind,
)
from clafusion.tracing.points import bias_addition
from clafusion.tracing.zero_writes import parameters_for_zero, summands

__all__ = ["Insertion", "insertion"]

# f(f(x)) = f(x): after such an activation, an inserted layer with identity weights and the same
# activation changes nothing.
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
_CASTS = frozenset(["to", "_to_copy", "type_as"])
_ALONG_EDGES = frozenset("scatter_add scatter_reduce index_add index_reduce".split())
_MIXES_NODES = (
    "it takes values of other nodes along the edges, so that no weights make it the identity. Only "
    "a residual layer (x + layer(x)) can be inserted; a result with the fewer layers "
    "(target='shallower') leaves it out"
)
_IDEMPOTENT = frozenset("relu relu6 hardtanh clamp clamp_min abs".split())


class Insertion(NamedTuple):
    """What of a :class:`~clafusion.tracing.layer.Layer` says whether it can be inserted."""

    insertable: Literal["identity", "zero"] | None
    last_write: tuple[str, ...] = ()
    obstacle: str = ""
    fillings: tuple[tuple[str, float], ...] = ()
    mixes_nodes: bool = False


def insertion(flow: Flow, draft: Draft) -> Insertion:
    """Say whether a layer can be inserted, and how, or what is in the way."""
    if draft.kind == "residual_block":
        found = _zero_residual(flow, draft)
        if found is not None:
            return found
    if draft.kind != "norm" and _mixes_nodes(draft):
        return Insertion(None, obstacle=_MIXES_NODES, mixes_nodes=True)
    if draft.kind == "chain":
        obstacle = _obstacle(flow, draft)
        return Insertion(None, obstacle=obstacle) if obstacle else Insertion("identity")
    if draft.kind == "residual_block":
        return Insertion(None, obstacle=_no_residual(draft))
    return Insertion(None, obstacle="a norm on its own is never the identity")


def _mixes_nodes(draft: Draft) -> bool:
    """Say whether a layer of a graph network takes values of other nodes along the edges."""
    return any(rows_kind(one) == "nodes" and op_name(one) in _ALONG_EDGES for one in draft.nodes)


def _no_residual(draft: Draft) -> str:
    """Say why no weights make a block pass on its input."""
    joins = [one for one in draft.nodes if op_name(one) == "cat"]
    if draft.entry is not None and any(draft.entry in one.all_input_nodes for one in joins):
        return (
            "it puts new channels beside those that it reads, as dense blocks do: these get one "
            "length only where their layers are the children of one module, which has the same "
            "path in both networks, and put their channels behind those before them"
        )
    return (
        "its branch must end in weights that can be zero, so that only its shortcut is left, and "
        "an activation behind the addition must be one that its input has passed"
    )


def _has_passed(flow: Flow, node: fx.Node | None, activations: Sequence[fx.Node]) -> bool:
    """Return whether ``activations`` leave a value as it is, for it has passed the same before."""
    if not activations:
        return True
    kinds = {(op_name(activation), flow.settings(activation)) for activation in activations}
    if len(kinds) > 1 or op_name(activations[0]) not in _IDEMPOTENT:
        return False
    while node is not None and flow.is_glue(node) and len(flow.operands(node)) == 1:
        node = flow.operands(node)[0]
    return node is not None and (op_name(node), flow.settings(node)) in kinds


def _obstacle(flow: Flow, draft: Draft) -> str:
    """Say why no weights make a chain layer the identity; "" where some do."""
    affine, *rest = draft.nodes
    name = op_name(affine)
    is_convolution = name in ("conv1d", "conv2d", "conv3d")
    if name in _RECURRENT:
        return (
            f"no weights of a recurrent layer ({name}) pass on what it reads, for its states go "
            "through tanh and gates; the layers of a stack are one operation"
        )
    if not is_convolution and name != "linear" and not is_affine_product(affine):
        return f"{name} is no linear layer, no convolution and no product with a matrix"
    if flow.has_computed_weight(affine):
        return "its weight is computed from parameters, of which none need make the identity"
    operands = flow.operands(affine)
    if len(operands) != 1 or not all((flow.freedom(affine) or ())[:-1]):
        return "it reads or writes channels that keep their places, as inputs and outputs do"
    before, after = (flow.channels.nodes[value.name] for value in (operands[0], affine))
    if (
        before.axis is None
        or before.axis != after.axis
        or bool((before.groups < 0).any())
        or len(before.groups.unique()) > 1
        or len(after.groups.unique()) > 1
        # Several positions for each channel, as after a flatten.
        or len(before.members.unique()) != len(before.members)
    ):
        return "it reads its channels along another axis, in other groups or at several positions"
    if is_convolution and not _keeps_positions(flow, affine):
        return "its convolution needs stride 1, an odd kernel, one group and padding to equal size"
    bias = None if is_convolution else bias_addition(flow, affine)
    if rest and bias is not None and rest[0] is bias[0]:
        rest = rest[1:]
    if rest and op_name(rest[0]) == "batch_norm":
        rest = rest[1:]
    if _has_passed(flow, operands[0], rest):
        return ""
    return (
        f"its {name} is followed by {', '.join(map(op_name, rest))}, where only a bias, a "
        "BatchNorm and one activation may stand that keeps its own results (ReLU, ReLU6, hardtanh, "
        "clamp, abs), and the layer's input must have passed the same"
    )


def _keeps_positions(flow: Flow, convolution: fx.Node) -> bool:
    """Return whether a kernel with a single 1 in the middle makes a convolution the identity."""
    settings = dict(flow.settings(convolution))
    kernel, groups = settings["kernel"], settings["groups"]
    stride, padding, dilation = convolution_geometry(convolution, kernel)
    same = all(2 * p == d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True))
    odd = all(k % 2 == 1 for k in kernel)
    return same and odd and all(step == 1 for step in stride) and bool(groups == 1)


def _zero_residual(flow: Flow, draft: Draft) -> Insertion | None:
    """Return how a residual block writes zero; None where no parameters make it."""
    shortcut = draft.entry if draft.norm is None else draft.shortcut
    block = [one for one in draft.nodes if one is not shortcut]
    added = ((one, summands(flow, one, block)) for one in reversed(block))
    if shortcut is None:
        return None
    sums, parts = next(
        ((one, of) for one, of in added if len(of) > 1 and any(_keeps(of, shortcut))), (None, [])
    )
    if sums is None:
        return None
    if not _has_passed(flow, shortcut, draft.nodes[draft.nodes.index(sums) + 1 :]):
        return None
    written: dict[str, float] = {}
    branches = [part for part, kept in zip(parts, _keeps(parts, shortcut), strict=True) if not kept]
    if len(branches) + 1 < len(parts):  # the shortcut is added twice
        return None
    for part in branches:
        of_part = parameters_for_zero(flow, part, block)
        if of_part is None:
            return None
        written |= of_part
    fillings = {name: value for name, value in written.items() if value != 0.0}
    return Insertion("zero", tuple(written), fillings=(*fillings.items(), *_neutral(flow, draft)))


def _keeps(nodes: Sequence[fx.Node], value: fx.Node) -> list[bool]:
    """Return which nodes hold a value, through copies and casts that lose nothing."""
    found = []
    for node in nodes:
        while node is not value and (op_name(node) in SAME_VALUES or _is_lossless_cast(node)):
            node = node.all_input_nodes[0]
        found.append(node is value)
    return found


def _is_lossless_cast(node: fx.Node) -> bool:
    if op_name(node) not in _CASTS:
        return False
    before, after = (one.meta["val"].dtype for one in (node.all_input_nodes[0], node))
    return bool(torch.promote_types(before, after) == after)


def _neutral(flow: Flow, draft: Draft) -> tuple[tuple[str, float], ...]:
    """Return what the parameters of the norm before a post-norm block are in an inserted one."""
    if draft.norm is None:
        return ()
    bound = bound_operands(draft.norm)
    neutral = {"weight": 1.0, "bias": 0.0}
    return tuple(
        (flow.sources[bound[role]], value)
        for role, value in neutral.items()
        if bound.get(role) in flow.sources
    )
