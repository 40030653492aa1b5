"""Weights that the model computes from parameters: normalised, standardised, joined ones.

An element of a weight belongs to several channels, one for each of its axes. So the labels of a
weight that is computed are several label tensors, its layers, one for each axis of the parameters
that carries channels. Elementwise operations unite layers, reductions drop those along the reduced
axes, and operations that move elements do so in each layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.drafts import DraftUse
from clafusion.tracing.labels.ids import collapse, value_ids
from clafusion.tracing.labels.rule import (
    REARRANGING,
    Call,
    ComputedWeight,
    Label,
    NotFollowed,
    ParameterView,
)
from clafusion.tracing.normalised import NormalisedWeight
from clafusion.tracing.operations import bound_operands, op_name

if TYPE_CHECKING:
    from clafusion.tracing.labels.interpreter import LabelPropagation

__all__ = ["computed_label", "weigh_computed", "weight_computations"]

_CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*_CONVOLUTIONS, "linear", "bilinear", "embedding"), ("weight",)),
    "matmul": ("self", "other"),
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "cdist": ("x1", "x2"),
}
"""Which operands of an operation may be weights."""

_READERS = frozenset("linear bilinear embedding embedding_bag lstm gru".split()) | _CONVOLUTIONS
_REDUCTIONS = frozenset(
    "sum mean amax amin var std norm linalg_vector_norm var_mean std_mean prod logsumexp".split()
)
_KEEPING = frozenset(
    """_to_copy to clone contiguous detach alias lift_fresh_copy dropout softmax _softmax
    layer_norm batch_norm""".split()
)
_TURNING = frozenset(
    """t transpose permute mT numpy_T swapaxes movedim slice select narrow chunk split
    split_with_sizes unbind""".split()
)
_SHAPED_LIKE = frozenset("expand_as view_as reshape_as".split())
_FILLING = frozenset("constant_pad_nd pad tril triu".split())


def weight_computations(
    module: fx.GraphModule, placeholders: Sequence[str | None], buffers: frozenset[str]
) -> dict[fx.Node, int]:
    """Return the nodes that compute weights from parameters.

    With each stands in how many groups a convolution reads the weight; 0 for other operations.

    Parameters are those of :func:`clafusion.tracing.groups.find_channels`.
    """
    names = iter(placeholders)
    free: dict[fx.Node, bool] = {}  # of model inputs; whether trained parameters enter
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = next(names)
            if name is not None:
                free[node] = name not in buffers
        elif node.op == "call_function" and all(one in free for one in node.all_input_nodes):
            free[node] = any(free[one] for one in node.all_input_nodes)
    found: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        bound = bound_operands(node)
        for role in _WEIGHTS.get(op_name(node), ()) if node.op == "call_function" else ():
            weight = bound.get(role)
            if node in free or weight is None or not free.get(weight, False):
                continue
            if weight.op == "placeholder":
                continue
            closure = _closure(weight)
            is_matrix = role == "weight" or weight.meta["val"].dim() == 2
            is_computed = any(not _is_view(one) for one in closure)
            if is_matrix and is_computed and not any(op_name(one) in _READERS for one in closure):
                groups = int(bound["groups"]) if op_name(node) in _CONVOLUTIONS else 0
                for one in closure:
                    found[one] = max(found.get(one, 0), groups)
    return found


def _is_view(node: fx.Node) -> bool:
    """Say whether a node shows a parameter in another shape, or is a function of each element."""
    if node.target is operator.getitem or op_name(node) in _SHAPED_LIKE:
        return True
    tags = getattr(node.target, "tags", ())
    is_simple = op_name(node) in REARRANGING or torch.Tag.pointwise in tags
    return is_simple and len(node.all_input_nodes) == 1


def _closure(node: fx.Node) -> set[fx.Node]:
    """Return the operations from which a node's value comes, itself included."""
    found, waiting = {node}, [node]
    while waiting:
        for one in waiting.pop().all_input_nodes:
            if one.op == "call_function" and one not in found:
                found.add(one)
                waiting.append(one)
    return found


