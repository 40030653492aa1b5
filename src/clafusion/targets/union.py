"""Two aligned networks -> one architecture with a place for the layers of both.

Where either network is the deeper one in some stage, neither architecture can hold the other's
layers. The *union* can: the layers of both in one order, matched ones once. It is the deep network's
module with copies of the shallow one's unmatched layers put into its containers (``nn.Sequential``,
``nn.ModuleList``); or a given module takes the layers in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from clafusion.alignment.dynamic_program import LayerAlignment, align_layers
from clafusion.correspondence.correspondence import fill, lifting, resized_shape, skip_costs
from clafusion.errors import AlignmentError, ClafusionError, StructureError
from clafusion.tracing.model import Layer, TracedModel
from clafusion.tracing.operations import module_path
from clafusion.tracing.trace import trace_like

__all__ = ["Item", "placed", "union_model", "union_items"]

Item = tuple[int, int]
"""The deep and the shallow layer at one place of the union; -1 where a network has none there."""

_ADVICE = "give into=, a module that has a place for the layers of both networks"


def union_items(
    deep: TracedModel, shallow: TracedModel, alignment: LayerAlignment
) -> tuple[Item, ...]:
    """Return the layers of both networks in one order, matched ones together.

    Between two matched pairs the unmatched layers of both keep their order, and those of one stage
    stand together.
    """
    items: list[Item] = []
    start = (0, 0)
    for pair in (*alignment.pairs, (len(deep.layers), len(shallow.layers))):
        left, right = (list(range(a, b)) for a, b in zip(start, pair, strict=True))
        while left or right:
            here = _output_shape(deep, shallow, items[-1]) if items else None
            deep_stages = [deep.layers[i].output_shape for i in left]
            shallow_stages = [shallow.layers[k].output_shape for k in right]
            if _deep_goes_first(deep_stages, shallow_stages, here):
                items.append((left.pop(0), -1))
            else:
                items.append((-1, right.pop(0)))
        items.append(pair)
        start = (pair[0] + 1, pair[1] + 1)
    return tuple(items[:-1])


def _deep_goes_first(
    left: Sequence[tuple[int, ...]],
    right: Sequence[tuple[int, ...]],
    here: tuple[int, ...] | None,
) -> bool:
    """Say which of two queues of stages is to go on, so that no stage is left too early."""
    if not left or not right:
        return bool(left)
    if here in (left[0], right[0]):
        return left[0] == here
    if left[0] == right[0] or left[0] in right or right[0] in left:
        return left[0] not in right[1:]
    return math.prod(left[0]) >= math.prod(right[0])  # most networks get narrower as they go on


def _layer(deep: TracedModel, shallow: TracedModel, item: Item) -> Layer:
    return deep.layers[item[0]] if item[0] >= 0 else shallow.layers[item[1]]


def _output_shape(deep: TracedModel, shallow: TracedModel, item: Item) -> tuple[int, ...]:
    return _layer(deep, shallow, item).output_shape


# --- building it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Children:
    """The children of a container that make up a layer: ``first`` to ``last``, both included."""

    container: str
    first: int
    last: int


def union_model(deep: TracedModel, shallow: TracedModel, alignment: LayerAlignment) -> TracedModel:
    """Build and trace the union's module: the deep network's, with copies put in.

    What weights the copies hold does not matter; where widths differ, they get the deep network's.

    Raises
    ------
    StructureError
        A layer's container is no ``nn.Sequential`` or ``nn.ModuleList``, or the module's code does
        not run what is put into it.
    """
    items = union_items(deep, shallow, alignment)
    module = copy.deepcopy(deep.model)
    insertions: dict[str, list[tuple[int, list[nn.Module]]]] = {}
    for place, (one, other) in enumerate(items):
        if one >= 0:
            continue
        layer = shallow.layers[other]
        path, position = _anchor(deep, items, place, layer)
        copies = _copies(deep, shallow, alignment, items[:place], layer)
        insertions.setdefault(path, []).append((position, copies))
    # Found before anything moves: a container may lie in another one.
    containers = [(module.get_submodule(path), inserted) for path, inserted in insertions.items()]
    for container, inserted in containers:
        _insert(container, inserted)
    try:
        graph = trace_like(module, deep)
    except (ClafusionError, RuntimeError) as error:
        raise StructureError(
            f"the union of the two networks does not run ({error}); {_ADVICE}"
        ) from error
    wanted = [_layer(deep, shallow, item).structure for item in items]
    if [layer.structure for layer in graph.layers] != wanted:
        raise StructureError(
            f"the module's code does not run what is put into it: {len(items)} layers are wanted, "
            f"and it has {len(graph.layers)}, or others; {_ADVICE}"
        )
    return graph


def _anchor(deep: TracedModel, items: Sequence[Item], place: int, layer: Layer) -> tuple[str, int]:
    """Return the container of the deep network, and before which of its children a layer goes."""
    before = [one for one, _ in items[:place] if one >= 0][-1:]
    after = [one for one, _ in items[place:] if one >= 0][:1]
    candidates = []
    for neighbour, is_before in ((one, True) for one in before):
        other = deep.layers[neighbour]
        if other.output_shape == layer.output_shape:
            candidates.append((other, is_before))
    candidates += [(deep.layers[neighbour], False) for neighbour in after]
    candidates.sort(key=lambda one: one[0].kind != layer.kind)  # a block goes beside a block
    for other, is_before in candidates:
        children = _children(deep, other)
        if children is not None:
            return children.container, children.last + 1 if is_before else children.first
    raise StructureError(
        f"layer {layer.name!r} of the shallower network has no place in the deeper one: its "
        f"neighbours there are in no nn.Sequential or nn.ModuleList; {_ADVICE}"
    )


_DROPOUT = nn.modules.dropout._DropoutNd


def _submodule(graph: TracedModel, path: str) -> nn.Module:
    return graph.model.get_submodule(path)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _children(graph: TracedModel, layer: Layer) -> _Children | None:
    """Find the children of a container that make up a layer; None where there are none."""
    paths = {name.rpartition(".")[0] for name in layer.parameters}
    joins = {point.join for point in layer.calibration_points}
    nodes = graph.module.graph.nodes
    paths |= {module_path(one) for one in nodes if one.name in joins}  # which module adds
    common: list[str] = []
    for parts in zip(*(one.split(".") if one else [] for one in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    path = ".".join(common)
    is_stretch = len(paths) > 1 and path not in paths and _is_container(_submodule(graph, path))
    if is_stretch:  # several layers one behind the other
        names = {one.removeprefix(path).lstrip(".").split(".")[0] for one in paths}
    else:
        while True:
            if not path:
                return None
            path, _, child = path.rpartition(".")
            if _is_container(_submodule(graph, path)):
                break
        names = {child}
    keys = list(_submodule(graph, path)._modules)
    prefix = f"{path}." if path else ""
    places = [keys.index(name) for name in names]
    first, last = min(places), max(places)
    for key in keys[first : last + 1]:
        inside = _submodule(graph, prefix + key).named_parameters(prefix + key)
        if not {graph.aliases.get(name, name) for name, _ in inside} <= set(layer.parameters):
            return None
    within = [module_path(one) for one in nodes if one.name in layer.nodes]
    while last + 1 < len(keys):  # its activation and dropout
        following = prefix + keys[last + 1]
        module = _submodule(graph, following)
        runs = any(f"{one}.".startswith(f"{following}.") for one in within)
        if any(True for _ in module.parameters()) or not (runs or isinstance(module, _DROPOUT)):
            break
        last += 1
    return _Children(path, first, last)


def _copies(
    deep: TracedModel,
    shallow: TracedModel,
    alignment: LayerAlignment,
    before: Sequence[Item],
    layer: Layer,
) -> list[nn.Module]:
    """Copy a layer of the shallow network and give it the deep network's widths."""
    children = _children(shallow, layer)
    if children is None:
        raise StructureError(
            f"layer {layer.name!r} of the shallower network cannot be copied: it is in no "
            f"nn.Sequential or nn.ModuleList; {_ADVICE}"
        )
    sizes = _sizes(deep, shallow, alignment, before, layer)
    trainable = any(one.requires_grad for one in deep.model.parameters())
    state = shallow.state()
    prefix = f"{children.container}." if children.container else ""
    container = shallow.model.get_submodule(children.container)
    copies = []
    for key, child in list(container._modules.items())[children.first : children.last + 1]:
        assert child is not None
        made = copy.deepcopy(child)
        changed: dict[str, Tensor] = {}
        for name in layer.parameters:
            if name.startswith(f"{prefix}{key}."):
                shape = resized_shape(shallow, name, state[name].shape, sizes)
                if shape != state[name].shape:
                    changed[name.removeprefix(f"{prefix}{key}.")] = torch.ones(shape)
        fill(made, changed)
        copies.append(made.requires_grad_(trainable))
    return copies


