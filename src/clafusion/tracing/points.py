"""The points of a layer at which its channels are observed or rescaled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from clafusion.tracing.drafts import Draft
from clafusion.tracing.flow import NORMS, Flow, is_matrix_product, is_pointwise
from clafusion.tracing.layer import CalibrationPoint, HookPoint
from clafusion.tracing.operations import (
    RESHAPES,
    SAME_VALUES,
    affine_operands,
    batch_axis,
    bound_operands,
    is_affine_product,
    is_transposed,
    op_name,
)

__all__ = ["bias_addition", "calibration_points", "hook_points", "places_of"]

_CHOICE = -1  # the place of a router among the readers of its own outputs
_MASKING = ("where", "masked_fill")  # where a mask hides a value stands the least number of all
_VIEWS = ("view", "reshape", "_unsafe_view")


def hook_points(flow: Flow, draft: Draft) -> tuple[HookPoint, ...]:
    """Return the values that a layer's products read, and last the layer's own output.

    Where one of them joins activations, these as well: behind a nonlinearity a channel may be dead,
    though a norm has read it.
    """
    points: dict[str, HookPoint] = {}
    readers: dict[str, set[tuple[int, int]]] = {}
    for place, node in enumerate(draft.nodes):
        is_product = flow.is_weighted(node) or is_matrix_product(node)
        if is_product or op_name(node) == "scaled_dot_product_attention":
            for i, operand in enumerate(flow.operands(node)):
                if _is_masked(operand):
                    continue
                point = _hook_point(flow, operand)
                if point is not None:
                    points.setdefault(point.post, point)
                    readers.setdefault(point.post, set()).add((place, i))
    for place, node in enumerate(draft.nodes):
        if flow.is_weighted(node) and _are_chosen_from(node):
            point = _hook_point(flow, node)
            if point is not None:
                points.setdefault(point.post, point)
                readers.setdefault(point.post, set()).add((place, _CHOICE))
    joined = draft.nodes[-1]
    for place, node in enumerate(draft.nodes):
        if node.name not in points and node is not joined:
            continue
        for i, part in enumerate(_parts(flow, draft, node)):
            point = _hook_point(flow, part)
            if point is not None and point.pre != point.post and part in draft.nodes:
                points.setdefault(point.post, point)
                readers.setdefault(point.post, set()).add((place, i))
    output = _hook_point(flow, joined)
    if output is not None:
        points.pop(output.post, None)
        points[output.post] = output
        readers.setdefault(output.post, set()).add((len(draft.nodes), 0))
    return tuple(replace(point, readers=frozenset(readers[post])) for post, point in points.items())


def _are_chosen_from(node: fx.Node) -> bool:
    """Return whether a router's outputs say which of several experts take part."""
    for user in node.users:
        name = op_name(user)
        is_kept = is_pointwise(user) or name in RESHAPES or name in ("softmax", "_softmax")
        if name in ("topk", "argmax") or (is_kept and _are_chosen_from(user)):
            return True
    return False


def _is_masked(node: fx.Node) -> bool:
    """Return whether a value has been masked, but for operations that keep all values."""
    while op_name(node) in SAME_VALUES:
        node = node.all_input_nodes[0]
    return op_name(node) in _MASKING


def _parts(flow: Flow, draft: Draft, node: fx.Node) -> list[fx.Node]:
    """Return what a node of a layer concatenates or adds up, by however many operations."""
    if op_name(node) not in ("cat", "add") or node not in draft.nodes:
        return []
    parts: list[fx.Node] = []
    for operand in flow.operands(node):
        parts += _parts(flow, draft, operand) or [operand]
    return parts


def _hook_point(flow: Flow, node: fx.Node) -> HookPoint | None:
    """Walk from a layer's operand back to the activation that it reads.

    The walk ends where channels and inputs have axes of their own, and before it would change
    how many positions there are.
    """
    while (
        flow.is_glue(node)
        and len(flow.operands(node)) == 1
        and (
            flow.channels.nodes[node.name].axis is None
            or op_name(node) in SAME_VALUES
            or batch_axis(node) is None
        )
    ):
        node = flow.operands(node)[0]
    channels = flow.channels.nodes[node.name]
    if channels.axis in (None, batch_axis(node)) or not channels.free or channels.is_crossed:
        return None
    if flow.is_same_for_all(node):
        return None
    pre = node
    before = flow.operands(node)
    if len(before) == 1 and is_pointwise(node) and not flow.parameters(node):
        same = flow.channels.nodes[before[0].name]
        if same.axis == channels.axis and torch.equal(same.groups, channels.groups):
            pre = before[0]
    shape = flow.channels.shapes[node.name]
    batch = batch_axis(node)
    return HookPoint(
        node.name,
        pre.name,
        channels.axis,
        tuple(size for axis, size in enumerate(shape) if axis not in (batch, channels.axis)),
        channels.groups,
        channels.members,
        batch,
    )