def computed_label(propagation: LabelPropagation, call: Call, groups: int) -> Label:
    """Return the label of an operation that computes a weight, or a part of one.

    ``groups`` is what :func:`weight_computations` found.

    Raises
    ------
    NotFollowed
        The operation is none of those that leave each element with the channels of its axes.
    """
    operands = [(node, call.label_of(node), call.value_of(node)) for _, node in call.tensors()]
    parts = [one for one in operands if isinstance(one[1], (ParameterView, ComputedWeight))]
    if len(parts) == 1 and isinstance(parts[0][1], ParameterView):
        view = _viewed(call, parts[0][0], parts[0][1], alone=len(operands) == 1)
        if view is not None:
            return view
    if not parts:
        return None

    def computed(label: Label) -> ComputedWeight | None:
        return _computed(propagation, label, groups)

    if call.name in ("mv", "dot", "vdot", "mm", "matmul"):
        factors = [_factor(propagation, computed, label, value) for _, label, value in operands]
        product = _product(propagation, call, factors)
        if call.name in ("dot", "vdot"):
            _note_vectors(propagation, call, operands[0][1])
        return product
    weights = [computed(label) for _, label, _ in operands]
    known = [one for one in weights if one is not None]
    if not known:
        return None
    sources = tuple({id(use): use for one in known for use in one.sources}.values())
    if call.name in _KEEPING or call.name in _REDUCTIONS or call.name == "_weight_norm":
        return _normalised(propagation, call, known, sources)
    if call.name in REARRANGING and call.name not in _FILLING:
        if call.name == "cat":
            return _joined(propagation, call, weights, sources)
        return _rearranged(call, operands, weights, sources)
    target: Any = call.node.target
    if torch.Tag.pointwise in target.tags or call.name in ("multiply", "divide", "subtract"):
        layers = _united(propagation, known, call.output.shape)
        for (_, _, value), weight in zip(operands, weights, strict=True):
            if weight is None:
                for layer in layers:
                    propagation.meet(layer, value_ids(value).expand(layer.shape))
        return ComputedWeight(call.node.name, call.output, tuple(layers), sources)
    raise NotFollowed("the channel analysis has no rule for it on weights")


def _viewed(call: Call, node: fx.Node, label: ParameterView, *, alone: bool) -> Label:
    """Return the result as a view of a parameter, where it is one; else None."""
    target: Any = call.node.target
    if alone and torch.Tag.pointwise in target.tags:
        return label  # an elementwise function of a parameter moves as the parameter does
    if call.name in _KEEPING and alone and not isinstance(call.output, tuple):
        is_norm = call.name in ("softmax", "_softmax", "layer_norm", "batch_norm")
        return None if is_norm else label
    if call.name not in _TURNING:
        return None
    moved = _run(call, {node: label.tensor})
    parts = moved if isinstance(moved, (tuple, list)) else (moved,)
    memory = label.tensor.untyped_storage().data_ptr()
    if any(one.untyped_storage().data_ptr() != memory for one in parts):
        return None
    views = tuple(ParameterView(label.name, one) for one in parts)
    return views if isinstance(moved, (tuple, list)) else views[0]


def _computed(propagation: LabelPropagation, label: Label, groups: int) -> ComputedWeight | None:
    """Return a label as a computed weight; None for a constant.

    Of a convolution with ``groups`` each group's rows read channels of their own.
    """
    if isinstance(label, ComputedWeight):
        return label
    if not propagation.is_parameter(label):
        return None
    shape = label.tensor.shape
    axes = [i for i, size in enumerate(shape) if size > 1]
    if groups and len(shape) > 2:
        axes = [i for i in axes if i < 2]  # the others are the kernel's
    if len(axes) < 2 and label.tensor.numel() == max([*shape, 1]):
        layers = [propagation.element_ids(label)] if axes else []
        use = propagation.uses[label.name, "elements"] if axes else None
        return ComputedWeight(label.name, label.tensor, tuple(layers), (use,) if use else ())
    parts = label.tensor.chunk(groups if axes == [0, 1] and groups else 1, 0)
    of_parts = []
    for part in parts:
        view = ParameterView(label.name, part)
        sizes = {i: propagation.fresh(part.size(i)) for i in axes}
        of_parts.append(propagation.weigh(view, "weight", sizes))
    layers = [
        torch.cat(
            [
                found[i].view([-1 if j == i else 1 for j in range(len(shape))]).expand(part.shape)
                for found, part in zip(of_parts, parts, strict=True)
            ]
        )
        for i in axes
    ]
    uses = tuple(use for use in propagation.uses.values() if use.name == label.name)
    return ComputedWeight(label.name, label.tensor, tuple(layers), uses)