def _sizes(
    deep: TracedModel,
    shallow: TracedModel,
    alignment: LayerAlignment,
    before: Sequence[Item],
    layer: Layer,
) -> Mapping[int, int]:
    """Return how many channels the shallow network's groups have in a layer's copy."""
    if layer.insertable == "identity":  # as many go out as come in
        flow = [deep.layers[one].hook_points[-1] for one, _ in before if one >= 0][-1]
        size = deep.groups[int(flow.groups[0])].size
        return {
            group.index: size
            for name in layer.parameters
            for group, _ in shallow.axes_by_parameter.get(name, ())
        }
    groups = lifting(deep, shallow, alignment.deep_to_shallow).groups
    return {other: one.size for one, other in zip(deep.groups, groups, strict=True) if other >= 0}


def _insert(container: nn.Module, insertions: Sequence[tuple[int, list[nn.Module]]]) -> None:
    """Put modules into a container, in place; what stands behind moves on."""
    children: list[tuple[str, nn.Module | None]] = list(container._modules.items())
    # From the last, so that positions hold; of several at one position the first stays first.
    ordered = sorted(insertions, key=lambda one: one[0])
    for position, modules in ordered[::-1]:
        children[position:position] = [("", one) for one in modules]
    numbered = all(not key or key.isdigit() for key, _ in children)
    taken = set(container._modules)
    names = (name for i in count() if (name := f"inserted_{i}") not in taken)
    container._modules.clear()
    for i, (key, child) in enumerate(children):
        container._modules[str(i) if numbered else key or next(names)] = child


