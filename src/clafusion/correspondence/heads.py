"""Unite the heads of two networks that have different numbers of them.

Where both networks have equally many heads (of an attention, or groups of a convolution), each head
has channel groups of its own. Where the numbers differ, the groups of all heads are united into
one, whose plan moves heads as wholes. So are the entries that heads have in a table, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.model import (
    ChannelGroup,
    HeadPartition,
    TracedModel,
    UnitedHeads,
)

__all__ = ["unite_heads", "unite_models"]


def unite_heads(
    target: ModelProfile, source: ModelProfile, layer_map: Sequence[int]
) -> tuple[ModelProfile, ModelProfile]:
    """Unite the heads of two profiled models; see :func:`unite_models`."""
    pairs = list(_unequal(target.traced, source.traced, layer_map))
    of_target, of_source = zip(*pairs, strict=True) if pairs else ((), ())
    return _united_profile(target, of_target), _united_profile(source, of_source)


def unite_models(
    target: TracedModel, source: TracedModel, layer_map: Sequence[int]
) -> tuple[TracedModel, TracedModel]:
    """Unite the groups of the heads of which matched layers have different numbers.

    ``layer_map`` has for each layer of the target that of the source, or -1. Returns the
    same models with ``united_heads``, which correspond in order; or what was given, where all
    matched layers have the same numbers.
    """
    pairs = list(_unequal(target, source, layer_map))
    of_target, of_source = zip(*pairs, strict=True) if pairs else ((), ())
    return _united(target, of_target), _united(source, of_source)


def _unequal(
    target: TracedModel, source: TracedModel, layer_map: Sequence[int]
) -> Iterator[tuple[HeadPartition, HeadPartition]]:
    """Yield heads of matched layers that correspond, where their numbers differ."""
    matched = [
        (layer, k)
        for layer, k in zip(target.layers, layer_map, strict=True)
        if k >= 0 and len(layer.parameters) == len(source.layers[k].parameters)
    ]
    # What reads the values of heads may be the layer behind theirs.
    names = {
        name: other
        for layer, k in matched
        for name, other in zip(layer.parameters, source.layers[k].parameters, strict=True)
    }
    back = {other: name for name, other in names.items()}
    for layer, k in matched:
        yield from _counterparts(target, source, layer.index, k, names)
        for of_source, of_target in _counterparts(source, target, k, layer.index, back):
            if len(of_target.members) == 1:  # which is no head among several
                yield of_target, of_source


def _counterparts(
    model: TracedModel, other: TracedModel, layer: int, other_layer: int, names: Mapping[str, str]
) -> Iterator[tuple[HeadPartition, HeadPartition]]:
    """Yield a layer's heads with those of the other network, of which it has another number."""
    of_layer = [one for one in model.heads if one.layer == layer and not one.is_shared]
    if not of_layer:
        return
    by_places: dict[Any, list[ChannelGroup]] = {}
    for one in other.groups:
        by_places.setdefault(_places(other, one, None), []).append(one)
    columns_of_other = {
        places: columns
        for heads in other.heads
        if heads.layer == other_layer and not heads.is_shared
        for places, columns in _columns(other, heads, None).items()
    }
    for heads in of_layer:
        found: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for places, columns in _columns(model, heads, names).items():
            alike = by_places.get(places, [])
            # A head of a table or of rotary queries has many groups, which correspond in order.
            theirs = columns_of_other.get(places, [])
            if len(alike) == 1 or (not theirs and len(alike) == len(columns)):  # a single head
                theirs = [(one.index,) for one in alike]
            if len(theirs) == len(columns) and sum(map(len, theirs)) == len(alike):
                found.setdefault(len(theirs[0]), []).extend(zip(columns, theirs, strict=True))
        for count, pairs in found.items():
            ours, others = zip(*pairs, strict=True)
            # Of an attention's head channels are counted; else one group may be of many heads of
            # one channel each, as are groups of a norm.
            is_head = any(other.groups[one[0]].is_counted for one in others)
            if count != len(heads.members) and (count > 1 or is_head):
                yield (
                    HeadPartition(layer, tuple(zip(*ours, strict=True))),
                    HeadPartition(other_layer, tuple(zip(*others, strict=True))),
                )