def _factor(
    propagation: LabelPropagation,
    computed: Callable[[Label], ComputedWeight | None],
    label: Label,
    value: Tensor,
) -> ComputedWeight:
    """Return a factor of a product; a buffer that is a vector moves with what it multiplies."""
    if isinstance(label, ParameterView) and value.dim() == 1:
        ids = propagation.element_ids(label)
        if label.name in propagation.buffers:
            propagation.moving_buffers.add(label.name)
        return ComputedWeight(
            label.name, value, (ids,), (propagation.uses[label.name, "elements"],)
        )
    found = computed(label)
    if found is None:
        raise NotFollowed("it multiplies weights with constants")
    return found


def _product(
    propagation: LabelPropagation, call: Call, factors: Sequence[ComputedWeight]
) -> ComputedWeight:
    """Contract the last axis of the first factor with the first of the second."""
    left, right = factors
    if left.tensor.dim() > 2 or right.tensor.dim() > 2:
        raise NotFollowed("it multiplies more than matrices")
    axis, layers = left.tensor.dim() - 1, []
    inner = [[one for one in left.layers if _axes(propagation, one) == (axis,)]]
    inner.append([one for one in right.layers if _axes(propagation, one) == (0,)])
    rows = [one[0] if axis else one for one in inner[0]]
    columns = [one[:, 0] if right.tensor.dim() == 2 else one for one in inner[1]]
    if len(rows) > 1 or len(columns) > 1:
        raise NotFollowed("its factors have several channels along one axis")
    for row in rows:
        propagation.count(row)
        for column in columns:
            propagation.unite(row, column)
    if len(rows) != len(columns):
        for ids in (*rows, *columns):
            propagation.pin(ids)
    shape = call.output.shape
    for one in left.layers:
        if _axes(propagation, one) == (0,) and axis == 1:
            layers.append(one[:, 0].view(-1, *[1] * (len(shape) - 1)).expand(shape))
    for one in right.layers:
        if _axes(propagation, one) == (1,):
            layers.append(one[0].expand(shape))
    uses = (*left.sources, *right.sources)
    return ComputedWeight(call.node.name, call.output, tuple(layers), uses)


def _normalised(
    propagation: LabelPropagation, call: Call, weights: Sequence[ComputedWeight], sources: Any
) -> Label:
    """Follow reductions and normalisations over some axes, of which the order does not matter."""
    shape = weights[0].tensor.shape
    if call.name == "batch_norm":
        weights = [weights[0], *(_along_rows(one, shape) for one in weights[1:])]
        _note_gains(propagation, call)
    elif call.name == "_weight_norm":
        _note_lengths(propagation, call)
    elif len(weights) > 1:
        raise NotFollowed("its operands are computed, too")
    layers = _united(propagation, weights, shape)
    axes = _reduced_axes(call, len(shape))
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    kept = []
    for layer in layers:
        along = set(_axes(propagation, layer))
        if along & axes:
            propagation.count(layer)
        if call.name not in _REDUCTIONS:
            kept.append(layer)
        elif not along & axes:
            for axis in axes:
                layer = layer.narrow(axis, 0, 1)
            kept.append(layer.reshape(outputs[0].shape))
        elif not along <= axes and not _is_in_blocks(propagation, layer, along - axes):
            raise NotFollowed("its channels lie along a part of the axes that it reduces")
    labels = tuple(ComputedWeight(call.node.name, one, tuple(kept), sources) for one in outputs)
    return labels if isinstance(call.output, tuple) else labels[0]


def _note_lengths(propagation: LabelPropagation, call: Call) -> None:
    """Note the parameters of a weight norm, if both are whole ones."""
    views = [call.label("v"), call.label("g")]
    whole = [
        one.name
        for one in views
        if isinstance(one, ParameterView) and one.tensor.shape == propagation.state[one.name].shape
    ]
    if len(whole) == 2:
        axis = call.value("dim")
        found = NormalisedWeight("length", whole[0], (whole[1],), axis)
        propagation.normalised[whole[0]] = found


def _along_rows(vector: ComputedWeight, shape: Sequence[int]) -> ComputedWeight:
    """Return a batch norm's gains or biases as factors of a weight ``(1, num_rows, ...)``."""
    view = [1, -1, *[1] * (len(shape) - 2)]
    return vector.changed(lambda one: one.reshape(view).expand(tuple(shape)))


