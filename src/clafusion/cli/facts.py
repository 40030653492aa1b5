"""What ``clafusion inspect --json`` prints: the same as its tables, for a machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from clafusion.tracing.model import TracedModel
from clafusion.tracing.pinned import movable_share
from clafusion.tracing.rotations import find_rotatable

__all__ = ["model_facts"]


def model_facts(model: TracedModel) -> dict[str, Any]:
    """Return a model's layers, channel groups and heads."""
    rotatable = find_rotatable(model)
    return {
        "parameters": sum(one.numel() for one in model.model.parameters()),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "output_shape": list(layer.output_shape),
                "insertable": layer.insertable,
                "stream": model.streams[layer.stream].name,
                "parameters": list(layer.parameters),
            }
            for layer in model.layers
        ],
        "groups": [
            {
                "name": one.name,
                "channels": one.size,
                "axes": [
                    {
                        "parameter": axis.use.parameter,
                        "axis": axis.axis,
                        "direction": axis.direction,
                    }
                    for axis in one.axes
                ],
            }
            for one in model.groups
        ],
        "heads": [
            {
                "layer": model.layers[one.layer].name,
                "groups": [list(members) for members in one.members],
            }
            for one in model.heads
        ],
        "rotatable": [{"name": one.name, "channels": one.size} for one in rotatable.groups],
        "unrotatable": dict(rotatable.refused),
        "pinned": [asdict(one) for one in model.pinned],
        "movable": movable_share(model),
    }
