"""Logits of a batch, checked, and the cross-entropy loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clafusion.errors import ClafusionError, InputError
from clafusion.training.data import Batch
from clafusion.weights.messages import one_line

__all__ = ["Loss", "checked_labels", "cross_entropy", "cross_entropy_of", "is_finite", "logits_of"]

Loss: TypeAlias = "Callable[[nn.Module, Batch, str], Tensor]"
"""The loss of a model on a batch of data that messages call so: a number with a gradient."""


def cross_entropy(model: nn.Module, batch: Batch, where: str = "data") -> Tensor:
    """Return the mean cross-entropy of a model's logits on a batch with the batch's labels."""
    return cross_entropy_of(logits_of(model, batch, where=where), batch[2], where)


def cross_entropy_of(logits: Tensor, labels: Tensor | None, where: str = "data") -> Tensor:
    """Return the mean cross-entropy of logits ``(batch, classes, ...)`` with labels.

    Raises
    ------
    InputError
        As for :func:`checked_labels`.
    """
    return F.cross_entropy(logits, checked_labels(where, logits, labels))


def is_finite(batch: Batch) -> bool:
    """Return whether all inputs of a batch are finite numbers."""
    inputs = [*batch[0], *batch[1].values()]
    return all(bool(torch.isfinite(x).all()) for x in inputs if x.is_floating_point())


def logits_of(
    model: nn.Module, batch: Batch, who: str = "the model", where: str = "data"
) -> Tensor:
    """Return a model's logits ``(batch, classes, ...)`` on a batch, in float32 at least.

    ``who`` and ``where`` name the model and the data in messages.

    Raises
    ------
    InputError
        The model does not run on the batch, or returns no logits.
    """
    inputs, named, _ = batch
    try:
        output = model(*inputs, **named)
    except (ClafusionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shown = [f"{x.dtype} of shape {tuple(x.shape)}" for x in inputs]
        shown += [f"{name!r}, {x.dtype} of shape {tuple(x.shape)}" for name, x in named.items()]
        raise InputError(
            f"{who} does not run on a batch of {where} ({'; '.join(shown)}): {one_line(error)}"
        ) from error
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() < 2:
        kind = (
            f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        )
        raise InputError(
            f"{who} must return logits (batch, classes) or an object with .logits; got {kind}"
        )
    return output.float()


def checked_labels(name: str, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return labels that fit logits ``(batch, classes, ...)``: int64 ``(batch, ...)``.

    Raises
    ------
    InputError
        The labels are missing, of another shape or type, or outside of the classes.
    """
    shape = (logits.size(0), *logits.shape[2:])
    if labels is None or labels.shape != shape or labels.dtype != torch.int64:
        kind = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise InputError(
            f"{name}: the labels of a batch must be int64 of shape {shape}, one for each "
            f"prediction; got {kind}"
        )
    low, high = (int(label) for label in labels.aminmax())
    if low < 0 or high >= logits.size(1):
        raise InputError(
            f"{name} holds the label {low if low < 0 else high}, but the model tells "
            f"{logits.size(1)} classes apart: labels must be from 0 to {logits.size(1) - 1}"
        )
    return labels
