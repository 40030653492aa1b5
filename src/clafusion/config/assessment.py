"""The options of assessment: how the result is assessed."""

from __future__ import annotations

from dataclasses import dataclass

from clafusion.settings import Choices, Settings, choice, count, number

__all__ = ["ASSESSED_OUTPUTS", "Assessment"]

ASSESSED_OUTPUTS = Choices(
    auto="as classes where there are two or three axes and two or more entries, else as values",
    classes="by which class is the largest, and by the Kullback-Leibler divergence",
    values="by the relative squared error",
    none="not at all, and nothing is kept out of the fusion",
)


@dataclass(frozen=True)
class Assessment(Settings):
    """How the result is assessed, without labels: see :class:`clafusion.FusionAssessment`.

    The first floating output that inputs and weights enter counts. By default it is taken as
    classes where it has the shape ``(batch, classes)`` or ``(batch, positions, classes)`` with at
    least 2 classes, or where you give the axis. It is taken as values where it has more axes, as an
    image, or one number for each input. Say ``outputs="values"`` for a regression with several
    numbers.
    """

    outputs: str = choice("auto", ASSESSED_OUTPUTS, "how the first floating output is compared")
    axis: int = count(-1, "the axis of the classes; the batch has axis 0", least=-8)
    held_out: float = number(
        0.1, "the share of the inputs that is kept out of the fusion for it", high=0.9
    )
