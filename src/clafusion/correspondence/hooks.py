"""Which hook points of two networks show the same channels at the same place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.tracing.layer import HookPoint, Layer
from clafusion.tracing.model import TracedModel
from clafusion.tracing.points import places_of

__all__ = ["HookPair", "SharedHooks", "source_hook"]


@dataclass(frozen=True)
class HookPair:
    """Hook points of both networks that show the same group at the same place.

    ``target`` and ``source`` are keys ``(layer, index)`` of ``ModelProfile.rows``; the columns are
    those of the group's channels, in the order of its members.
    """

    target: tuple[int, int]
    source: tuple[int, int]
    target_columns: Tensor
    source_columns: Tensor


class SharedHooks:
    """The hook points of two networks that show the same value, under a layer map.

    ``by_group`` has for each channel group of the target the hook points that show it, and the
    source's counterpart of each: ``(layer, place in its hook points)``.
    """

    def __init__(
        self, target: TracedModel, source: TracedModel, layer_map: tuple[int, ...]
    ) -> None:
        self.target, self.source = target, source
        self.by_group: dict[int, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
        for layer in target.layers:
            for i, hook in enumerate(layer.hook_points):
                key = source_hook(source, layer_map, layer, i)
                if key is not None:
                    for group in hook.groups.unique().tolist():
                        self.by_group.setdefault(group, []).append(((layer.index, i), key))

    def pairs(self, target_group: int, source_group: int) -> Iterator[HookPair]:
        """Yield the hook points that show a group of the target and one of the source."""
        if source_group < 0:
            return
        seen: set[tuple[str, str]] = set()
        for of_target, of_source in self.by_group.get(target_group, ()):
            hook = self.target.layers[of_target[0]].hook_points[of_target[1]]
            other = self.source.layers[of_source[0]].hook_points[of_source[1]]
            nodes = (hook.post, other.post)
            # Where one shows queries and keys and the other keys alone, they show not the same.
            turns = [
                int((one.groups == index).sum()) / model.groups[index].size
                for model, one, index in (
                    (self.target, hook, target_group),
                    (self.source, other, source_group),
                )
            ]
            if turns[0] == turns[1] and nodes not in seen:
                seen.add(nodes)
                columns = _columns(hook, target_group), _columns(other, source_group)
                yield HookPair(of_target, of_source, *columns)


def source_hook(
    source: TracedModel, layer_map: tuple[int, ...], layer: Layer, index: int
) -> tuple[int, int] | None:
    """Return the key of where the source shows what a hook point of the target's layer shows."""
    hook = layer.hook_points[index]
    k = layer_map[layer.index]
    if k >= 0:
        others = source.layers[k].hook_points
        candidates = [(k, i) for i, one in enumerate(others) if one.readers & hook.readers]
    elif layer.insertable == "identity":
        # An identity passes on what the layer before it puts out, which the layer after it reads;
        # a pooling between them decides which of the two has the right positions.
        stream = [
            one for one in layer_map if one >= 0 and source.layers[one].stream == layer.stream
        ]
        before = [one for one in stream if one in layer_map[: layer.index]]
        after = [one for one in stream if one in layer_map[layer.index :]]
        candidates = [(one, len(source.layers[one].hook_points) - 1) for one in before[-1:]]
        candidates += [(one, 0) for one in after[:1]]
    else:
        candidates = []
    for one, place in candidates:
        hooks = source.layers[one].hook_points
        if 0 <= place < len(hooks) and _many(hooks[place]) == _many(hook):
            return one, place
    return None


def _many(hook: HookPoint) -> tuple[int, ...]:
    """Return the positions without axes of one, as that of the heads is where there is one head."""
    return tuple(size for size in hook.positions if size != 1)


def _columns(hook: HookPoint, group: int) -> Tensor:
    """Return where a group's channels lie in a hook point, by member (the first of repeats)."""
    places = places_of(hook, group)
    members = hook.members[places]
    first = torch.ones_like(members, dtype=torch.bool)
    first[1:] = members[1:] != members[:-1]
    return places[first]