def _note_gains(propagation: LabelPropagation, call: Call) -> None:
    """Note the parameters of a scaled weight standardisation, if both are whole ones.

    That is a batch norm of the weight as one input ``(1, num_rows, ...)``.
    """
    found = [_multiplied(call.bound.get(role)) for role in ("input", "weight")]
    labels = [None if one is None else call.label_of(one[0]) for one in found]
    if call.bound.get("bias") is not None or any(one is None for one in found):
        return
    (_, unscaled), (_, scale) = ((None, 0.0) if one is None else one for one in found)
    names = [
        one.name
        for one in labels
        if isinstance(one, ParameterView)
        and one.tensor.numel() == propagation.state[one.name].numel()
    ]
    if len(names) == 2 and unscaled == 1.0 and scale:
        eps = call.value("eps")
        propagation.normalised[names[0]] = NormalisedWeight(
            "standard", names[0], (names[1],), 0, eps, scale
        )


def _multiplied(node: Any) -> tuple[fx.Node, float] | None:
    """Return the parameter of which a node is a multiple in another shape, and how much it is."""
    factor = 1.0
    while isinstance(node, fx.Node) and node.op == "call_function":
        name, operands = op_name(node), node.all_input_nodes
        if name in ("mul", "div") and len(operands) == 1:
            number = node.args[1] if node.args[0] is operands[0] else node.args[0]
            if not isinstance(number, (int, float)):
                return None
            factor = factor * number if name == "mul" else factor / number
        elif name not in ("view", "reshape", "flatten", "squeeze", "unsqueeze"):
            return None
        node = operands[0]
    return (node, factor) if isinstance(node, fx.Node) else None


def _note_vectors(propagation: LabelPropagation, call: Call, left: Label) -> None:
    """Note the parameters of a spectral norm, whose estimate is ``u . (W v)``."""
    product = call.bound["other" if call.name == "vdot" else "tensor"]
    if not isinstance(left, ParameterView) or op_name(product) != "mv":
        return
    matrix, right = (call.label_of(one) for one in product.args[:2])
    if not isinstance(matrix, (ComputedWeight, ParameterView)) or not isinstance(
        right, ParameterView
    ):
        return
    name = matrix.name if isinstance(matrix, ParameterView) else matrix.sources[0].name
    rows = propagation.roots(propagation.element_ids(left))
    for use in propagation.uses.values():
        for place, ids in use.axes.items():
            is_its = use.name == name and use.role == "weight" and len(ids) == len(rows)
            if is_its and torch.equal(propagation.roots(ids), rows):
                axis = _axis_of(use, place, propagation.state[name])
                found = NormalisedWeight("spectral", name, (left.name, right.name), axis)
                propagation.normalised[name] = found
                return


