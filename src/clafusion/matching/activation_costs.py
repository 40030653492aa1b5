"""Two Profiles -> for each channel group the cost of matching every two channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence, HookPair
from clafusion.errors import InputError, StructureError
from clafusion.profiling.profile import ModelProfile, check_same_inputs, standardised

__all__ = ["MAX_CHANNELS", "ActivationCost", "activation_costs", "classifier_costs", "pair_costs"]

ActivationCost = Literal["correlation", "euclidean"]

MAX_CHANNELS = 10_000
"""Largest group that is matched: cost and plan of 10,000 channels take 1.6 GB."""


def activation_costs(
    lifting: Correspondence,
    deep: ModelProfile,
    shallow: ModelProfile,
    *,
    metric: ActivationCost = "correlation",
) -> list[Tensor | None]:
    r"""Return for each channel group of the deep network the costs ``(num_source, num_target)``.

    Rows are the shallow network's channels (the source, which moves), columns the deep network's
    (the target, which fixes the frame). Over the rows of all hook points at which both show the
    group, with ``x`` and ``y`` two channels' values,

    .. math:: M = 1 - \operatorname{corr}(x, y) \quad\text{or}\quad
              M = \sqrt{\operatorname{mean}((x - y)^2)}

    for ``"correlation"`` (the mean over the hook points) and ``"euclidean"`` (OTFusion, arXiv
    1910.05653, section 4.2, activation-based).  None where the shallow network has no such
    channels. Classes that no layer reads get the cost 0 everywhere.

    Raises
    ------
    InputError
        The profiles are not of the same inputs, the metric is unknown, or a group has more
        than ``MAX_CHANNELS`` channels; the message tells the memory it would take.
    """
    groups = zip(lifting.deep.groups, lifting.groups, lifting.points, strict=True)
    matched = [(one.index, other, pairs) for one, other, pairs in groups if other >= 0]
    found = iter(pair_costs(lifting, deep, shallow, matched, metric=metric))
    return [None if other < 0 else next(found) for other in lifting.groups]


def pair_costs(
    lifting: Correspondence,
    deep: ModelProfile,
    shallow: ModelProfile,
    pairs: Sequence[tuple[int, int, Sequence[HookPair]]],
    *,
    metric: ActivationCost = "correlation",
) -> list[Tensor]:
    """Return the costs ``(num_source, num_target)`` for any pairs of groups.

    Each pair is a group of the deep network, one of the shallow network, and the hook points that
    show both. Otherwise as :func:`activation_costs`.
    """
    if metric not in ("correlation", "euclidean"):
        raise InputError(f"channel_cost must be 'correlation' or 'euclidean'; got {metric!r}")
    check_same_inputs(deep, shallow)
    similarity = _correlations if metric == "correlation" else _squared_distances
    device = next((rows.device for rows in deep.rows.values()), None)
    costs: list[Tensor] = []
    # By points, for several groups may lie side by side in one.
    points: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[int, HookPair]]] = {}
    for of_target, of_source, shown in pairs:
        target, source = lifting.deep.groups[of_target], lifting.shallow.groups[of_source]
        if max(source.size, target.size) > MAX_CHANNELS:
            raise InputError(
                f"the channels of {target.name!r} number {source.size} and {target.size}: their "
                f"cost and plan would take {16 * source.size * target.size / 1e9:.1f} GB. Layers "
                f"of up to {MAX_CHANNELS} channels are supported"
            )
        for pair in shown:
            key = _flowing(lifting, shallow, pair), pair.deep
            points.setdefault(key, []).append((len(costs), pair))
        costs.append(torch.zeros(source.size, target.size, dtype=torch.float64, device=device))
    counts = [0] * len(costs)
    for (source_point, target_point), members in points.items():
        x, y = shallow.rows[source_point], deep.rows[target_point]
        if len(x) != len(y):
            continue
        found = similarity(x, y)
        for index, pair in members:
            block = found[pair.shallow_columns][:, pair.deep_columns]
            costs[index] += block.to(costs[index])
            counts[index] += 1 if metric == "correlation" else len(x)
    return [
        _cost(total / count, metric) if count else total
        for total, count in zip(costs, counts, strict=True)
    ]


def classifier_costs(
    deep: ModelProfile, shallow: ModelProfile, *, metric: ActivationCost = "correlation"
) -> Tensor:
    """Return the costs ``(num_classes, num_classes)`` of matching two classifiers' outputs.

    Raises
    ------
    StructureError
        A profile holds no outputs of a classifier: the model does not end with a layer whose
        outputs are its own, or was not profiled with ``layer_values="preactivation"``.
    """
    views = []
    for profile in (shallow, deep):
        last = profile.traced.layers[-1]
        rows = profile.rows.get((last.index, len(last.hook_points)))
        if rows is None:
            raise StructureError(
                "match_classifier needs models that end with their classifier, and "
                f"layer_values='preactivation'; {last.name!r} is the last layer here"
            )
        views.append(rows)
    similarity = _correlations if metric == "correlation" else _squared_distances
    found = similarity(views[0], views[1]).double()
    return _cost(found if metric == "correlation" else found / len(views[0]), metric)


def _flowing(lifting: Correspondence, shallow: ModelProfile, pair: HookPair) -> tuple[int, int]:
    """Return the key of what the shallow network shows at a point.

    What leaves an inserted identity layer has passed a nonlinearity already. The profile has
    that value only if it was asked for; before the nonlinearity no channel is dead.
    """
    layer, index = pair.shallow
    after = layer, ~index
    inserted = lifting.partner[pair.deep[0]] < 0
    return after if inserted and after in shallow.rows else pair.shallow


def _correlations(x: Tensor, y: Tensor) -> Tensor:
    return standardised(x).T @ standardised(y) / len(x)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of ``(x - y)^2`` over the rows for every two channels."""
    x, y = x.double(), y.double()
    squares = x.square().sum(0)[:, None] + y.square().sum(0)[None] - 2 * (x.T @ y)
    return squares.clamp(min=0)


def _cost(mean: Tensor, metric: ActivationCost) -> Tensor:
    return 1.0 - mean if metric == "correlation" else mean.sqrt()
