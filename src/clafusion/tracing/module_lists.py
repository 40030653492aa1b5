"""Modules of a list that may change places as wholes: a mixture's experts, branches of a sum.

Experts in one tensor have channel groups whose places differ by their position alone. Those in a
list have parameters of their own, so that the parameters change places, and with them the channels
elsewhere that belong to one module each, as the rows of a router.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from clafusion.tracing.layer import Layer
from clafusion.tracing.model import ChannelGroup, HeadPartition, TracedModel

__all__ = ["ModuleList", "module_lists", "possible_list_heads"]


@dataclass(frozen=True)
class ModuleList:
    """Modules of a list within one layer.

    Attributes
    ----------
    layer
        Position of the layer.
    names
        For each module its parameters and buffers; the n-th of all modules correspond.
    """

    layer: int
    names: tuple[tuple[str, ...], ...]


def module_lists(
    shapes: Mapping[str, tuple[int, ...]], layers: Sequence[Layer]
) -> list[ModuleList]:
    """Return the lists of modules, of equal parameters, that lie within one layer each.

    Parameters
    ----------
    shapes
        The shape of each parameter and buffer.
    layers
        The layers of the model.
    """
    where = {name: layer.index for layer in reversed(layers) for name in layer.parameters}
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in shapes:
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdigit():
                of_list = found.setdefault(".".join(parts[:place]), {})
                of_list.setdefault(int(part), {})[".".join(parts[place + 1 :])] = name
    lists = []
    for modules in found.values():
        ordered = [modules[i] for i in sorted(modules)]
        first = {suffix: shapes[name] for suffix, name in ordered[0].items()}
        are_alike = all(
            {suffix: shapes[name] for suffix, name in one.items()} == first for one in ordered
        )
        at = {where.get(name) for one in ordered for name in one.values()}
        if len(ordered) > 1 and are_alike and len(at - {None}) == 1:
            layer = next(one for one in at if one is not None)
            names = tuple(tuple(one[suffix] for suffix in first) for one in ordered)
            lists.append(ModuleList(layer, names))
    return lists


def possible_list_heads(
    model: TracedModel, others: Iterable[HeadPartition] = ()
) -> list[tuple[tuple[HeadPartition, ...], ...]]:
    """Return what may be modules that can change places; only a trial shows which can.

    Parameters
    ----------
    model
        The traced model.
    others
        What else may change places. Modules that have such heads within them keep theirs.

    Returns
    -------
    list
        For each list the alternatives: with all channels of which each module may have one, and
        without those.
    """
    shapes = {name: tuple(one.shape) for name, one in model.state().items()}
    taken = {
        index
        for one in others
        for head in one.members
        for index in head
        if model.groups[index].size > 1
    }
    found: list[tuple[tuple[HeadPartition, ...], ...]] = []
    for one in module_lists(shapes, model.layers):
        own = _own_groups(model.groups, one)
        if own is not None and taken.isdisjoint(own[0]) and not _read_one_another(model, one):
            with_singles = [*zip(*own, strict=True), *_single_channels(model, one)]
            alternatives = dict.fromkeys(
                HeadPartition(one.layer, tuple(zip(*columns, strict=True)), parameters=one.names)
                for columns in (with_singles, list(zip(*own, strict=True)))
            )
            found.append(tuple((partition,) for partition in alternatives))
    return found


def _own_groups(groups: Sequence[ChannelGroup], listing: ModuleList) -> list[list[int]] | None:
    """Return the channel groups that lie within each module, in order.

    None where there are none, or where those of the modules do not correspond.
    """
    places = {name: (i, k) for i, names in enumerate(listing.names) for k, name in enumerate(names)}
    own: list[list[int]] = [[] for _ in listing.names]
    shown: list[list[Any]] = [[] for _ in listing.names]
    for group in groups:
        at = [places.get(one.use.parameter, (-1, -1)) for one in group.axes]
        owners = {owner for owner, _ in at}
        if len(owners) == 1 and -1 not in owners:
            (owner,) = owners
            own[owner].append(group.index)
            axes = [(k, one.use.size, one.axis) for (_, k), one in zip(at, group.axes, strict=True)]
            shown[owner].append((group.size, axes))
    return own if own[0] and all(one == shown[0] for one in shown) else None


def _single_channels(model: TracedModel, listing: ModuleList) -> Iterator[tuple[int, ...]]:
    """Yield the lone channels of a layer's other parameters, where each module has one of them."""
    inside = {name for names in listing.names for name in names}
    outside = set(model.layers[listing.layer].parameters) - inside
    families: dict[Any, list[ChannelGroup]] = {}
    for group in model.groups:
        if group.size == 1 and outside.issuperset(one.use.parameter for one in group.axes):
            places = tuple((one.use.parameter, one.use.role, one.axis) for one in group.axes)
            families.setdefault(places, []).append(group)
    for family in families.values():
        if len(family) == len(listing.names):
            family.sort(key=lambda one: int(one.axes[0].positions.min()))
            yield tuple(one.index for one in family)


def _read_one_another(model: TracedModel, listing: ModuleList) -> bool:
    """Return whether a module of a list reads what another one computes, as layers of a chain."""
    owners = {name: 1 << i for i, names in enumerate(listing.names) for name in names}
    placeholders = iter(model.placeholders)
    weights: dict[fx.Node, int] = {}  # of what is computed from weights alone: whose they are
    behind: dict[fx.Node, int] = {}  # the modules of which a value depends
    for node in model.module.graph.nodes:
        if node.op == "placeholder":
            name = next(placeholders)
            if name is None:
                behind[node] = 0
            else:
                weights[node] = owners.get(name, 0)
            continue
        read = computed = 0
        for operand in node.all_input_nodes:
            read |= weights.get(operand, 0)
            computed |= behind.get(operand, 0)
        if all(operand in weights for operand in node.all_input_nodes):
            weights[node] = read
        elif read and computed & ~read:
            return True
        else:
            behind[node] = read | computed
    return False
