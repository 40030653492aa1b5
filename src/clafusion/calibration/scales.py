r"""Bring the parents' channels to one scale, where a norm after the activation cancels any scale.

Of a convolution, a ReLU and then a BatchNorm the norm undoes the convolution's scale: with
:math:`s > 0`

.. math:: \operatorname{norm}_{s\mu, s\sigma}(\max(s y, 0)) = \operatorname{norm}_{\mu, \sigma}
          (\max(y, 0)).

So the scale is arbitrary, and a network that is eight times as wide often has a larger one. In a
mean of weights, and of statistics before the ReLU, the larger would count for more than its merge
weight says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from clafusion.merging.problem import FusionProblem, Parent
from clafusion.profiling.moments import BatchMoments
from clafusion.tracing.layer import CalibrationPoint
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import SAME_VALUES, bound_operands, op_name
from clafusion.weights.build import with_weights

__all__ = ["with_equal_scales"]

# What a positive factor passes through, besides operations that keep every value.
_HOMOGENEOUS = frozenset("relu leaky_relu prelu".split())


@dataclass(frozen=True)
class _NormBehind:
    """A BatchNorm behind an activation.

    Attributes
    ----------
    point
        The output of the linear or convolution layer before the activation.
    between
        Names of the nodes from there to the norm.
    mean, variance
        The norm's running statistics.
    eps
        What it adds to variances.
    """

    point: CalibrationPoint
    between: tuple[str, ...]
    mean: str
    variance: str
    eps: float

    def scales(self, model: TracedModel) -> Tensor:
        """Return by how much the norm divides each channel."""
        return (model.state()[self.variance].double() + self.eps).sqrt()


def with_equal_scales(problem: FusionProblem) -> FusionProblem:
    """Return the problem with copies of parents whose channels have the target's scales.

    The copies compute what the parents do. A parent that has these scales stays as it is, and so do
    all whose parameters are merged already.
    """
    if problem.merged is not None:
        return problem
    norms = _norms_behind(problem.target)
    if not norms:
        return problem
    parents = tuple(
        one if one.is_identity else _rescaled(one, problem.target, norms) for one in problem.parents
    )
    return replace(problem, parents=parents)


def _norms_behind(model: TracedModel) -> list[_NormBehind]:
    nodes = {node.name: node for node in model.module.graph.nodes}
    found = []
    for layer in model.layers:
        for point in layer.calibration_points:
            one = None if point.affine != point.node else _norm_behind(model, nodes, point)
            if one is not None:
                found.append(one)
    return found


def _norm_behind(
    model: TracedModel, nodes: Mapping[str, fx.Node], point: CalibrationPoint
) -> _NormBehind | None:
    """Return the norm behind a layer's activation; None where there is no such one."""
    node, between, is_active = nodes[point.node], [point.node], False
    while len(node.users) == 1:
        (node,) = node.users
        name = op_name(node)
        if name == "batch_norm":
            names = model.operand_names(node)
            used = {point.weight, point.bias, names.get("running_mean"), names.get("running_var")}
            if not is_active or {"running_mean", "running_var"} - names.keys():
                return None
            if used & model.shared_parameters:
                return None
            variance = names["running_var"]
            owners = {one.index for one, _ in model.axes_by_parameter.get(variance, ())}
            if set(point.groups.tolist()) != owners:
                return None  # it normalises another axis, such as the tokens
            eps = float(bound_operands(node)["eps"])
            return _NormBehind(point, tuple(between), names["running_mean"], variance, eps)
        if not (name in _HOMOGENEOUS or name in SAME_VALUES or "_pool" in name):
            return None
        is_active |= name in _HOMOGENEOUS
        between.append(node.name)
    return None


def _rescaled(parent: Parent, target: TracedModel, norms: list[_NormBehind]) -> Parent:
    correspondence, source = parent.correspondence, parent.traced
    own = {one.point.node: one for one in _norms_behind(source)}
    state = dict(source.state())
    factors: dict[str, Tensor] = {}
    for norm in norms:
        other = correspondence.points.get(norm.point.node)
        partner = None if other is None else own.get(other.node)
        if partner is None or correspondence.names.get(norm.variance) != partner.variance:
            continue
        wanted = _wanted(parent, norm, partner, norm.scales(target))
        if wanted is None:
            continue
        factor = wanted / partner.scales(source)
        if bool((factor == 1).all()):
            continue
        factors |= dict.fromkeys(partner.between, factor)
        _rescale(state, partner, factor)
    if not factors:
        return parent
    copied = with_weights(source, state)
    moments = parent.profile.moments
    if moments is not None:
        moments = tuple(_of_rescaled(one, factors) for one in moments)
    return replace(
        parent,
        correspondence=replace(correspondence, source=copied),
        profile=replace(parent.profile, traced=copied, moments=moments),
    )


def _wanted(
    parent: Parent, norm: _NormBehind, partner: _NormBehind, scales: Tensor
) -> Tensor | None:
    """Return for each of the parent's channels the mean scale of the target channels it maps to.

    None where channels keep their places, or stand in several.
    """
    point, other = norm.point, partner.point
    (group, *more) = point.groups.unique().tolist()
    plan = None if more or group < 0 else parent.plans[group]
    if plan is None or plan.shape != (len(other.members), len(point.members)):
        return None
    by_member = torch.empty_like(scales)
    by_member[point.members] = scales
    goes = plan.row_sums.to(scales) > 0
    # A channel that goes nowhere keeps its scale.
    mapped = plan.transposed().outgoing(by_member)
    found = torch.where(goes, mapped, partner.scales(parent.traced))
    return found[other.members]


def _rescale(state: dict[str, Tensor], norm: _NormBehind, factor: Tensor) -> None:
    """Multiply what a layer puts out by a factor for each channel; the norm undoes it."""
    point = norm.point
    variance = state[norm.variance]
    state[point.weight] = point.scaled(state[point.weight], factor)
    for name in (point.bias, norm.mean):
        if name is not None:
            state[name] = (state[name].double() * factor).to(state[name])
    spread = (variance.double() + norm.eps) * factor.square() - norm.eps
    state[norm.variance] = spread.clamp(min=0).to(variance)


def _of_rescaled(moments: BatchMoments, factors: Mapping[str, Tensor]) -> BatchMoments:
    found = dict(moments)
    for node in factors.keys() & moments.keys():
        mean, deviation = moments[node]
        factor = factors[node].to(mean)
        found[node] = mean * factor, deviation * factor
    return found
