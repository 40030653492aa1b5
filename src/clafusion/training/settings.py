"""What a training run depends on beside the model and the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from clafusion.errors import InputError, check_type, kind_of

__all__ = [
    "Norms",
    "Schedule",
    "Settings",
    "check_model",
    "check_number",
    "milestones_of",
    "plain_number",
]

Schedule = Literal["constant", "cosine", "step"]
Norms = Literal["auto", "frozen", "batch"]


@dataclass(frozen=True)
class Settings:
    """What a run depends on beside the model and the data.

    Attributes are the arguments of :func:`clafusion.finetune`; ``stage`` is what ``progress``
    calls the run, and ``loss`` holds the loss's own settings.

    Raises
    ------
    InputError
        A setting is of the wrong type or out of range; the message names it.
    """

    stage: str
    epochs: int | None
    steps: int | None
    learning_rate: float
    momentum: float
    weight_decay: float
    schedule: Schedule
    milestones: tuple[int, ...]
    decay: float
    batch_size: int
    patience: int | None
    mixed_precision: bool
    seed: int
    norms: Norms
    held_out: float
    loss: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InputError(
                "give either epochs or steps, how long to train; got "
                f"epochs={self.epochs!r} and steps={self.steps!r}"
            )
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain_number(value))
        object.__setattr__(self, "milestones", tuple(map(plain_number, self.milestones)))
        for name in ("epochs", "steps", "batch_size", "patience"):
            if name == "batch_size" or getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        _check_count("seed", self.seed, 0)
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("momentum", self.momentum, least=0.0, most=1.0)
        check_number("weight_decay", self.weight_decay, least=0.0)
        check_number("decay", self.decay, above=0.0)
        check_number("held_out", self.held_out, least=0.0, most=0.9)
        check_type(self.mixed_precision, bool, "mixed_precision", "True or False")
        for name, words in (("schedule", get_args(Schedule)), ("norms", get_args(Norms))):
            if getattr(self, name) not in words:
                raise InputError(
                    f"{name} must be one of {', '.join(map(repr, words))}; "
                    f"got {getattr(self, name)!r}"
                )
        for milestone in self.milestones:
            _check_count("milestones", milestone, 1)
        if (self.schedule == "step") != bool(self.milestones):
            raise InputError(
                "milestones, the epochs at which the learning rate falls, go with schedule "
                f"'step'; got schedule {self.schedule!r} and milestones {self.milestones!r}"
            )

    def factor(self, step: int, epoch: int, total: int) -> float:
        """Return the factor of the learning rates in a step (from 0) of ``total`` steps."""
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * step / total))
        if self.schedule == "step":
            return float(self.decay ** sum(epoch >= milestone for milestone in self.milestones))
        return 1.0


def plain_number(value: Any) -> Any:
    """Return NumPy's numbers as Python's, so that they give the same settings."""
    return value.item() if isinstance(value, np.generic) else value


def milestones_of(milestones: Any) -> tuple[int, ...]:
    """Return milestones as a tuple; raise InputError where they are no list."""
    if isinstance(milestones, str) or not isinstance(milestones, Iterable):
        raise InputError(f"milestones must be a list of epochs; got {milestones!r}")
    return tuple(milestones)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}; got {value!r}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> None:
    """Raise InputError unless a value is a finite number within the bounds."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (fits and value > above and least <= value <= most):
        bounds = [
            f"{text} {bound:g}"
            for text, bound in (("above", above), ("at least", least), ("at most", most))
            if math.isfinite(bound)
        ]
        raise InputError(f"{name} must be a finite number {' and '.join(bounds)}; got {value!r}")


def check_model(name: str, model: Any) -> None:
    """Raise InputError unless a model, called ``name``, can be trained here and now."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must be a torch.nn.Module; got {kind_of(model)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"{name} has no parameter that can be trained: set requires_grad of those that should"
        )
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode() keeps no gradients: leave it to train")
