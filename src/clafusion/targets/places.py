"""Where the layers of all parents have their place: the union of networks, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from clafusion.alignment.compatibility import allowed_pairs, skip_costs
from clafusion.alignment.dynamic_program import align_layers
from clafusion.alignment.layer_costs import layer_costs
from clafusion.alignment.models import AlignedModels, align_pair, label
from clafusion.alignment.streams import check_streams
from clafusion.config import FusionConfig
from clafusion.errors import AlignmentError, StructureError
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.layer import Layer, Stage
from clafusion.tracing.model import TracedModel

__all__ = ["Place", "layer_at", "layer_maps", "place_in_template", "places_of", "union_places"]

Place: TypeAlias = tuple[int, ...]
"""For each parent the layer that it has at one place of the target; -1 where it has none."""


def places_of(aligned: AlignedModels) -> tuple[Place, ...]:
    """Return the places of the reference's layers, and which layers of all parents they hold."""
    count = len(aligned.profiles[aligned.reference].traced.layers)
    columns: list[Sequence[int]] = []
    for pair in aligned.alignments:
        if pair is None:
            columns.append(range(count))
        elif pair.deep == aligned.reference:
            columns.append(pair.alignment.deep_to_shallow)
        else:
            of_shallow = {shallow: deep for deep, shallow in pair.alignment.pairs}
            columns.append([of_shallow.get(k, -1) for k in range(count)])
    return tuple(zip(*columns, strict=True))


def layer_maps(places: Sequence[Place]) -> tuple[tuple[int, ...], ...]:
    """Return for each parent its layer at every place."""
    return tuple(zip(*places, strict=True))


def layer_at(models: Sequence[TracedModel], place: Place) -> Layer:
    """Return the first parent's layer at a place; those of all others have the same structure."""
    return next(one.layers[k] for one, k in zip(models, place, strict=True) if k >= 0)


# --- the union ----------------------------------------------------------------------------------


def union_places(aligned: AlignedModels, config: FusionConfig) -> tuple[Place, ...]:
    """Return the layers of all parents in one order, matched ones at one place.

    Parent after parent joins the reference. Between two matched pairs the unmatched layers of both
    sides keep their order, and those of one stage stand together.

    Raises
    ------
    StructureError
        A parent's layers cannot be brought into one order with those before it.
    """
    models = [one.traced for one in aligned.profiles]
    count = len(models)
    reference = aligned.reference
    places: list[Place] = [
        tuple(i if p == reference else -1 for p in range(count))
        for i in range(len(models[reference].layers))
    ]
    for i, pair in enumerate(aligned.alignments):
        if pair is None:
            continue
        own = models[i].layers
        if pair.deep == reference and len(places) == len(models[reference].layers):
            matched: Sequence[tuple[int, int]] = pair.alignment.pairs
        else:
            so_far = [layer_at(models, place) for place in places]
            costs = _costs(aligned.profiles, places, i, config.alignment.cost)
            names = "the layers so far", label(aligned.names[i])
            matched = align_pair(names, so_far, own, costs, config).pairs
        places = _joined(places, range(len(own)), matched, i, models)
    return tuple(places)


def _costs(
    profiles: Sequence[ModelProfile], places: Sequence[Place], other: int, metric: str
) -> NDArray[np.float64]:
    """Return the costs of places and a parent's layers: those of the first layer at each place."""
    known: dict[int, NDArray[np.float64]] = {}
    rows = []
    for place in places:
        first, k = next((i, k) for i, k in enumerate(place) if k >= 0)
        if first not in known:
            known[first] = layer_costs(profiles[first], profiles[other], metric=metric)
        rows.append(known[first][k])
    return np.stack(rows)


def _joined(
    places: Sequence[Place],
    own: Sequence[int],
    matched: Sequence[tuple[int, int]],
    position: int,
    models: Sequence[TracedModel],
) -> list[Place]:
    """Return the places with a parent's layers put in, matched ones at the places they match."""

    def with_layer(place: Place, k: int) -> Place:
        return (*place[:position], k, *place[position + 1 :])

    def shape(place: Place) -> Stage:
        return layer_at(models, place).stage

    nobody = (-1,) * len(models)
    joined: list[Place] = []
    start = (0, 0)
    for pair in (*matched, (len(places), len(own))):
        left = [places[i] for i in range(start[0], pair[0])]
        right = [with_layer(nobody, k) for k in range(start[1], pair[1])]
        joined += _interleaved(left, right, shape(joined[-1]) if joined else None, shape)
        if pair[0] < len(places):
            joined.append(with_layer(places[pair[0]], pair[1]))
        start = (pair[0] + 1, pair[1] + 1)
    return joined


