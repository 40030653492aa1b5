"""Which layers of two networks can match at all, before any cost is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clafusion.alignment.differences import differences, nearest
from clafusion.alignment.dynamic_program import align_layers
from clafusion.alignment.streams import check_streams
from clafusion.errors import AlignmentError, StructureError
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import TracedModel

__all__ = ["Fit", "allowed_pairs", "check_outputs", "fit_layers", "gap_costs", "skip_costs"]


@dataclass(frozen=True)
class Fit:
    """How the layers of two networks can match.

    ``allowed`` ``(m, n)`` are the pairs that can match; ``needs_gaps`` tells whether layers of both
    networks must go unmatched; ``layer_map`` is one way to match them: for each layer of the deep
    network the shallow one's, or -1.
    """

    allowed: NDArray[np.bool_]
    needs_gaps: bool
    layer_map: tuple[int, ...]


def allowed_pairs(deep: Sequence[Layer], shallow: Sequence[Layer]) -> NDArray[np.bool_]:
    """Return ``(m, n)``: which layers can match: of one structure and stage, and on one stream."""
    return np.array(
        [
            [
                one.stage == other.stage
                and one.structure == other.structure
                and one.beside == other.beside
                for other in shallow
            ]
            for one in deep
        ],
        dtype=bool,
    ).reshape(len(deep), len(shallow))


def skip_costs(deep: Sequence[Layer], *, is_left_out: bool = False) -> NDArray[np.float64]:
    """Return ``(m,)``: 0 where a layer that changes nothing can stand in, else ``inf``.

    Where what has no partner ``is_left_out``, 0 also for layers that mix the nodes of a graph.
    """
    return np.array(
        [
            0.0 if layer.insertable or (is_left_out and layer.mixes_nodes) else np.inf
            for layer in deep
        ]
    )


def gap_costs(
    deep: Sequence[Layer], shallow: Sequence[Layer], costs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return ``(n,)``: what leaving a shallow layer unmatched costs, where both have gaps.

    More than all pairs together, so that as few as possible are; ``inf`` where no layer that
    changes nothing can stand in for it, and where the deep network has none of its kind in any
    stage.
    """
    kinds = {(layer.structure, layer.beside) for layer in deep}
    dear = 1.0 + 2.0 * float(np.abs(costs[np.isfinite(costs)]).sum())
    return np.array(
        [
            dear if layer.insertable and (layer.structure, layer.beside) in kinds else np.inf
            for layer in shallow
        ]
    )


def check_outputs(
    names: tuple[str, str],
    first: TracedModel,
    second: TracedModel,
    *,
    both_are_parents: bool = True,
) -> None:
    """Refuse two networks that put out different things.

    Of two parents that are classifiers the message names what fuses those of other classes.

    Raises
    ------
    StructureError
        The message shows both outputs.
    """
    if first.outputs != second.outputs:
        # The trunk of a graph network ends nowhere.
        can_share = all(one.num_classes and one.graph is None for one in (first, second))
        advice = (
            ". Where they are classifiers of other classes, clafusion.fuse with outputs='both' "
            "gives one trunk with a head for each"
        )
        raise StructureError(
            f"the models have different outputs: {names[0]} {first.outputs_text} and {names[1]} "
            f"{second.outputs_text}. Only models with the same inputs and outputs can be fused "
            f"into one output{advice if both_are_parents and can_share else ''}"
        )


def fit_layers(
    names: tuple[str, str],
    deep: Sequence[Layer],
    shallow: Sequence[Layer],
    *,
    is_left_out: bool = False,
) -> Fit:
    """Say how two networks' layers can match, before anything takes long.

    ``names`` are what errors call the deep and the shallow network, ``is_left_out`` is that of
    :func:`skip_costs`.

    Raises
    ------
    StructureError
        No alignment exists; the message names the layers that stand in the way, or draws streams
        that do not correspond.
    """
    check_streams(names, deep, shallow)
    allowed = allowed_pairs(deep, shallow)
    costs, skip = np.where(allowed, 0.0, np.inf), skip_costs(deep, is_left_out=is_left_out)
    try:
        found = align_layers(costs, skip=skip)
        return Fit(allowed, False, found.deep_to_shallow)
    except AlignmentError:
        pass
    try:
        found = align_layers(costs, skip=skip, skip_shallow=gap_costs(deep, shallow, costs))
        return Fit(allowed, True, found.deep_to_shallow)
    except AlignmentError as error:
        reasons = _reasons(names, deep, shallow, allowed, error)
        raise StructureError(
            f"{names[0]} ({len(deep)} layers) and {names[1]} ({len(shallow)} layers) cannot be "
            f"brought to one structure: {'; '.join(reasons) or error}. clafusion.explain, "
            "or 'clafusion explain', compares all of both"
        ) from error


def _reasons(
    names: tuple[str, str],
    deep: Sequence[Layer],
    shallow: Sequence[Layer],
    allowed: NDArray[np.bool_],
    error: AlignmentError,
) -> list[str]:
    """Say which layers an alignment got stuck at, and why."""
    stuck, k = error.reached_deep, error.reached_shallow
    reasons = []
    if k < len(shallow):
        layer = shallow[k]
        if not allowed[:, k].any():
            closest = nearest(layer, deep)
            what = "; ".join(differences(layer, closest)[:4])
            reasons.append(
                f"layer {layer.name!r} of {names[1]} has no counterpart of its structure in "
                f"{names[0]}: the nearest, {closest.name!r}, differs ({what})"
            )
        else:
            found = [deep[int(i)].name for i in np.flatnonzero(allowed[:, k])]
            reasons.append(
                f"layer {layer.name!r} of {names[1]} could only match "
                f"{', '.join(map(repr, found[:4]))} of {names[0]}, which comes too early or is "
                "taken"
            )
    if stuck < len(deep) and not deep[stuck].insertable:
        reasons.append(
            f"layer {deep[stuck].name!r} of {names[0]} has no partner, and cannot be inserted into "
            f"{names[1]} without changing it: {deep[stuck].obstacle}"
        )
    return reasons
