"""Train a student to give its teachers' outputs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clafusion.assessment.combining import MOST_COMPARED, by_divergence
from clafusion.config import COMBINATIONS
from clafusion.errors import InputError, check_callable, kind_of
from clafusion.merging.combination import Combination, Means
from clafusion.profiling.batches import PROGRESS, Progress
from clafusion.tracing.copies import copied
from clafusion.training.checkpoint import model_digest
from clafusion.training.data import (
    Batch,
    LabelledData,
    batches_of,
    check_data,
    training_device,
)
from clafusion.training.loop import TrainingResult, seeded, train
from clafusion.training.losses import Loss, cross_entropy_of, is_finite, logits_of
from clafusion.training.settings import (
    Norms,
    Schedule,
    Settings,
    check_model,
    check_number,
    milestones_of,
    plain_number,
)

__all__ = ["distill"]


def distill(
    student: nn.Module,
    teachers: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
    data: LabelledData | Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    combine: str = "auto",
    epochs: int | None = None,
    steps: int | None = None,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: Schedule = "cosine",
    milestones: Sequence[int] = (),
    decay: float = 0.1,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    batch_size: int = 128,
    norms: Norms = "auto",
    held_out: float = 0.1,
    validation: LabelledData | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    mixed_precision: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingResult:
    r"""Train a copy of a student to give the outputs of one or more teachers.

    With logits :math:`z` of the student, what the teachers put out together at temperature
    :math:`T`, :math:`p`, and labels :math:`y`, the loss is

    .. math:: \alpha\, T^2\, \mathrm{KL}\bigl(p \,\|\, \mathrm{softmax}(z / T)\bigr)
              + (1 - \alpha)\, \mathrm{CE}(z, y)

    (Hinton et al., arXiv 1503.02531, section 2). The factor :math:`T^2` keeps the gradient's size
    as the temperature changes.

    Parameters
    ----------
    student
        The model to train; it is not modified.
    teachers
        A model, or a list or a mapping of models, with the student's inputs and classes; they are
        not modified, and run in eval mode.
    data
        As for :func:`finetune`. With ``alpha=1`` the loss uses no labels, and ``data`` may be a
        tensor of inputs or batches without labels. The last entry of a batch that is a tuple of
        two or more still counts as labels.
    temperature
        Above 0; higher values give small probabilities more weight.
    alpha
        The weight of the teachers' part of the loss, in [0, 1].
    combine
        What several teachers put out together: ``"logits"`` or ``"probabilities"``, of which the
        mean is taken, or ``"auto"``, which chooses on the first 256 inputs as :func:`fuse` does.
    epochs, steps, learning_rate, momentum, weight_decay, schedule, milestones, decay, optimizer
        As for :func:`finetune`.
    batch_size, norms, held_out, validation, patience, checkpoint, mixed_precision, device, seed
        As for :func:`finetune`.
    progress
        Called after each step with ``"distill"`` and the number of steps done.

    Returns
    -------
    TrainingResult
        With the trained copy of the student as ``.model``.

    Raises
    ------
    InputError
        As for :func:`finetune`, or a teacher's outputs have another shape than the student's.
    DivergenceError
        The loss is no longer finite.
    """
    check_callable(progress, "progress", PROGRESS)
    check_number("temperature", temperature, above=0.0)
    check_number("alpha", alpha, least=0.0, most=1.0)
    if combine not in COMBINATIONS:
        raise InputError(
            f"combine must be one of {', '.join(map(repr, COMBINATIONS))}; got {combine!r}"
        )
    temperature, alpha = plain_number(temperature), plain_number(alpha)
    if isinstance(data, Tensor) and alpha < 1.0:
        raise InputError(
            f"data is a tensor of inputs alone, but with alpha={alpha:g} labels are needed: give "
            "(inputs, labels), or alpha=1"
        )
    originals = _listed_teachers(teachers)
    settings = Settings(
        stage="distill",
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        milestones=milestones_of(milestones),
        decay=decay,
        batch_size=batch_size,
        patience=patience,
        mixed_precision=mixed_precision,
        seed=seed,
        norms=norms,
        held_out=held_out,
        loss={
            "temperature": temperature,
            "alpha": alpha,
            "combine": combine,
            "teachers": [model_digest(teacher) for teacher in originals],
        },
    )
    check_model("student", student)
    target = training_device(device, student)
    frozen = [copied(teacher).to(target).eval() for teacher in originals]
    given = (data, None) if isinstance(data, Tensor) else data
    check_data("data", given, alpha < 1.0)
    combination = _combination(combine, frozen, given, settings, target, alpha < 1.0)
    result = train(
        student,
        given,
        _distillation_loss(frozen, temperature, alpha, combination.means),
        settings,
        optimizer=optimizer,
        validation=validation,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
        labelled=alpha < 1.0,
    )
    return replace(result, combination=combination)


def _listed_teachers(teachers: Any) -> list[nn.Module]:
    """Return the teachers as a list; raise InputError where there is none."""
    if isinstance(teachers, Mapping):
        teachers = list(teachers.values())
    is_module = isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList)
    models: list[Any] = [teachers]
    if not is_module:
        models = list(teachers) if isinstance(teachers, Iterable) else []
    wrong = [one for one in models or [teachers] if not isinstance(one, nn.Module)]
    if wrong:
        raise InputError(
            "teachers must be a torch.nn.Module, or a list or a mapping of at least one; got "
            f"{kind_of(wrong[0])}"
        )
    return models


@torch.no_grad()
def _combination(
    combine: str,
    teachers: Sequence[nn.Module],
    data: Any,
    settings: Settings,
    device: torch.device,
    labelled: bool,
) -> Combination:
    """Return what the teachers put out together."""
    if len(teachers) == 1:
        return Combination(reason="there is one teacher")
    if combine != "auto":
        return Combination.asked_for(combine)
    rows: list[list[Tensor]] = []
    seen = 0
    with seeded(settings.seed, 0, device):
        for batch in batches_of("data", data, settings.batch_size, device, labelled):
            outputs = _outputs(teachers, batch)
            rows.append([one.movedim(1, -1).flatten(0, -2) for one in outputs])
            seen += len(outputs[0])
            if seen >= MOST_COMPARED:
                break
    if not rows:
        raise InputError("data is empty: give at least one batch")
    return by_divergence(rows, [1 / len(teachers)] * len(teachers))


def _outputs(teachers: Sequence[nn.Module], batch: Batch, where: str = "data") -> list[Tensor]:
    """Return the teachers' logits, all of one shape."""
    found = [logits_of(teacher, batch, f"teacher {i}", where) for i, teacher in enumerate(teachers)]
    for i, one in enumerate(found):
        if one.shape != found[0].shape:
            raise InputError(
                f"teacher {i} gives outputs of shape {tuple(one.shape)}, teacher 0 of "
                f"{tuple(found[0].shape)}: distillation needs the same classes"
            )
    return found