def _interleaved(
    left: list[Place],
    right: list[Place],
    here: Stage | None,
    shape: Callable[[Place], Stage],
) -> list[Place]:
    """Return two queues of places in one order, those of one stage together."""
    ordered: list[Place] = []
    while left or right:
        goes = _left_goes_first([shape(p) for p in left], [shape(p) for p in right], here)
        ordered.append((left if goes else right).pop(0))
        here = shape(ordered[-1])
    return ordered


def _left_goes_first(
    left: Sequence[Stage],
    right: Sequence[Stage],
    here: Stage | None,
) -> bool:
    """Say which of two queues of stages is to go on, so that no stage is left too early.

    Of other stages that goes first which has more positions, or rows that are not of whole graphs.
    """
    if not left or not right:
        return bool(left)
    if left[0][0] != right[0][0]:  # stream after stream
        return left[0][0] < right[0][0]
    if here in (left[0], right[0]):
        return left[0] == here
    if left[0] == right[0] or left[0] in right or right[0] in left:
        return left[0] not in right[1:]
    return _breadth(left[0]) >= _breadth(right[0])  # most networks get narrower as they go on


def _breadth(stage: Stage) -> tuple[bool, int]:
    _, rows, positions = stage
    return rows != "graphs", math.prod(positions)


# --- a template ---------------------------------------------------------------------------------


def place_in_template(
    template: TracedModel,
    profiles: Sequence[ModelProfile],
    places: Sequence[Place],
    name: str = "target.template",
) -> tuple[Place, ...]:
    """Return for every layer of a template the place of the parents that it holds.

    As few places as possible are left out, those of several parents least of all; only residual
    blocks may be. Of those go that change least what they are given, by one minus the linear CKA
    of what goes in and what comes out. Errors call the template ``name``.

    Raises
    ------
    StructureError
        A layer has no place in the template, or one of the template's can be nobody's and cannot
        be left unused.
    """
    models = [one.traced for one in profiles]
    layers = [layer_at(models, place) for place in places]
    check_streams((name, "the networks"), template.layers, layers)
    cost = np.where(allowed_pairs(template.layers, layers), 0.0, np.inf)
    changes = [_changes(one) for one in profiles]
    leaving_out = np.full(len(places), np.inf)
    for i, (layer, place) in enumerate(zip(layers, places, strict=True)):
        if layer.insertable == "zero":
            change = max(one[k] for one, k in zip(changes, place, strict=True) if k >= 0)
            holders = sum(k >= 0 for k in place)
            # How many go counts for more than which do.
            leaving_out[i] = float(len(places) + 1) ** holders + change
    try:
        found = align_layers(cost, skip=skip_costs(template.layers), skip_shallow=leaving_out)
    except AlignmentError as error:
        stuck = template.layers[error.reached_deep : error.reached_deep + 1]
        left = layers[error.reached_shallow : error.reached_shallow + 1]
        reasons = [f"layer {one.name!r} of the networks finds no place in it" for one in left]
        reasons += [
            f"nothing can stand in for its layer {one.name!r}: {one.obstacle}"
            for one in stuck
            if not one.insertable
        ]
        count = len(template.layers)
        plural = "" if count == 1 else "s"
        raise StructureError(
            f"{name} has {count} layer{plural}, and {'; '.join(reasons) or error}. It "
            "must have the layers of all networks, stage by stage; only residual blocks may be "
            "left out"
        ) from error
    nobody = (-1,) * len(profiles)
    return tuple(places[i] if i >= 0 else nobody for i in found.deep_to_shallow)


def _changes(profile: ModelProfile) -> list[float]:
    """Return for every layer one minus the linear CKA of what goes in and what comes out.

    For the first of a stream it is 1.
    """
    costs = layer_costs(profile, profile)
    layers = profile.traced.layers
    within = [one.stream == other.stream for one, other in pairwise(layers)]
    found = np.where(within, np.clip(np.diagonal(costs, -1), 0.0, 1.0), 1.0)
    return [1.0, *(float(one) for one in found)]
