"""The module that holds the layers of several networks.

Where each network is the deeper one in some stage, none of their architectures can hold the others'
layers. Their *union* can: it is the reference's module with copies of the others' unmatched layers
put into its containers (``nn.Sequential``, ``nn.ModuleList``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import torch
from torch import Tensor, nn

from clafusion.alignment.models import naming
from clafusion.correspondence.correspondence import correspond
from clafusion.correspondence.structure import resized_shape
from clafusion.errors import ClafusionError, StructureError
from clafusion.profiling.thinning import thinned
from clafusion.targets.places import Place, layer_at
from clafusion.targets.union_blocks import whole_children
from clafusion.tracing.copies import copied
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import module_path
from clafusion.tracing.trace import trace_like
from clafusion.weights.build import fill

__all__ = ["union_model"]

_ADVICE = "give target=Like(module), a module that has a place for the layers of all networks"


@dataclass(frozen=True)
class _Children:
    """The children of a container that make up a layer: ``first`` to ``last``, both included."""

    container: str
    first: int
    last: int


def union_model(
    names: Sequence[str], models: Sequence[TracedModel], reference: int, places: Sequence[Place]
) -> TracedModel:
    """Build and trace the union's module: the reference's, with copies put in.

    It has to be traced anew, for no network of this structure was there before. What weights the
    copies hold does not matter; where widths differ, they get the reference's.

    Raises
    ------
    StructureError
        A layer's container is no ``nn.Sequential`` or ``nn.ModuleList``, or the module's code does
        not run what is put into it.
    """
    try:
        return _built(models, reference, places, _of_layers(names, models, reference, places))
    except StructureError:
        of_blocks = _of_blocks(models, reference, places)
        if of_blocks is None:
            raise
        return _built(models, reference, places, of_blocks)


_Insertions: TypeAlias = dict[str, list[tuple[int, list[nn.Module]]]]
"""For each container by its path: before which of its children which modules go."""


def _of_layers(
    names: Sequence[str], models: Sequence[TracedModel], reference: int, places: Sequence[Place]
) -> _Insertions:
    """Return copies of all layers that the reference lacks, and where they go, one by one."""
    base = models[reference]
    insertions: _Insertions = {}
    of_base = [place[reference] for place in places]
    for i, place in enumerate(places):
        if place[reference] >= 0:
            continue
        owner = next(p for p, k in enumerate(place) if k >= 0)
        layer = models[owner].layers[place[owner]]
        matched = tuple(one[owner] for one in places if one[reference] >= 0)
        with naming(names[owner]):
            path, position = _anchor(base, of_base, i, layer)
            copies = _copies(base, models[owner], matched, of_base[:i], layer)
        insertions.setdefault(path, []).append((position, copies))
    return insertions


def _of_blocks(
    models: Sequence[TracedModel], reference: int, places: Sequence[Place]
) -> _Insertions | None:
    """Return the same with whole blocks of several layers; None where they are no whole blocks."""
    base = models[reference]
    insertions: _Insertions = {}
    of_base = [place[reference] for place in places]
    i = 0
    while i < len(places):
        if of_base[i] >= 0:
            i += 1
            continue
        owner = next(p for p, k in enumerate(places[i]) if k >= 0)
        model = models[owner]
        stream = model.layers[places[i][owner]].stream
        own: list[Layer] = []
        start = i
        while i < len(places) and of_base[i] < 0 and places[i][owner] >= 0:
            if model.layers[places[i][owner]].stream != stream:
                break
            own.append(model.layers[places[i][owner]])
            i += 1
        before, after = (
            next((one for one in part if one >= 0 and base.layers[one].stream == stream), -1)
            for part in (of_base[:start][::-1], of_base[i:])
        )
        found = whole_children(model, base, own, before, after)
        if found is None:
            return None
        matched = tuple(one[owner] for one in places if one[reference] >= 0)
        sizes = _sizes(base, model, matched, of_base[:start], own[0])
        copies = _resized_copies(base, model, found.container, found.keys, sizes)
        insertions.setdefault(found.container, []).append((found.position, copies))
    return insertions


def _built(
    models: Sequence[TracedModel],
    reference: int,
    places: Sequence[Place],
    insertions: _Insertions,
) -> TracedModel:
    """Build and trace the reference's module with what is put into it."""
    base = models[reference]
    module = copied(base.model)
    # Found before anything moves: a container may lie in another one.
    containers = [(module.get_submodule(path), inserted) for path, inserted in insertions.items()]
    for container, inserted in containers:
        _insert(container, inserted)
    try:
        union = trace_like(module, base)
        union = union if base.thinning is None else thinned(union)
    except (ClafusionError, RuntimeError) as error:
        raise StructureError(
            f"the union of the networks does not run ({error}); {_ADVICE}"
        ) from error
    wanted = [layer_at(models, place).structure for place in places]
    if [layer.structure for layer in union.layers] != wanted:
        raise StructureError(
            f"the module's code does not run what is put into it: {len(places)} layers are "
            f"wanted, and it has {len(union.layers)}, or others; {_ADVICE}"
        )
    return union


