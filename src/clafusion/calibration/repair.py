"""Restore the statistics that averaging destroys: BatchNorm reset and REPAIR.

Averaging two networks' weights shrinks the variance of every layer's output, for their errors do
not align; most of the accuracy that fusion loses is lost here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clafusion.correspondence.correspondence import Correspondence
from clafusion.errors import InputError
from clafusion.execution.call import State, call_model
from clafusion.execution.walk import Walk
from clafusion.merging.blending import channel_shares, transport_vector
from clafusion.merging.layer_weights import MergeWeights
from clafusion.profiling.batches import Data, batches
from clafusion.profiling.moments import BatchMoments, Moments, batch_moments, channel_moments, parts
from clafusion.tracing.model import CalibrationPoint

__all__ = ["repair", "reset_batchnorm"]

_LARGEST_FACTOR = 1e3  # a channel that is all but constant carries nothing to restore


def reset_batchnorm(
    model: nn.Module,
    data: Data,
    example_inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...] = (),
) -> None:
    """Re-estimate the running statistics of every BatchNorm, in place, from data.

    The mean over all batches of each batch's mean and (unbiased) variance, as PyTorch's
    ``momentum=None`` does. Models without BatchNorm stay as they are.
    """
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    norms = [one for one in norms if one.running_mean is not None]
    if not norms:
        return
    device = next((one.device for one in model.parameters()), None)
    modes = {one: one.training for one in model.modules()}
    momenta = [one.momentum for one in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for inputs in batches(data, example_inputs, keywords, device=device):
                call_model(model, inputs, keywords)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for one, mode in modes.items():
            one.training = mode


def repair(
    lifting: Correspondence,
    plans: Sequence[Tensor | None],
    fused: State,
    data: Data,
    *,
    deep_shares: MergeWeights,
    target_plans: Sequence[Tensor | None] | None = None,
    observed: tuple[Sequence[BatchMoments], Sequence[BatchMoments]] | None = None,
    device: torch.device | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Tensor]:
    r"""Rescale and shift every layer's outputs to the endpoints' statistics (REPAIR).

    With :math:`\mu, \sigma` a channel's mean and standard deviation over inputs and positions,
    and ``w`` the deep network's share of the layer, the fused network's pre-activations ``y``
    become

    .. math:: \frac{y - \mu_y}{\sigma_y}\,\bigl((1-w)\,\tilde\sigma_A + w\,\sigma_B\bigr)
              + (1-w)\,\tilde\mu_A + w\,\mu_B

    (Jordan et al., arXiv 2211.08403, section 4), where the tilde moves the shallow network's
    channels into the deep one's frame. The change is folded into the layer's weights, or into
    those of the BatchNorm that follows it, so that networks without norm layers are served as
    well. All three networks run on every batch once; within a batch, each layer sees inputs that
    are repaired already.

    With ``target_plans`` the deep network's channels move as well, and ``w`` is each channel's
    :func:`clafusion.merging.blending.channel_shares`.

    Returns
    -------
    dict
        The fused state with the repaired parameters.
    """
    deep, shallow = lifting.deep, lifting.shallow
    # What flows past an inserted layer does not always show: then its statistics stay as they are.
    by_node = {
        point.node: point
        for layer in deep.layers
        for point in layer.calibration_points
        if point.node in lifting.calibration_points or lifting.origins[point.weight] != "identity"
    }
    nodes = [one.name for one in deep.module.graph.nodes]
    calibration_points = {
        node: by_node[node] for node in nodes if node in by_node
    }  # as they are computed
    silent = {
        point.node
        for layer in deep.layers
        for point in layer.calibration_points
        if lifting.origins[point.weight] == "silent"
    }
    axes = {node: point.axis for node, point in calibration_points.items()}
    shallow_axes = {point.node: point.axis for point in lifting.calibration_points.values()}
    deep_moments = {node: Moments() for node in calibration_points}
    shallow_moments = {node: Moments() for node in shallow_axes}
    fused_moments = {node: Moments() for node in calibration_points}
    target = device or next((one.device for one in fused.values()), torch.device("cpu"))
    shares = None
    if target_plans is not None:
        shares = channel_shares(plans, target_plans, deep_shares.overall)

    def moved_deep(point: CalibrationPoint, of_deep: BatchMoments) -> tuple[Tensor, Tensor, Tensor]:
        """Return the deep network's mean, deviation and share of each channel of a calibration point."""
        mean, deviation = of_deep[point.node]
        weight = torch.full_like(mean, deep_shares.of(point.weight))
        if target_plans is None or shares is None:
            return mean, deviation, weight
        where = point.groups, point.members
        own = range(len(deep.groups))
        mean, deviation = transport_vector(
            torch.stack([mean, deviation]), target_plans, where, where, own
        )
        for one in point.groups[point.groups >= 0].unique().tolist():
            places = torch.nonzero(point.groups == one).squeeze(1)
            weight[places] = shares[one].to(weight)[point.members[places]]
        return mean, deviation, weight

    def goal(
        node: str,
        of_deep: BatchMoments,
        of_shallow: BatchMoments,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation that the fused network should have at a calibration point."""
        point = calibration_points[node]
        mean, deviation, weight = moved_deep(point, of_deep)
        if node in silent:
            return weight * mean, weight * deviation
        other = lifting.calibration_points.get(node)
        if other is None:
            return mean, deviation
        pair = torch.stack(of_shallow[other.node])
        moved = transport_vector(
            pair,
            plans,
            (point.groups, point.members),
            (other.groups, other.members),
            lifting.groups,
        )
        if lifting.origins[point.weight] == "taken":
            return moved[0], moved[1]
        share = 1.0 - weight
        return share * moved[0] + weight * mean, share * moved[1] + weight * deviation

    seen = 0
    with torch.no_grad():
        for i, inputs in enumerate(
            batches(data, deep.example_inputs, deep.keywords, device=target)
        ):
            if observed is None:
                of_deep: BatchMoments = batch_moments(deep, inputs, axes)
                of_shallow: BatchMoments = batch_moments(shallow, inputs, shallow_axes)
            elif i < min(map(len, observed)):
                of_deep, of_shallow = observed[0][i], observed[1][i]
            else:
                raise InputError(
                    f"observed has {len(observed[0])} and {len(observed[1])} batches, data more: "
                    "observe both networks on the same data"
                )
            size = inputs[0].size(0)
            for found, moments in ((of_deep, deep_moments), (of_shallow, shallow_moments)):
                for node, one in moments.items():
                    one.add(size, *found[node])
            walks = [
                Walk(deep, part, fused, set(calibration_points)) for part in parts(deep, inputs)
            ]
            before: tuple[str, Tensor, Tensor] | None = None
            for node, point in calibration_points.items():
                in_parts = Moments()
                for walk in walks:
                    if before is not None:
                        _correct(walk, *before)
                    value = walk.reach(node)
                    in_parts.add(value.numel(), *channel_moments(value, point.axis))
                measured = in_parts.result()
                fused_moments[node].add(size, *measured)
                shape = [-1 if axis == point.axis else 1 for axis in range(value.dim())]
                scale, shift = (
                    one.to(value).view(shape)
                    for one in _correction(
                        measured, goal(node, of_deep, of_shallow), point.bias is not None
                    )
                )
                before = node, scale, shift
            seen += size
            if progress is not None:
                progress("calibrate", seen)

    of_deep = {node: moments.result() for node, moments in deep_moments.items()}
    of_shallow = {node: moments.result() for node, moments in shallow_moments.items()}
    repaired = dict(fused)
    for node, point in calibration_points.items():
        scale, shift = _correction(
            fused_moments[node].result(), goal(node, of_deep, of_shallow), point.bias is not None
        )
        weight = repaired[point.weight]
        shape = [-1] + [1] * (weight.dim() - 1)
        repaired[point.weight] = (weight.double() * scale.view(shape)).to(weight)
        if point.bias is not None:
            bias = repaired[point.bias]
            repaired[point.bias] = (bias.double() * scale + shift).to(bias)
    return repaired


def _correct(walk: Walk, node: str, scale: Tensor, shift: Tensor) -> None:
    # In place: a calibration point's output is the layer's own, and new memory takes longer to get than to fill.
    walk.reach(node).mul_(scale).add_(shift)
    walk.release(node)


def _correction(
    measured: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor], can_shift: bool
) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift that bring measured statistics to the goal's."""
    (mean, deviation), (goal_mean, goal_deviation) = measured, goal
    alive = deviation * _LARGEST_FACTOR > goal_deviation
    scale = torch.where(alive, goal_deviation / torch.where(alive, deviation, 1.0), 1.0)
    shift = goal_mean - scale * mean if can_shift else torch.zeros_like(mean)
    return scale, shift
