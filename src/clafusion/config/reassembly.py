"""The options of a reassembly: how blocks of models become a network."""

from __future__ import annotations

from dataclasses import dataclass

from clafusion.config.assessment import Assessment
from clafusion.settings import Choices, Settings, choice, count, nested, number

__all__ = ["REASSEMBLY_COMBINATIONS", "ReassemblyConfig"]

REASSEMBLY_COMBINATIONS = Choices(
    auto="probabilities where the outputs are classes, else the mean of the values",
    logits="the mean of their logits; of outputs that are no classes the mean of the values",
    probabilities="the mean of their probabilities",
)


@dataclass(frozen=True)
class ReassemblyConfig(Settings):
    """How blocks of models become a network: every option of :func:`clafusion.reassemble`.

    Raises
    ------
    InputError
        An option is out of its range; the message names it.
    """

    blocks: int | None = count(
        None,
        "into how many blocks each model is cut; by default 2, 3 and 4 are tried",
        least=2,
        most=16,
    )
    candidates: int = count(
        16, "how many networks are stitched, and assessed, of each number of blocks"
    )
    samples: int = count(1000, "how many inputs stitches are fitted to at the most", least=2)
    ridge: float = number(
        1e-4,
        "penalty on a stitch's map, relative to the mean square of what it reads",
        above_low=True,
    )
    most_parameters: int | None = count(None, "how many parameters the result may have")
    most_operations: int | None = count(
        None, "how many floating-point operations the result may take for an input"
    )
    assessment: Assessment = nested(
        Assessment, Assessment(held_out=0.3), "how networks are assessed, to choose one"
    )
    combine: str = choice(
        "auto",
        REASSEMBLY_COMBINATIONS,
        "what the models put out together, which a network is to meet",
    )
    seed: int = count(0, "seed of every random choice", least=0, most=2**63 - 1)