# --- placing the layers --------------------------------------------------------------------------


def placed(
    template: TracedModel,
    deep: TracedModel,
    shallow: TracedModel,
    items: Sequence[Item],
    changes: tuple[Sequence[float], Sequence[float]],
    name: str = "into=",
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give every layer of a template the deep and the shallow layer that it stands for, or -1.

    As few layers as possible are left out, matched ones least of all; only residual blocks may be.
    Of those go that change least what they are given: ``changes`` says for each layer of both
    networks how much, in [0, 1]. Errors call the template by its ``name``.

    Raises
    ------
    StructureError
        A layer has no place in the template, or one of the template's can be no layer's and cannot
        be left unused.
    """
    layers = [_layer(deep, shallow, item) for item in items]
    cost = np.array(
        [
            [
                0.0
                if one.structure == other.structure and one.output_shape == other.output_shape
                else np.inf
                for other in layers
            ]
            for one in template.layers
        ]
    ).reshape(len(template.layers), len(layers))
    leaving_out = np.full(len(items), np.inf)
    for i, (layer, item) in enumerate(zip(layers, items, strict=True)):
        if layer.insertable == "zero":
            change = max(one[k] for one, k in zip(changes, item, strict=True) if k >= 0)
            # How many go counts for more than which do.
            leaving_out[i] = (len(items) + 1 if min(item) >= 0 else 1) * (len(items) + 1) + change
    try:
        found = align_layers(cost, skip=skip_costs(template), skip_shallow=leaving_out)
    except AlignmentError as error:
        stuck = template.layers[error.reached_deep : error.reached_deep + 1]
        left = layers[error.reached_shallow : error.reached_shallow + 1]
        reasons = [f"layer {one.name!r} of the networks finds no place in it" for one in left]
        reasons += [
            f"nothing can stand in for its layer {one.name!r}"
            for one in stuck
            if not one.insertable
        ]
        raise StructureError(
            f"{name} has {len(template.layers)} layers, and {'; '.join(reasons) or error}. It must "
            "have the layers of both networks, stage by stage; only residual blocks may be left out"
        ) from error
    both = [items[i] if i >= 0 else (-1, -1) for i in found.deep_to_shallow]
    return tuple(one for one, _ in both), tuple(other for _, other in both)