def _axis_of(use: DraftUse, place: int, tensor: Tensor) -> int:
    """Return the axis of a whole parameter that a use calls by another number."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order[place] if len(order) == len(use.size) else 0


def _reduced_axes(call: Call, dims: int) -> set[int]:
    """Return the axes over which an operation sums up or normalises."""
    if call.name == "batch_norm":
        if not call.value("training"):
            raise NotFollowed("it normalises weights by statistics")
        return set(range(dims)) - {1}
    if call.name == "layer_norm":
        if any(call.bound.get(n) is not None for n in ("weight", "bias")):
            raise NotFollowed("it normalises weights by parameters")
        return set(range(dims - len(call.value("normalized_shape")), dims))
    if call.name == "_weight_norm":
        return set(range(dims)) - {call.value("dim")}  # -1: one norm of all
    if call.name in ("softmax", "_softmax"):
        return {call.value("dim") % dims}
    if call.name not in _REDUCTIONS:
        return set()
    found = call.concrete(call.bound.get("dim"))
    found = [found] if isinstance(found, int) else list(found or range(dims))
    return {axis % dims for axis in found}


def _rearranged(
    call: Call,
    operands: Sequence[tuple[fx.Node, Label, Tensor]],
    weights: Sequence[ComputedWeight | None],
    sources: Any,
) -> Label:
    """Run an operation that moves elements on each layer of its operand."""
    node, weight = operands[0][0], weights[0]
    is_shape_only = call.name in _SHAPED_LIKE
    if weight is None or (not is_shape_only and any(one is not None for one in weights[1:])):
        raise NotFollowed("it joins weights")
    layers = [_run(call, {node: layer}) for layer in weight.layers]
    if not isinstance(call.output, (tuple, list)):
        return ComputedWeight(call.node.name, call.output, tuple(layers), sources)
    return tuple(
        ComputedWeight(call.node.name, one, tuple(layer[i] for layer in layers), sources)
        for i, one in enumerate(call.output)
    )


def _joined(
    propagation: LabelPropagation,
    call: Call,
    weights: Sequence[ComputedWeight | None],
    sources: Any,
) -> ComputedWeight:
    """Join weights along one axis; the channels of their other axes are the same."""
    shape = call.output.shape
    axis = call.bound.get("dim", 0) % len(shape)
    along, across = [], list[Tensor]()
    for weight in weights:
        if weight is None:
            raise NotFollowed("it joins weights with constants")
        layers = {_axes(propagation, one): one for one in weight.layers}
        if len(layers) != len(weight.layers) or any(len(one) > 1 for one in layers):
            raise NotFollowed("it joins weights with several channels along one axis")
        along.append(layers.pop((axis,), value_ids(torch.zeros(weight.tensor.shape))))
        for one in layers.values():
            rest = one.narrow(axis, 0, 1)
            _join(propagation, across, rest.expand([*shape[:axis], 1, *shape[axis + 1 :]]))
    found = (torch.cat(along, axis), *(one.expand(shape) for one in across))
    return ComputedWeight(call.node.name, call.output, found, sources)


def _united(
    propagation: LabelPropagation, weights: Sequence[ComputedWeight], shape: Sequence[int]
) -> list[Tensor]:
    """Return the layers of an elementwise function of weights, those along one axis united."""
    layers: list[Tensor] = []
    for weight in weights:
        for layer in weight.layers:
            _join(propagation, layers, layer.expand(tuple(shape)))
    return layers


def _join(propagation: LabelPropagation, layers: list[Tensor], layer: Tensor) -> None:
    """Unite a layer with that along the same axes, or add it."""
    axes = set(_axes(propagation, layer))
    for i, other in enumerate(layers):
        others = set(_axes(propagation, other))
        if axes == others:
            propagation.unite(other, layer)
            layers[i] = torch.where(other >= 0, other, layer)
            return
        both = axes & others
        larger, smaller = (layer, others) if axes > others else (other, axes)
        if both and not (both == smaller and _is_in_blocks(propagation, larger, both)):
            raise NotFollowed("its operands have channels along several axes")
    if axes:
        layers.append(layer)


def _is_in_blocks(propagation: LabelPropagation, layer: Tensor, axes: set[int]) -> bool:
    """Say whether a layer is the same for several neighbours along an axis, as in a group."""
    if len(axes) != 1:
        return False
    rows = propagation.roots(layer.movedim(next(iter(axes)), 0)).flatten(1)
    _, counts = rows.unique_consecutive(dim=0, return_counts=True)
    return len(counts.unique()) == 1 and int(counts[0]) > 1


def _axes(propagation: LabelPropagation, layer: Tensor) -> tuple[int, ...]:
    """Return the axes along which a layer's channels vary."""
    ids = propagation.roots(collapse(layer)[0])
    return tuple(i for i, size in enumerate(collapse(ids)[0].shape) if size > 1)


def _run(call: Call, substitutes: Mapping[fx.Node, Tensor]) -> Any:
    """Return what the operation makes of other values for some operands."""
    target: Any = call.node.target
    for change in (lambda one: one, Tensor.contiguous):
        arguments, keywords = fx.map_arg(
            (call.node.args, call.node.kwargs),
            lambda node, change=change: (
                change(substitutes[node]) if node in substitutes else call.value_of(node)
            ),
        )
        try:
            return target(*arguments, **keywords)
        except (RuntimeError, NotImplementedError):
            continue
    raise NotFollowed("it cannot run on labels")


def weigh_computed(
    propagation: LabelPropagation,
    weight: ComputedWeight,
    axes: Mapping[int, Tensor],
    inward: Sequence[int],
) -> dict[int, Tensor]:
    """Let axes of a computed weight carry ids; return the ids now on them.

    Parameters are those of
    :meth:`clafusion.tracing.labels.interpreter.LabelPropagation.weigh`.
    """
    current = {}
    for axis, ids in axes.items():
        found = ids
        is_shown = False
        for layer in weight.layers:
            along = _axes(propagation, layer)
            if axis not in along:
                continue
            if len(along) > 1:
                raise NotFollowed("its weight has channels along several axes at once")
            own = layer.movedim(axis, 0).reshape(layer.size(axis), -1)[:, 0]
            propagation.unite(own, ids)
            found, is_shown = torch.where(own >= 0, own, ids), True
        if axis in inward:
            roots = propagation.roots(found[found >= 0])
            for use in weight.sources:
                for place, on_axis in use.axes.items():
                    if bool(torch.isin(propagation.roots(on_axis), roots).any()):
                        use.directions[place] = "in"
            if not is_shown:
                propagation.count(ids)  # the weight adds up all of them alike
        current[axis] = found
    return current
