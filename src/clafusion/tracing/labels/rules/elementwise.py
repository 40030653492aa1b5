"""Operations that work element by element: arithmetic, activations, gates."""

from __future__ import annotations

from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import POINTWISE, Call, Label, rule
from clafusion.tracing.labels.rules.common import combined, joined, scale_channels

__all__ = ["elementwise"]


@rule(
    POINTWISE,
    *"""where masked_fill clamp clamp_min clamp_max hardtanh relu6 rrelu softplus hardswish
    hardsigmoid hardshrink softshrink threshold celu selu elu gelu silu mish log_sigmoid
    leaky_relu softsign __and__ __or__ __xor__ multiply subtract divide true_divide
    floor_divide negative absolute clip square fix rsub greater greater_equal less less_equal
    not_equal arccos arccosh arcsin arcsinh arctan arctanh arctan2 float_power isfinite isinf
    isnan nan_to_num special_expit special_expm1 special_log1p special_erf
    logical_and logical_or logical_xor logical_not complex polar""".split(),
)
def elementwise(propagation: LabelPropagation, call: Call) -> Label:
    """Unite the labels of the operands element by element."""
    operands = [node for _, node in call.tensors()]
    return combined(
        propagation,
        call.node.name,
        [(call.label_of(node), call.value_of(node)) for node in operands],
    )


@rule("prelu")
def _prelu(propagation: LabelPropagation, call: Call) -> Label:
    """Let the slopes move with the channels."""
    ids = propagation.activation(call.label("self"), call.value("self"))
    scale_channels(propagation, call, "weight", ids)
    return ids


@rule("glu")
def _glu(propagation: LabelPropagation, call: Call) -> Label:
    """Unite each channel with its gate, which lies in the other half of the axis."""
    ids = propagation.activation(call.label("self"), call.value("self"))
    first, second = ids.chunk(2, dim=call.value("dim"))
    propagation.unite(first, second)
    return joined(call.node.name, [first, second], first.shape)