def _anchor(base: TracedModel, of_base: Sequence[int], place: int, layer: Layer) -> tuple[str, int]:
    """Return the container of the reference, and before which of its children a layer goes."""
    here = [i for i, one in enumerate(of_base) if one >= 0]
    here = [i for i in here if base.layers[of_base[i]].stream == layer.stream]
    before = [of_base[i] for i in here if i < place][-1:]
    after = [of_base[i] for i in here if i >= place][:1]
    candidates = [
        (base.layers[one], True) for one in before if base.layers[one].stage == layer.stage
    ]
    candidates += [(base.layers[one], False) for one in after]
    candidates.sort(key=lambda one: one[0].kind != layer.kind)  # a block goes beside a block
    for other, is_before in candidates:
        children = _children(base, other)
        if children is not None:
            return children.container, children.last + 1 if is_before else children.first
    raise StructureError(
        f"layer {layer.name!r} has no place in the network that gives the structure: its "
        f"neighbours there are in no nn.Sequential or nn.ModuleList; {_ADVICE}"
    )


_DROPOUT = nn.modules.dropout._DropoutNd


def _submodule(model: TracedModel, path: str) -> nn.Module:
    return model.model.get_submodule(path)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _children(model: TracedModel, layer: Layer) -> _Children | None:
    """Find the children of a container that make up a layer; None where there are none."""
    found = _container(model, layer)
    if found is None:
        return None
    path, names = found
    keys = list(_submodule(model, path)._modules)
    prefix = f"{path}." if path else ""
    places = [keys.index(name) for name in names]
    first, last = min(places), max(places)
    for key in keys[first : last + 1]:
        inside = _submodule(model, prefix + key).named_parameters(prefix + key)
        if not {model.aliases.get(name, name) for name, _ in inside} <= set(layer.parameters):
            return None
    within = [module_path(one) for one in model.module.graph.nodes if one.name in layer.nodes]
    while last + 1 < len(keys):  # its activation and dropout
        following = prefix + keys[last + 1]
        module = _submodule(model, following)
        runs = any(f"{one}.".startswith(f"{following}.") for one in within)
        if any(True for _ in module.parameters()) or not (runs or isinstance(module, _DROPOUT)):
            break
        last += 1
    return _Children(path, first, last)


def _container(model: TracedModel, layer: Layer) -> tuple[str, set[str]] | None:
    """Return the path of the container that holds a layer, and the names of its children."""
    paths = {name.rpartition(".")[0] for name in layer.parameters}
    joins = {point.join for point in layer.calibration_points}
    paths |= {module_path(one) for one in model.module.graph.nodes if one.name in joins}
    common: list[str] = []
    for parts in zip(*(one.split(".") if one else [] for one in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    path = ".".join(common)
    is_stretch = len(paths) > 1 and path not in paths and _is_container(_submodule(model, path))
    if is_stretch:  # several modules one behind the other
        return path, {one.removeprefix(path).lstrip(".").split(".")[0] for one in paths}
    while path:
        path, _, child = path.rpartition(".")
        if _is_container(_submodule(model, path)):
            return path, {child}
    return None


def _copies(
    base: TracedModel,
    owner: TracedModel,
    matched: tuple[int, ...],
    before: Sequence[int],
    layer: Layer,
) -> list[nn.Module]:
    """Copy a layer of another network and give it the reference's widths."""
    children = _children(owner, layer)
    if children is None:
        raise StructureError(
            f"layer {layer.name!r} cannot be copied into another network: it is in no "
            f"nn.Sequential or nn.ModuleList; {_ADVICE}"
        )
    sizes = _sizes(base, owner, matched, before, layer)
    keys = list(_submodule(owner, children.container)._modules)
    keys = keys[children.first : children.last + 1]
    return _resized_copies(base, owner, children.container, keys, sizes)


def _resized_copies(
    base: TracedModel,
    owner: TracedModel,
    path: str,
    keys: Sequence[str],
    sizes: Mapping[int, int],
) -> list[nn.Module]:
    """Copy children of a container, with other sizes of channel groups."""
    trainable = any(one.requires_grad for one in base.model.parameters())
    state = owner.state()
    prefix = f"{path}." if path else ""
    container = owner.model.get_submodule(path)
    copies = []
    for key in keys:
        child = container._modules[key]
        assert child is not None
        made = copied(child)
        changed: dict[str, Tensor] = {}
        for name in state:
            if name.startswith(f"{prefix}{key}."):
                shape = resized_shape(owner, name, state[name].shape, sizes)
                if shape != state[name].shape:
                    changed[name.removeprefix(f"{prefix}{key}.")] = torch.ones(shape)
        fill(made, changed)
        copies.append(made.requires_grad_(trainable))
    return copies


def _sizes(
    base: TracedModel,
    owner: TracedModel,
    matched: tuple[int, ...],
    before: Sequence[int],
    layer: Layer,
) -> Mapping[int, int]:
    """Return how many channels the other network's groups have in a layer's copy."""
    if layer.insertable == "identity":  # as many go out as come in
        flow = [base.layers[one].hook_points[-1] for one in before if one >= 0][-1]
        size = base.groups[int(flow.groups[0])].size
        return {
            group.index: size
            for name in layer.parameters
            for group, _ in owner.axes_by_parameter.get(name, ())
        }
    groups = correspond(base, owner, matched).groups
    return {other: one.size for one, other in zip(base.groups, groups, strict=True) if other >= 0}


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
