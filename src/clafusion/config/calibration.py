"""The family of calibrations: how what averaging destroys is restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clafusion.settings import Choices, Settings, choice, count, number

__all__ = [
    "LEANS",
    "AutoCalibration",
    "BatchNorm",
    "Calibration",
    "LeastSquares",
    "NoCalibration",
    "Repair",
]

LEANS = Choices(
    auto="as 'largest'; with anchor 'auto' also one parent alone, where that comes clearly nearer",
    largest="the parent with the largest weight, of equals the one that gives the structure",
    any="whichever parent brings the outputs nearest; with anchor 'auto' 1 is tried, too",
)


@dataclass(frozen=True)
class Calibration(Settings, family=True):
    """How what averaging destroys is restored.

    If you are not sure, take "auto". "repair" is faster and less accurate than "least_squares".
    ``needs_moments`` says whether it needs the parents' statistics, as
    :func:`clafusion.calibration.repair.moment_goals` does.
    """

    needs_moments: ClassVar[bool] = False


@dataclass(frozen=True)
class AutoCalibration(Calibration, name="auto"):
    """Least squares; where channels are zipped, which that does not go with, REPAIR."""


@dataclass(frozen=True)
class NoCalibration(Calibration, name="none"):
    """Leave the mean as it is."""


@dataclass(frozen=True)
class BatchNorm(Calibration, name="batchnorm"):
    """Estimate the running statistics of every BatchNorm again."""


@dataclass(frozen=True)
class Repair(Calibration, name="repair"):
    """Give every layer's outputs the parents' mean statistics (REPAIR, arXiv 2211.08403)."""

    needs_moments: ClassVar[bool] = True


@dataclass(frozen=True)
class LeastSquares(Calibration, name="least_squares"):
    """Regress every layer onto what the parents put out; slower and more accurate."""

    anchor: float | str = number(
        "auto",
        "how far the interior leans from the weights towards one parent",
        high=1.0,
        word="auto",
    )
    toward: str = choice("auto", LEANS, "towards which parent the interior leans")
    ridge: float = number(
        1e-3, "penalty on changes, relative to the mean square of a layer's inputs", above_low=True
    )
    samples: int = count(
        2000, "how many inputs are used; fewer where their activations would take more than 4 GB"
    )
