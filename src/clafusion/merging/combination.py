r"""What parents put out together, where outputs are classes.

With logits :math:`z_p` of the parents and their weights :math:`w_p` that is one of

.. math:: \bar y = \operatorname{softmax}\Bigl(\sum_p w_p z_p\Bigr)
          \qquad\text{or}\qquad
          \bar y = \sum_p w_p \operatorname{softmax}(z_p),

the product of experts and their mixture (Hinton, Neural Computation 2002). In the first each
parent can rule out a class, in the second none can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["FAR", "Combination", "Means", "are_probabilities", "log_probabilities", "together"]

FAR = 100.0
"""Nats: a probability of 0 counts as exp(-100), so that one row does not hide all others."""

Means: TypeAlias = Literal["logits", "probabilities"]
"""Of what the parents' mean is taken."""


@dataclass(frozen=True)
class Combination:
    """What the parents put out together, and why.

    Attributes
    ----------
    means
        ``"logits"`` or ``"probabilities"``: of what the mean is taken. Of outputs that are no
        classes it is the mean of the values, which counts as ``"logits"``.
    reason
        Why, in words.
    output
        Which of the outputs has the classes; None for none.
    axis
        The axis of the classes in it.
    is_asked_for
        Whether the caller chose it.
    """

    means: Means = "logits"
    reason: str = "nothing else was asked for"
    output: int | None = None
    axis: int = -1
    is_asked_for: bool = False

    @classmethod
    def asked_for(cls, means: str, output: int | None = None, axis: int = -1) -> Combination:
        """Return what the caller chose: ``"logits"`` or ``"probabilities"``."""
        known: Means = "probabilities" if means == "probabilities" else "logits"
        return cls(known, "asked for", output, axis, is_asked_for=True)

    def __str__(self) -> str:
        """Return both in words."""
        return f"the mean of their {self.means}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def are_probabilities(outputs: Tensor) -> bool:
    """Say whether the network ends in a softmax itself; the classes are the last axis."""
    sums = outputs.sum(-1)
    return bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())


def log_probabilities(outputs: Tensor, *, are_soft: bool) -> Tensor:
    """Return the logarithms of a network's probabilities, in float64; the classes are last.

    ``are_soft`` says whether the outputs are probabilities; else they are logits.
    """
    outputs = outputs.double()
    return outputs.clamp(min=0).log() if are_soft else outputs.log_softmax(-1)


def together(logs: Sequence[Tensor], weights: Sequence[float], means: Means) -> Tensor:
    """Return the probabilities of networks together, given the logarithms of each one's.

    A weight of 0 leaves out what is not finite.
    """
    mean = torch.zeros_like(logs[0])
    for log, weight in zip(logs, weights, strict=True):
        if weight > 0:
            part = log.exp() if means == "probabilities" else log.clamp(min=-FAR)
            mean = mean + weight * part
    return mean if means == "probabilities" else mean.softmax(-1)
