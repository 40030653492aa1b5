"""Tables, pictures and pages of results. No stage imports this package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clafusion.alignment.models import AlignedModels
from clafusion.errors import InputError
from clafusion.reports.explanation import explain
from clafusion.reports.tables import (
    alignment_summary,
    fusion_summary,
    model_summary,
    pairs_summary,
)
from clafusion.results import FusionResult
from clafusion.tracing.model import TracedModel

if TYPE_CHECKING:
    from clafusion.batch.results import PairResult

__all__ = ["explain", "plot", "summary"]


def summary(thing: FusionResult | AlignedModels | TracedModel | Sequence[PairResult]) -> str:
    """Return a table of a result as text.

    Parameters
    ----------
    thing
        A fusion, aligned models, a traced model, or a list of the results of many pairs.

    Raises
    ------
    InputError
        There is no table of such a thing.
    """
    if isinstance(thing, FusionResult):
        return fusion_summary(thing)
    if isinstance(thing, AlignedModels):
        return alignment_summary(thing)
    if isinstance(thing, TracedModel):
        return model_summary(thing)
    if isinstance(thing, (list, tuple)):
        from clafusion.batch.results import PairResult

        if all(isinstance(one, PairResult) for one in thing):
            return pairs_summary(thing)
    raise InputError(
        "summary takes a FusionResult, AlignedModels, a TracedModel or a list of PairResult; got "
        f"{type(thing).__name__}"
    )


def plot(thing: FusionResult | AlignedModels | TracedModel, path: str | os.PathLike[str]) -> None:
    """Draw a picture of a result into a file.

    Parameters
    ----------
    thing
        A fusion or aligned models: the costs of all pairs of layers and the chosen alignment, one
        panel for each model that is aligned with the reference. A traced model: its layers.
    path
        Its ending (``.png``, ``.svg``, ``.pdf``) chooses the format. An old file stays as it is
        until the new one is complete.

    Raises
    ------
    InputError
        There is no picture of such a thing, the ending is unknown, or the file cannot be written.
    """
    from clafusion.reports.alignment_plot import aligned_figure
    from clafusion.reports.plots import model_figure, save_figure

    if isinstance(thing, FusionResult):
        parts = [one.aligned for one in thing.steps] or [thing.aligned]
        save_figure(lambda: aligned_figure(*parts), path)
    elif isinstance(thing, AlignedModels):
        save_figure(lambda: aligned_figure(thing), path)
    elif isinstance(thing, TracedModel):
        save_figure(lambda: model_figure(thing), path)
    else:
        raise InputError(
            f"plot takes a FusionResult, AlignedModels or a TracedModel; got {type(thing).__name__}"
        )
