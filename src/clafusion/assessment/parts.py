"""Which part of the data a fusion sees, and on which output and part its result is assessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clafusion.assessment.nearness import Kind
from clafusion.config import Assessment
from clafusion.errors import InputError
from clafusion.profiling.batches import Data, Part, has_rows, keeps_order, num_graphs
from clafusion.tracing.model import TracedModel

__all__ = [
    "Parts",
    "compared_output",
    "labelled_output",
    "most_assessed",
    "num_kept",
    "parts_of",
]

_LEAST_HELD = 50  # of fewer an agreement is known to 14 %, and the fusion misses each of them
_MOST = 500  # held out inputs on which the networks are compared
_MOST_SEEN = 100  # the same where none is held out: more would only cost forward passes


@dataclass(frozen=True)
class Parts:
    """Data, parted.

    Attributes
    ----------
    kept
        What the fusion may see.
    assessed
        What the result is assessed on.
    held_out
        Whether the two have no row in common.
    """

    kept: Data
    assessed: Data
    held_out: bool


def parts_of(data: Data, models: Sequence[TracedModel], settings: Assessment) -> Parts:
    """Return which part of the data a fusion sees, and on which the result is assessed.

    All of the data is for both where nothing can be held out: where fewer than 50 inputs
    would be (so of fewer than 500 by default), of data that comes in another order each time, and
    for models that admit one batch size only. Of graphs every tenth is held out as a whole, where
    that leaves 50 of what the outputs have rows for; of a single graph nothing is, for its nodes
    see each other. The parts depend on the arguments only: with the same
    data and options every way to fuse keeps out the same rows.

    Raises
    ------
    InputError
        The options do not fit the models' outputs.
    """
    share = settings.held_out
    if compared_output(models[0], settings) is None or share == 0.0:
        return Parts(data, data, held_out=False)
    if (
        any(one.static_batch is not None for one in models)
        or not keeps_order(data)
        or not _has_enough(data, models[0], settings)
    ):
        return Parts(data, data, held_out=False)
    return Parts(Part(data, share, held=False), Part(data, share, held=True), held_out=True)


def _has_enough(data: Data, model: TracedModel, settings: Assessment) -> bool:
    """Say whether data has rows enough for some to be held out."""
    least = _least_rows(settings.held_out)
    if model.graph is None:
        return has_rows(data, least)
    graphs = num_graphs(data)
    output = compared_output(model, settings)
    rows = model.output_rows[output[0]] if output is not None else "graphs"
    enough = graphs >= least if rows == "graphs" else has_rows(data, least)
    return enough and graphs * settings.held_out >= 1


def num_kept(count: int, settings: Assessment) -> int:
    """Return how many of ``count`` inputs in a tensor a fusion sees, before models are looked at.

    It sees more of them only where the models admit one batch size or have nothing to be compared.
    """
    share = settings.held_out
    if settings.outputs == "none" or share == 0.0 or count < _least_rows(share):
        return count
    return count - math.floor(count * share)


def most_assessed(*, held_out: bool) -> int:
    """Return on how many inputs a result is assessed at the most."""
    return _MOST if held_out else _MOST_SEEN


def _least_rows(share: float) -> int:
    return math.ceil(_LEAST_HELD / share)


def compared_output(model: TracedModel, settings: Assessment) -> tuple[int, Kind] | None:
    """Return which output is compared and as what; None for none."""
    if settings.outputs == "none":
        return None
    floating = [i for i, (_, dtype) in enumerate(model.outputs) if dtype.is_floating_point]
    if not floating:
        if settings.outputs == "auto":
            return None
        raise InputError(
            f"assessment.outputs={settings.outputs!r} needs a floating output, which the models do "
            "not have: take 'auto' or 'none'"
        )
    computed = model.computed_outputs
    if len(computed) == len(model.outputs):  # what is passed through says nothing of a network
        floating = [i for i in floating if computed[i]] or floating
    shape = (-1, *model.outputs[floating[0]][0])
    axis, count = settings.axis, len(shape)
    is_axis = -count < axis < count and axis != 0 and shape[axis] >= 2
    is_wanted = settings.outputs == "classes" or (
        settings.outputs == "auto" and axis != Assessment.axis
    )
    if is_wanted and not is_axis:
        raise InputError(
            f"assessment.axis={axis} must be an axis with at least 2 classes; the outputs have the "
            f"shape ({', '.join(['batch', *map(str, shape[1:])])})"
        )
    # Images have four axes. Of them only the caller can say whether they are classes.
    looks_like = is_axis and (count in (2, 3) or axis != Assessment.axis)
    if settings.outputs == "classes" or (settings.outputs == "auto" and looks_like):
        return floating[0], "classes"
    return floating[0], "values"


def labelled_output(model: TracedModel, axis: int) -> int:
    """Return which output labels are of, whose classes lie along an axis.

    Raises
    ------
    InputError
        The model has no floating output, or no such axis.
    """
    compared = compared_output(model, Assessment(axis=axis))
    if compared is None:
        raise InputError("labels need a floating output, which the models do not have")
    return compared[0]