def _distillation_loss(
    teachers: Sequence[nn.Module], temperature: float, alpha: float, means: Means
) -> Loss:
    """Return the loss that :func:`distill` documents."""

    def loss(model: nn.Module, batch: Batch, where: str) -> Tensor:
        logits = logits_of(model, batch, where=where)
        with torch.no_grad():
            outputs = _outputs(teachers, batch, where)
            if outputs[0].shape != logits.shape:
                raise InputError(
                    f"the teachers give outputs of shape {tuple(outputs[0].shape)}, the student "
                    f"of {tuple(logits.shape)}: distillation needs the same classes"
                )
            stacked = torch.stack(outputs) / temperature
            if means == "probabilities":
                probabilities = stacked.softmax(2).mean(0)
            else:
                probabilities = stacked.mean(0).softmax(1)
        log_probabilities = (logits / temperature).log_softmax(1)
        # An output (batch, classes, ...) holds many predictions: take the mean over all of them.
        divergences = F.kl_div(log_probabilities, probabilities, reduction="none").sum(1)
        soft = temperature**2 * divergences.mean()
        if not math.isfinite(float(soft.detach())) and is_finite(batch):
            for i, output in enumerate(outputs):
                if not bool(torch.isfinite(output).all()):
                    raise InputError(
                        f"teacher {i} gives NaN or infinite outputs: check its weights and the "
                        "scale of the data"
                    )
        if alpha == 1.0:
            return soft
        return alpha * soft + (1.0 - alpha) * cross_entropy_of(logits, batch[2], where)

    return loss
