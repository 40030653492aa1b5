"""Two Signatures -> for each channel class the cost of matching every two channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clafusion.depth import Lifting, PointPair
from clafusion.errors import InputError, StructureError
from clafusion.signatures import Signature, check_same_inputs, standardised

__all__ = ["MAX_CHANNELS", "ActivationCost", "classifier_costs", "neuron_costs"]

ActivationCost = Literal["correlation", "euclidean"]

MAX_CHANNELS = 10_000
"""Largest class that is matched: cost and plan of 10,000 channels take 1.6 GB."""


def neuron_costs(
    lifting: Lifting, deep: Signature, shallow: Signature, *, metric: ActivationCost = "correlation"
) -> list[Tensor | None]:
    r"""Return for each channel class of the deep network the costs ``(num_source, num_target)``.

    Rows are the shallow network's channels (the source, which moves), columns the deep network's
    (the target, which fixes the frame). Over the rows of all read points at which both show the
    class, with ``x`` and ``y`` two channels' values,

    .. math:: M = 1 - \operatorname{corr}(x, y) \quad\text{or}\quad
              M = \sqrt{\operatorname{mean}((x - y)^2)}

    for ``"correlation"`` (the mean over the read points) and ``"euclidean"`` (OTFusion, arXiv
    1910.05653, section 4.2, activation-based).  None where the shallow network has no such
    channels. Classes that no layer reads get the cost 0 everywhere.

    Raises
    ------
    InputError
        The signatures are not of the same inputs, the metric is unknown, or a class has more
        than ``MAX_CHANNELS`` channels; the message tells the memory it would take.
    """
    if metric not in ("correlation", "euclidean"):
        raise InputError(f"neuron_cost must be 'correlation' or 'euclidean'; got {metric!r}")
    check_same_inputs(deep, shallow)
    similarity = _correlations if metric == "correlation" else _squared_distances
    device = next((rows.device for rows in deep.rows.values()), None)
    costs: list[Tensor | None] = []
    # By points, for several classes may lie side by side in one.
    points: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[int, PointPair]]] = {}
    for one, other, pairs in zip(
        lifting.deep.classes, lifting.classes, lifting.points, strict=True
    ):
        if other < 0:
            costs.append(None)
            continue
        source = lifting.shallow.classes[other]
        largest = max(source.size, one.size)
        if largest > MAX_CHANNELS:
            raise InputError(
                f"the channels of {one.name!r} number {source.size} and {one.size}: their cost "
                f"and plan would take {16 * source.size * one.size / 1e9:.1f} GB. Layers of up to "
                f"{MAX_CHANNELS} channels are supported"
            )
        costs.append(torch.zeros(source.size, one.size, dtype=torch.float64, device=device))
        for pair in pairs:
            key = _flowing(lifting, shallow, pair), pair.deep
            points.setdefault(key, []).append((one.index, pair))
    counts = [0] * len(costs)
    for (source_point, target_point), members in points.items():
        x, y = shallow.rows[source_point], deep.rows[target_point]
        if len(x) != len(y):
            continue
        found = similarity(x, y)
        for index, pair in members:
            total = costs[index]
            assert total is not None
            total += found[pair.shallow_columns][:, pair.deep_columns].to(total)
            counts[index] += 1 if metric == "correlation" else len(x)
    return [
        total if not count or total is None else _cost(total / count, metric)
        for total, count in zip(costs, counts, strict=True)
    ]


def classifier_costs(
    deep: Signature, shallow: Signature, *, metric: ActivationCost = "correlation"
) -> Tensor:
    """Return the costs ``(num_classes, num_classes)`` of matching two classifiers' outputs.

    Raises
    ------
    StructureError
        A signature holds no outputs of a classifier: the model does not end with a layer whose
        outputs are its own, or was not profiled with ``layer_values="preactivation"``.
    """
    views = []
    for signature in (shallow, deep):
        last = signature.graph.units[-1]
        rows = signature.rows.get((last.index, len(last.read_points)))
        if rows is None:
            raise StructureError(
                "match_classifier needs models that end with their classifier, and "
                f"layer_values='preactivation'; {last.name!r} is the last layer here"
            )
        views.append(rows)
    similarity = _correlations if metric == "correlation" else _squared_distances
    found = similarity(views[0], views[1]).double()
    return _cost(found if metric == "correlation" else found / len(views[0]), metric)


def _flowing(lifting: Lifting, shallow: Signature, pair: PointPair) -> tuple[int, int]:
    """Return the key of what the shallow network shows at a point.

    What leaves an inserted identity layer has passed a nonlinearity already. The signature has
    that value only if it was asked for; before the nonlinearity no channel is dead.
    """
    unit, index = pair.shallow
    after = unit, ~index
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