def _columns(
    model: TracedModel, heads: HeadPartition, names: Mapping[str, str] | None
) -> dict[Any, list[tuple[int, ...]]]:
    """Return the groups that correspond across some heads, those of equal places together."""
    found: dict[Any, list[tuple[int, ...]]] = {}
    for column in zip(*heads.members, strict=True):
        if _in_one_use(model, column):
            places = _places(model, model.groups[column[0]], names)
            found.setdefault(places, []).append(column)
    return found


def _places(model: TracedModel, one: ChannelGroup, names: Mapping[str, str] | None) -> Any:
    """Return where a group occurs, but for its positions there."""
    found = []
    for group_axis in one.axes:
        name = group_axis.use.parameter
        uses = [use.index for use in model.uses_by_parameter[name]]
        shown = name if names is None else names.get(name)
        place = uses.index(group_axis.use.index)
        repeats = one.places_of_a_head(group_axis.positions.size(1))
        found.append((shown, place, group_axis.axis, group_axis.direction, repeats))
    return tuple(found)


def _in_one_use(model: TracedModel, groups: Sequence[int]) -> bool:
    """Say whether some groups lie side by side, and not in views of their own as groups do."""
    places = [
        [(group_axis.use.index, group_axis.axis) for group_axis in model.groups[one].axes]
        for one in groups
    ]
    return all(one == places[0] for one in places)


def _united_profile(profile: ModelProfile, groups: Sequence[HeadPartition]) -> ModelProfile:
    importance = profile.importance
    if groups and importance:
        importance = tuple(
            torch.cat([importance[index] for index in parts]) / len(parts)
            for parts in _parts(profile.traced, groups)
        )
    return replace(profile, traced=_united(profile.traced, groups), importance=importance)


def _parts(model: TracedModel, partitions: Sequence[HeadPartition]) -> list[tuple[int, ...]]:
    """Return for each group that there is afterwards those of which it is made."""
    columns = {column[0]: column for one in partitions for column in zip(*one.members, strict=True)}
    gone = {index for column in columns.values() for index in column[1:]}
    return [columns.get(one.index, (one.index,)) for one in model.groups if one.index not in gone]


def _united(model: TracedModel, partitions: Sequence[HeadPartition]) -> TracedModel:
    """Return a model in which the groups of some heads are united."""
    if not partitions:
        return model
    groups: list[ChannelGroup] = []
    new_group = torch.full((len(model.groups) + 1,), -1)  # the last for fixed channels
    offset = torch.zeros(len(model.groups) + 1, dtype=torch.int64)
    for indices in _parts(model, partitions):
        parts = [model.groups[index] for index in indices]
        for place, part in enumerate(parts):
            new_group[part.index] = len(groups)
            offset[part.index] = place * part.size
        group_axes = tuple(
            replace(each[0], positions=torch.cat([one.positions for one in each]))
            for each in zip(*(part.axes for part in parts), strict=True)
        )
        atoms = torch.cat([part.atoms for part in parts])
        is_counted = any(part.is_counted for part in parts)
        shape = parts[0].sharing, len(parts) * parts[0].heads
        is_averaged = any(part.is_averaged for part in parts)
        groups.append(
            ChannelGroup(
                len(groups), len(atoms), atoms, group_axes, is_counted, *shape, is_averaged
            )
        )

    def renamed(one: Any) -> Any:
        """Name the channels of a hook point or a calibration point by the united groups."""
        members = one.members + offset[one.groups]
        return replace(one, groups=new_group[one.groups], members=members)

    layers = tuple(
        replace(
            layer,
            hook_points=tuple(map(renamed, layer.hook_points)),
            calibration_points=tuple(map(renamed, layer.calibration_points)),
        )
        for layer in model.layers
    )
    gone = {index for one in partitions for head in one.members for index in head}
    left = []
    for heads in model.heads:
        kept = [
            [int(new_group[index]) for index in column]
            for column in zip(*heads.members, strict=True)
            if column[0] not in gone
        ]
        if kept:
            left.append(replace(heads, members=tuple(zip(*kept, strict=True))))
    united_heads = tuple(
        UnitedHeads(
            one.layer, len(one.members), tuple(int(new_group[index]) for index in one.members[0])
        )
        for one in partitions
    )
    return replace(
        model, layers=layers, groups=tuple(groups), heads=tuple(left), united_heads=united_heads
    )
