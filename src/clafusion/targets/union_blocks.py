"""Whole modules that hold several layers, for the union of networks.

A block of a transformer is one child of an ``nn.ModuleList`` with two layers or three. Where
another network has more of them, the union gets copies of children, not of their layers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from clafusion.tracing.layer import Layer
from clafusion.tracing.model import TracedModel

__all__ = ["WholeChildren", "whole_children"]


@dataclass(frozen=True)
class WholeChildren:
    """Children of a container whose layers are what some network lacks.

    Attributes
    ----------
    container
        The container's path, in the network that has them and in the one that gets them.
    keys
        Their names, in order.
    position
        Before which of its children the other network gets them.
    """

    container: str
    keys: tuple[str, ...]
    position: int


def whole_children(
    owner: TracedModel, base: TracedModel, wanted: Sequence[Layer], before: int, after: int
) -> WholeChildren | None:
    """Return the children that bring layers into another network; None where none do.

    What they bring may begin within a block: (MLP, attention) between an attention and an MLP is
    what a block (attention, MLP) brings, put behind the block of that attention.

    Parameters
    ----------
    owner, wanted
        A network, and consecutive layers of it.
    base, before, after
        The other network, and its layers between which they go; -1 for none.
    """
    for path, container in owner.model.named_modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        found = _brought(owner, path, list(container._modules), wanted)
        position = _position(base, path, before, after)
        if found is not None and position is not None:
            return WholeChildren(path, found, position)
    return None


def _brought(
    owner: TracedModel, path: str, keys: Sequence[str], wanted: Sequence[Layer]
) -> tuple[str, ...] | None:
    """Return children with layers like those that are wanted, in the order of some turn."""
    structures = [layer.structure for layer in wanted]
    first = next(
        (i for i, key in enumerate(keys) if wanted[0] in _layers_of(owner, path, key)), None
    )
    for start in range(first or 0, len(keys)) if first is not None else ():
        layers: list[Layer] = []
        for end in range(start, len(keys)):
            # The last norm of a post-norm network is in its last block, and stays there.
            layers += [one for one in _layers_of(owner, path, keys[end]) if one.kind != "norm"]
            if len(layers) < len(wanted):
                continue
            own = [layer.structure for layer in layers]
            turns = (own[i:] + own[:i] for i in range(len(own)))
            if len(own) == len(wanted) and any(one == structures for one in turns):
                return tuple(keys[start : end + 1])
            break
    return None


def _layers_of(model: TracedModel, path: str, key: str) -> list[Layer]:
    """Return the layers whose parameters lie in a child.

    Those of the norm before a post-norm block may lie in the child before.
    """
    prefix = f"{path}.{key}." if path else f"{key}."
    found = []
    for layer in model.layers:
        of_norm = {name for name, _ in layer.fillings} - set(layer.last_write)
        inside = [name.startswith(prefix) for name in layer.parameters if name not in of_norm]
        if inside and all(inside):
            found.append(layer)
    return found


def _position(model: TracedModel, path: str, before: int, after: int) -> int | None:
    """Return the place behind the child that has the layer before, or of the one behind."""
    try:
        container = model.model.get_submodule(path)
    except AttributeError:
        return None
    if not isinstance(container, (nn.Sequential, nn.ModuleList)):
        return None
    keys = list(container._modules)
    for layer, step in ((before, 1), (after, 0)):
        for i, key in enumerate(keys if layer >= 0 else ()):
            if model.layers[layer] in _layers_of(model, path, key):
                return i + step
    return None
