r"""What is done to a layer's values in one pass over memory: rescaling, and what follows it.

REPAIR measures a layer's outputs over all inputs and then rescales them. A BatchNorm before that,
and the residual addition and the ReLU behind it, are one more map of each value alone:

.. math:: z = \min(\max(s_c\, x_c + t_c + o,\ \text{low}),\ \text{high})

So the values that the BatchNorm reads are measured, and everything up to the ReLU is done to them
at once. The moments of what the BatchNorm puts out follow: of :math:`y = a x + b` the mean is
:math:`a \mu_x + b` and the deviation :math:`|a| \sigma_x`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from clafusion import _native
from clafusion.execution.call import State
from clafusion.execution.walk import Walk
from clafusion.profiling.moments import plain_view
from clafusion.tracing.layer import CalibrationPoint
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import bound_operands, op_name

__all__ = ["Epilogue", "epilogues"]

_BOUNDS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True)
class Epilogue:
    """A calibration point, and the operations around it that are done with its rescaling.

    Attributes
    ----------
    point
        The calibration point.
    source
        The node whose values are measured: the point's own, or what its BatchNorm reads.
    factor, offset
        What the BatchNorm does to each channel, float64; None where there is none.
    other
        The node that is added behind the point; None for none.
    low, high
        The bounds to which the sum is clamped.
    last
        The node whose values come of it.
    skipped
        The nodes that do not run: ``last``, and those that lead from ``source`` to it.
    in_place
        Whether the values may take the place of those of ``source``, which nobody else reads.
    """

    point: CalibrationPoint
    source: str
    factor: Tensor | None
    offset: Tensor | None
    other: str | None
    low: float
    high: float
    last: str
    skipped: tuple[str, ...]
    in_place: bool

    def moments(self, measured: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return mean and deviation at the point, from those of the source."""
        if self.factor is None or self.offset is None:
            return measured
        mean, deviation = measured
        return self.factor * mean + self.offset, self.factor.abs() * deviation

    def run(self, walk: Walk, scale: Tensor, shift: Tensor) -> None:
        """Give a walk, which has reached the source, what ``last`` puts out.

        ``scale`` and ``shift`` rescale the channels at the point, ``(num_channels,)``, float64.
        """
        if self.factor is not None and self.offset is not None:
            scale, shift = scale * self.factor, scale * self.offset + shift
        value = walk.reach(self.source)
        other = None if self.other is None else walk.reach(self.other)
        axis, bounds = self.point.axis, {"low": self.low, "high": self.high}
        plain = plain_view(value, axis)
        if plain is not None and (other is None or other.shape == value.shape):
            out = value if self.in_place else torch.empty_like(value)
            added = None if other is None else _lying_as(value, other, axis)
            (values, at), into = plain, plain_view(out, axis)
            assert into is not None
            _native.scale_channels(values, at, scale, shift, other=added, out=into[0], **bounds)
        else:
            shape = [1] * value.dim()
            shape[axis] = -1
            out = value if self.in_place else value.clone()
            out.mul_(scale.to(out).view(shape)).add_(shift.to(out).view(shape))
            if other is not None:
                out.add_(other)
            if (self.low, self.high) != (-math.inf, math.inf):
                out.clamp_(self.low, self.high)
        walk.supply(self.last, out, self.skipped, like=self.source)
        walk.release(self.source)


def _lying_as(value: Tensor, other: Tensor, axis: int) -> Tensor:
    """Return a tensor of the shape of ``value`` as :func:`plain_view` returns that one."""
    if other.stride() != value.stride() or other.dtype != value.dtype:
        other = torch.empty_like(value).copy_(other)
    view = plain_view(other, axis)
    assert view is not None
    return view[0]


def epilogues(
    target: TracedModel, state: State, points: Iterable[CalibrationPoint]
) -> dict[str, Epilogue]:
    """Return each calibration point's node, in order, with what is done there."""
    nodes = {node.name: node for node in target.module.graph.nodes}
    return {point.node: _epilogue(target, state, point, nodes) for point in points}


def _epilogue(
    target: TracedModel, state: State, point: CalibrationPoint, nodes: Mapping[str, fx.Node]
) -> Epilogue:
    node = nodes[point.node]
    source, factor, offset = node, None, None
    if op_name(node) == "batch_norm":
        norm = _as_map(target, state, node)
        if norm is not None:
            source, factor, offset = norm
    last, other, skipped = node, None, [node.name] if source is not node else []
    reader = _only_reader(last)
    if reader is not None and reader.name == point.join and _takes(reader, last):
        last, other = reader, point.shortcut
        skipped.append(last.name)
        reader = _only_reader(last)
    low, high = -math.inf, math.inf
    if reader is not None and (bounds := _bounds(reader)) is not None:
        last, (low, high) = reader, bounds
        skipped.append(last.name)
    # A layer's outputs are its own memory; what else a norm reads may be a view of other values.
    is_own = source is node or (source.name == point.affine and len(source.users) == 1)
    return Epilogue(
        point,
        source.name,
        factor,
        offset,
        other,
        low,
        high,
        last.name,
        tuple(skipped),
        is_own,
    )


def _as_map(
    target: TracedModel, state: State, node: fx.Node
) -> tuple[fx.Node, Tensor, Tensor] | None:
    r"""Return what a BatchNorm reads, and :math:`a, b` with :math:`y = a x + b`, in float64.

    None where it takes the statistics of its inputs, or reads what is computed of parameters.
    """
    bound = bound_operands(node)
    roles = ("running_mean", "running_var", "weight", "bias")
    given = {role: bound[role] for role in roles if bound.get(role) is not None}
    if bound.get("training", True) or not target.entries.keys() >= set(given.values()):
        return None
    values = {role: state[target.entries[one]].double() for role, one in given.items()}
    if not values.keys() >= {"running_mean", "running_var"}:
        return None
    factor = (values["running_var"] + float(bound["eps"])).rsqrt() * values.get("weight", 1.0)
    offset = values.get("bias", 0.0) - values["running_mean"] * factor
    return bound["input"], factor, offset


def _only_reader(node: fx.Node) -> fx.Node | None:
    """Return the operation that reads a value, where there is just one reader."""
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    return reader if reader.op == "call_function" else None


def _takes(reader: fx.Node, value: fx.Node) -> bool:
    """Say whether an addition writes no value but the one given, and adds another one to it."""
    is_written = isinstance(reader.target, torch._ops.OpOverload) and (
        reader.target._schema.is_mutable
    )
    return len(reader.all_input_nodes) == 2 and (not is_written or reader.args[0] is value)


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """Return the bounds to which an activation clamps; None for one that does something else."""
    name = op_name(node)
    if name == "hardtanh":
        bound = bound_operands(node)
        return float(bound["min_val"]), float(bound["max_val"])
    return _BOUNDS.get(name)
