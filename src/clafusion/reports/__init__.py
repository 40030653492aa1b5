"""Tables, pictures and pages of results. No stage imports this package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clafusion.alignment.models import AlignedModels
from clafusion.assessment.evaluation import Evaluation
from clafusion.errors import InputError
from clafusion.one_origin.result import MergeResult
from clafusion.reassembly.result import ReassemblyResult
from clafusion.reports.alignment_tables import alignment_summary
from clafusion.reports.explanation import explain
from clafusion.reports.quality_tables import (
    evaluation_summary,
    merge_summary,
    reassembly_summary,
)
from clafusion.reports.tables import (
    fusion_summary,
    model_summary,
    pairs_summary,
)
from clafusion.results import FusionResult
from clafusion.shared_trunk.result import SharedTrunkResult
from clafusion.tracing.model import TracedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clafusion.batch.results import PairResult
    from clafusion.batch.sweep import SweepResult

__all__ = ["explain", "plot", "summary"]


def summary(
    thing: FusionResult
    | AlignedModels
    | TracedModel
    | Evaluation
    | MergeResult
    | ReassemblyResult
    | Sequence[PairResult],
) -> str:
    """Return a table of a result as text.

    Parameters
    ----------
    thing
        A fusion, a merge, a reassembly, aligned models, a traced model, an evaluation, or a list of
        the results of many pairs.

    Raises
    ------
    InputError
        There is no table of such a thing.
    """
    if isinstance(thing, FusionResult):
        return fusion_summary(thing)
    if isinstance(thing, MergeResult):
        return merge_summary(thing)
    if isinstance(thing, ReassemblyResult):
        return reassembly_summary(thing)
    if isinstance(thing, AlignedModels):
        return alignment_summary(thing)
    if isinstance(thing, Evaluation):
        return evaluation_summary(thing)
    if isinstance(thing, TracedModel):
        return model_summary(thing)
    pairs = _pairs(thing)
    if pairs is not None:
        return pairs_summary(pairs)
    raise InputError(
        "summary takes a FusionResult, a MergeResult, a ReassemblyResult, AlignedModels, a "
        "TracedModel, an Evaluation or a list of PairResult; got "
        f"{type(thing).__name__}"
    )


def plot(
    thing: FusionResult
    | AlignedModels
    | TracedModel
    | SweepResult
    | ReassemblyResult
    | Sequence[PairResult],
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a picture of a result; return the figure, which a notebook shows.

    Parameters
    ----------
    thing
        A fusion or aligned models: the costs of all pairs of layers and the chosen alignment, one
        panel for each model that is aligned with the reference. A traced model: its layers. A
        sweep: quality over the weight, or of each combination, means and deviations. A list
        of the results of many pairs: their agreements as a heat map; of networks that put out
        values the distances, and where nothing was assessed the costs of the alignments. A
        reassembly: every model's blocks, and those of the network with its stitches.
    path
        A file to draw into, too. Its ending (``.png``, ``.svg``, ``.pdf``) chooses the format. An
        old file stays as it is until the new one is complete.

    Returns
    -------
    matplotlib.figure.Figure
        Made without pyplot, whose figures and settings stay as they are.

    Raises
    ------
    InputError
        There is no picture of such a thing, the ending is unknown, or the file cannot be written.
    """
    from clafusion.batch.sweep import SweepResult
    from clafusion.reports.alignment_plot import aligned_figure
    from clafusion.reports.plots import drawn, model_figure, pairs_figure
    from clafusion.reports.reassembly_plot import reassembly_figure
    from clafusion.reports.sweep_plot import sweep_figure

    if isinstance(thing, FusionResult):
        parts = [one.aligned for one in thing.steps] or [thing.aligned]
        counts = thing.split.counts if isinstance(thing, SharedTrunkResult) else None
        return drawn(lambda: aligned_figure(*parts, counts=counts), path)
    if isinstance(thing, AlignedModels):
        return drawn(lambda: aligned_figure(thing), path)
    if isinstance(thing, TracedModel):
        return drawn(lambda: model_figure(thing), path)
    if isinstance(thing, SweepResult):
        return drawn(lambda: sweep_figure(thing), path)
    if isinstance(thing, ReassemblyResult):
        return drawn(lambda: reassembly_figure(thing), path)
    pairs = _pairs(thing)
    if pairs:
        return drawn(lambda: pairs_figure(pairs), path)
    raise InputError(
        "plot takes a FusionResult, a ReassemblyResult, AlignedModels, a TracedModel, a "
        f"SweepResult or a list of PairResult; got {type(thing).__name__}"
    )


def _pairs(thing: object) -> Sequence[PairResult] | None:
    """Return a list of results of pairs; None for anything else."""
    from clafusion.batch.results import PairResult

    if isinstance(thing, (list, tuple)) and all(isinstance(one, PairResult) for one in thing):
        return thing
    return None