def calibration_points(flow: Flow, draft: Draft) -> tuple[CalibrationPoint, ...]:
    """Return the outputs inside a layer that its own parameters can rescale, in order."""
    points = (_calibration_point(flow, node) for node in draft.nodes)
    return tuple(point for point in points if point is not None)


def _calibration_point(flow: Flow, node: fx.Node) -> CalibrationPoint | None:
    name = op_name(node)
    is_named = name in ("batch_norm", "linear", "conv1d", "conv2d", "conv3d")
    if not (is_named or is_affine_product(node)) or flow.is_same_for_all(node):
        return None
    if len(node.users) == 1 and op_name(next(iter(node.users))) in NORMS:
        return None  # the norm undoes any change here
    operands = affine_operands(node)
    weight, bias = (flow.sources.get(operands.get(role)) for role in ("weight", "bias"))
    if weight is None or (name == "addmm" and not _adds_a_bias(flow, node)):
        return None
    shape = flow.channels.shapes[node.name]
    axis = 1 if name.startswith(("conv", "batch")) else -1
    outputs = 1 if is_transposed(node) else 0
    size = flow.state[weight].shape
    if (is_affine_product(node) and len(size) != 2) or size[outputs] != shape[axis]:
        return None
    channels = flow.channels.nodes[node.name]
    if channels.free and channels.axis != axis % len(shape):
        return None
    affine: fx.Node | None = node
    if name == "batch_norm":
        affine = operands["input"] if operands["input"] in flow else None
        if affine is not None and not (flow.is_weighted(affine) and len(affine.users) == 1):
            affine = None  # another reader of the affine layer would see it rescaled
    output = node
    if bias is None and axis == -1:
        output, bias = _added_bias(flow, node)
    join, shortcut = _join_of(flow, output, affine or node)
    fixed = torch.full((shape[axis],), -1)
    return CalibrationPoint(
        output.name,
        None if affine is None else affine.name,
        join,
        shortcut,
        axis,
        weight,
        bias,
        channels.groups if channels.free else fixed,
        channels.members if channels.free else fixed,
        channels.is_crossed,
        outputs,
    )


def _added_bias(flow: Flow, node: fx.Node) -> tuple[fx.Node, str | None]:
    """Return the addition of a bias to a layer that has none of its own, and the bias.

    Without one, and before a norm, which undoes any change here, the layer and None.
    """
    found = bias_addition(flow, node)
    if found is None or any(op_name(reader) in NORMS for reader in found[0].users):
        return node, None
    return found


def bias_addition(flow: Flow, node: fx.Node) -> tuple[fx.Node, str] | None:
    """Return the operation that adds a vector of parameters to a layer's last axis, and its name.

    None where no operation of its own does.
    """
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or op_name(user) != "add" or bound_operands(user).get("alpha") != 1:
        return None
    others = [operand for operand in user.all_input_nodes if operand is not node]
    name = flow.sources.get(others[0]) if len(others) == 1 else None
    shape = flow.channels.shapes[node.name]
    if name is None or tuple(flow.state[name].shape) != shape[-1:]:
        return None
    return user, name


def _adds_a_bias(flow: Flow, node: fx.Node) -> bool:
    """Say whether what a matrix product adds is a vector of parameters, as it is."""
    bound = bound_operands(node)
    bias = flow.sources.get(bound["self"])
    return bias is not None and flow.state[bias].dim() == 1 and bound["beta"] == bound["alpha"] == 1


def _join_of(flow: Flow, node: fx.Node, affine: fx.Node) -> tuple[str | None, str | None]:
    """Return the addition that takes a layer's output, and its other operand."""
    value, shape = node, flow.channels.shapes[node.name]
    while len(value.users) == 1:
        (user,) = value.users
        # A product of matrices works on rows, which are then put back into their places.
        is_folded = is_affine_product(affine) and op_name(user) in _VIEWS
        if op_name(user) not in SAME_VALUES and not (
            is_folded and flow.channels.shapes[user.name][-1] == shape[-1]
        ):
            break
        value = user
    if len(value.users) != 1:
        return None, None
    (join,) = value.users
    others = [operand for operand in flow.operands(join) if operand is not value]
    if (
        op_name(join) != "add"
        or bound_operands(join).get("alpha", 1) != 1
        or len(others) != 1
        or flow.channels.shapes[others[0].name] != flow.channels.shapes[value.name]
        or flow.order[others[0]] > flow.order[affine]
    ):
        return None, None
    return join.name, others[0].name


def places_of(point: HookPoint | CalibrationPoint, group: int) -> Tensor:
    """Return where a group's channels lie on a point's channel axis, in the order of its members.

    Of a channel that lies there several times the places come one after the other.
    """
    places = torch.nonzero(point.groups == group).squeeze(1)
    return places[point.members[places].argsort(stable=True)]
