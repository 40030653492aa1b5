"""What ``--json`` prints: the same as the tables, for a machine."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from clafusion.alignment.models import AlignedModels, PairAlignment
from clafusion.merging.problem import Parent
from clafusion.results import FusionResult
from clafusion.tracing.model import TracedModel
from clafusion.tracing.pinned import movable_share
from clafusion.tracing.rotations import find_rotatable

__all__ = ["alignment_facts", "fusion_facts", "model_facts"]


def alignment_facts(aligned: AlignedModels) -> dict[str, Any]:
    """Return the models' layers and every alignment with the reference."""
    return {
        "models": [
            {
                "name": name,
                "layers": aligned.layer_names(i),
                "pinned": _pinned_facts(aligned.profiles[i].traced),
            }
            for i, name in enumerate(aligned.names)
        ],
        "reference": aligned.names[aligned.reference],
        "alignments": [_pair_facts(aligned, pair) for pair in aligned.pairs],
        "samples": aligned.profiles[aligned.reference].num_inputs,
    }


def _pair_facts(aligned: AlignedModels, pair: PairAlignment) -> dict[str, Any]:
    alignment = pair.alignment
    return {
        "deep": aligned.names[pair.deep],
        "shallow": aligned.names[pair.shallow],
        "deep_to_shallow": [k if k >= 0 else None for k in alignment.deep_to_shallow],
        "costs": [
            [float(cost) if math.isfinite(cost) else None for cost in row] for row in alignment.cost
        ],
        "total_cost": alignment.matched_cost,
        "forced": alignment.forced,
    }


def fusion_facts(result: FusionResult) -> dict[str, Any]:
    """Return the alignments, what became of each parent, how good it is, options and seconds.

    Of a fusion of one model after another the alignments and parents are those of each step.
    """
    steps = [_step_facts(one) for one in result.steps or (result,)]
    return {
        **(steps[0] if len(steps) == 1 else {"steps": steps}),
        "weights": list(result.weights),
        "anchor": result.anchor,
        "averaged": list(result.averaged),
        "left_out": list(result.left_out),
        "rounds": result.rounds,
        "converged": result.converged,
        "assessment": None if result.assessment is None else result.assessment.to_dict(),
        "config": result.config.to_dict(),
        "seconds": dict(result.timings),
    }


def _step_facts(result: FusionResult) -> dict[str, Any]:
    target = result.problem.target
    return {
        **alignment_facts(result.aligned),
        "target": [layer.name for layer in target.layers],
        "parents": [_parent_facts(one) for one in result.parents],
        "layer_weights": [list(weights) for weights in result.layer_weights],
    }


def _parent_facts(parent: Parent) -> dict[str, Any]:
    source, target = parent.correspondence.source, parent.correspondence.target
    return {
        "name": parent.name,
        "layer_map": [k if k >= 0 else None for k in parent.correspondence.layer_map],
        "groups": [
            {"name": one.name, "channels": None if plan is None else list(plan.shape)}
            for one, plan in zip(target.groups, parent.plans, strict=True)
        ],
        "rotated": [target.groups[index].name for index in parent.rotations],
        "head_orders": [
            {"layer": source.layers[source.heads[index].layer].name, "order": list(order)}
            for index, order in parent.head_orders.items()
        ],
        "heads": [
            {"layer": target.layers[to.layer].name, "source": of.count, "target": to.count}
            for of, to in zip(source.united_heads, target.united_heads, strict=True)
        ],
    }


def _pinned_facts(model: TracedModel) -> list[dict[str, Any]]:
    """Return the channels that keep their places although they might change them."""
    return [asdict(one) for one in model.pinned]


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
        "pinned": _pinned_facts(model),
        "movable": movable_share(model),
    }
