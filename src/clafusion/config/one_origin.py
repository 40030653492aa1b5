"""The options of a merge of models of one origin, and the family of its methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clafusion.config.assessment import Assessment
from clafusion.config.calibration import Calibration, LeastSquares, NoCalibration
from clafusion.config.fusion import FusionConfig
from clafusion.config.profiling import Profiling
from clafusion.errors import InputError
from clafusion.settings import Settings, count, flag, nested, number

__all__ = ["Average", "Dare", "MergeConfig", "MergeMethod", "Sensitivity", "TaskArithmetic", "Ties"]


@dataclass(frozen=True)
class MergeMethod(Settings, family=True):
    """How models that were trained from one base become one. If you are not sure, take "ties".

    A *task vector* is what training has added to the base's weights.
    """


def _scaling(default: float) -> Any:
    return number(default, "by how much the merged task vector is multiplied")


@dataclass(frozen=True)
class Average(MergeMethod, name="average"):
    """The weighted mean of the models; the base does not enter (model soups, arXiv 2203.05482)."""


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod, name="task_arithmetic"):
    """Add the sum of all task vectors to the base (task arithmetic, arXiv 2212.04089)."""

    scaling: float = _scaling(0.4)


@dataclass(frozen=True)
class Ties(MergeMethod, name="ties"):
    """Trim task vectors, elect a sign for each entry, take the mean of those that have it.

    TIES, arXiv 2306.01708.
    """

    scaling: float = _scaling(1.0)
    density: float = number(
        0.2, "share of each task vector's entries that is kept", high=1.0, above_low=True
    )


@dataclass(frozen=True)
class Dare(MergeMethod, name="dare"):
    """Drop random entries of the task vectors and rescale the others (DARE, arXiv 2311.03099)."""

    scaling: float = _scaling(0.4)
    density: float = number(
        0.5, "share of each task vector's entries that is kept", high=1.0, above_low=True
    )
    elect: bool = flag(False, "then elect signs and take the mean, as TIES does, not the sum")


@dataclass(frozen=True)
class Sensitivity(MergeMethod, name="sensitivity"):
    """Add task vectors, each layer's by which model's outputs are the most sensitive to it.

    In the spirit of Sens-Merging, arXiv 2502.12420: see :mod:`clafusion.merging.sensitivity`. It
    needs inputs of each model's own task.
    """

    scaling: float = _scaling(0.4)
    temperature: float = number(
        0.1,
        "temperature of the softmax over the models: the lower, the more one of them counts",
        above_low=True,
    )
    samples: int = count(500, "how many inputs of each task sensitivities are taken on at the most")


@dataclass(frozen=True)
class MergeConfig(Settings):
    """How to merge models of one origin: every option of :func:`clafusion.merge`.

    Raises
    ------
    InputError
        An option is out of its range; the message names it.
    """

    method: MergeMethod = nested(MergeMethod, Ties(), "how the models become one")
    calibration: Calibration = nested(
        Calibration, NoCalibration(), "how what is lost is restored, where there are data"
    )
    assessment: Assessment = nested(Assessment, Assessment(), "how the result is assessed")
    furthest: float = number(
        0.9, "how far a model's weights may be from the base's, relative to their norm"
    )
    verify: bool = flag(True, "prove the analysis of each parent by permuting a copy")
    seed: int = count(0, "seed of every random choice", least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        calibration = self.calibration
        if isinstance(calibration, LeastSquares) and calibration.anchor not in ("auto", 0.0):
            raise InputError(
                f"calibration.anchor={calibration.anchor} is for fusions: a merge leans towards no "
                "model. Leave it out"
            )
        if isinstance(calibration, LeastSquares) and calibration.toward == "any":
            raise InputError(
                f"calibration.toward={calibration.toward!r} is for fusions: a merge leans towards "
                "no model. Leave it out"
            )

    @property
    def fusion(self) -> FusionConfig:
        """The options of the stages that a merge shares with a fusion."""
        return FusionConfig(
            profiling=Profiling(alignment_samples=2, matching_rows=2),  # nothing is matched
            calibration=self.calibration,
            assessment=self.assessment,
            verify=self.verify,
            seed=self.seed,
        )
