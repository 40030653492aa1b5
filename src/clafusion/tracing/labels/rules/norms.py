"""Normalisations: over the batch, one sample, one layer or groups of channels."""

from __future__ import annotations

from torch import Tensor

from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Call, Label, ParameterView, rule
from clafusion.tracing.labels.rules.common import reduced, scale_by_computed, scale_channels


@rule(*["batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"])
def _batch_norm(propagation: LabelPropagation, call: Call) -> Label:
    """Let the affine parameters and the running statistics move with the channels."""
    ids = propagation.activation(call.label("input"), call.value("input"))
    for name in ("weight", "bias", "running_mean", "running_var"):
        scale_channels(propagation, call, name, ids)
    return (ids, None, None) if isinstance(call.output, tuple) else ids


@rule("instance_norm")
def _instance_norm(propagation: LabelPropagation, call: Call) -> Label:
    """Normalise each channel over its positions."""
    ids = propagation.activation(call.label("input"), call.value("input"))
    reduced(propagation, call.node.name, ids, range(2, ids.dim()))
    for name in ("weight", "bias", "running_mean", "running_var"):
        scale_channels(propagation, call, name, ids)
    return ids


@rule(*"layer_norm native_layer_norm rms_norm _fused_rms_norm".split())
def _layer_norm(propagation: LabelPropagation, call: Call) -> Label:
    """Normalise over the last axes, channels included: their number counts, not their order."""
    name = "input" if "input" in call.bound else "self"
    ids = propagation.activation(call.label(name), call.value(name))
    count = len(call.value("normalized_shape"))
    reduced(propagation, call.node.name, ids, range(ids.dim() - count, ids.dim()))
    for parameter in ("weight", "bias"):
        label = call.label(parameter)
        if isinstance(label, ParameterView):
            propagation.scale(label, ids)
        elif isinstance(label, Tensor):
            scale_by_computed(propagation, label, ids)
    return (ids, None, None) if isinstance(call.output, tuple) else ids


@rule(*["group_norm", "native_group_norm"])
def _group_norm(propagation: LabelPropagation, call: Call) -> Label:
    """Normalise over groups of neighbouring channels, which change places only within those."""
    ids = propagation.activation(call.label("input"), call.value("input"))
    groups = call.value("num_groups" if "num_groups" in call.bound else "group")
    reduced(
        propagation,
        call.node.name,
        ids.unflatten(1, (groups, ids.size(1) // groups)),
        range(2, ids.dim() + 1),
    )
    for name in ("weight", "bias"):
        scale_channels(propagation, call, name, ids)
    return (ids, None, None) if isinstance(call.output, tuple) else ids
