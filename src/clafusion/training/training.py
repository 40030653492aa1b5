"""Gradient training after fusion: finetuning on labels and distillation from teachers.

Nothing in :func:`clafusion.fuse` needs this module, and a plain PyTorch loop serves as well.

Every epoch starts from random numbers that follow from the seed and the epoch's number alone. So a
checkpoint at the end of an epoch needs no generator's state, and a resumed run ends with the bytes
of an uninterrupted one on the same machine with as many threads.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clafusion.errors import ClafusionError, DivergenceError, InputError
from clafusion.fusion import Progress
from clafusion.weights.atomic import check_output, replacing
from clafusion.weights.digests import data_digest, digest_of, structure_digest, tensors_digest
from clafusion.weights.files import read_torch, tensors_of

__all__ = ["LabelledData", "Schedule", "TrainingResult", "distill", "finetune"]

LabelledData: TypeAlias = "tuple[Tensor, Tensor] | Iterable[Any]"
"""A pair ``(inputs, labels)``, or an iterable of batches that can be read again (a DataLoader).

A batch is a tuple ``(input, ..., labels)``, or a mapping of input names and ``"labels"``.
"""

Schedule = Literal["constant", "cosine", "step"]

_Batch: TypeAlias = "tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor | None]"
_Loss: TypeAlias = "Callable[[nn.Module, _Batch], Tensor]"

_EVALUATED_AT_ONCE = 512


@dataclass(frozen=True)
class TrainingResult:
    """A trained model and how its training went.

    Attributes
    ----------
    model
        The trained copy, in the mode (train or eval) of the model that was given. With
        ``patience`` the weights of the best epoch, else those of the last.
    losses
        The mean training loss of each epoch.
    accuracies
        The share of the validation samples that were right after each epoch; empty without
        validation.
    best_epoch
        The epoch (from 0) with the highest validation accuracy, the first of equals; None without
        validation.
    steps
        How many optimizer steps were taken, those before a resumption included.
    stopped_early
        Whether ``patience`` ran out before the last epoch.
    """

    model: nn.Module
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    best_epoch: int | None
    steps: int
    stopped_early: bool


def finetune(
    model: nn.Module,
    data: LabelledData,
    *,
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
    validation: LabelledData | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    mixed_precision: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train a copy of a classifier on labelled data with the cross-entropy loss.

    The optimizer is stochastic gradient descent with momentum and weight decay, as for finetuning
    fused networks in CLAFusion (arXiv 2110.15538, section 5). To train as its public code does,
    give ``schedule="step"``, ``milestones=(150, 250)``, ``learning_rate=0.1`` and
    ``batch_size=256`` over 300 epochs.

    Parameters
    ----------
    model
        The classifier; it is not modified. Parameters that need no gradient stay as they are, but
        BatchNorm's running statistics follow the data even where its parameters are frozen. Its
        output is a tensor of logits ``(batch, classes, ...)`` or an object with ``.logits``.
    data
        A pair of tensors ``(inputs, labels)``, shuffled anew in each epoch, or a DataLoader (or
        another iterable of batches), read once in each epoch. Labels are ``int64``, from 0.
    epochs, steps
        How long to train: passes over the data, or optimizer steps. Give one of them.
    learning_rate, momentum, weight_decay
        Of stochastic gradient descent.
    schedule
        How the learning rate changes: ``"constant"``; ``"cosine"``, each step, to 0; ``"step"``,
        times ``decay`` at each epoch in ``milestones``.
    milestones, decay
        Of ``schedule="step"``.
    optimizer
        Called with the parameters in place of SGD, for example
        ``lambda parameters: torch.optim.AdamW(parameters, 1e-3)``. ``schedule`` applies to its
        learning rates; ``learning_rate``, ``momentum`` and ``weight_decay`` are unused.
    batch_size
        Samples in each step, where ``data`` is a pair of tensors. A single sample that would be
        left over is dropped, for BatchNorm cannot take it.
    validation
        Labelled data on which the accuracy is measured after each epoch.
    patience
        Stop after this many epochs in a row without a better validation accuracy, and return the
        best.
    checkpoint
        A ``.pt`` file to which all is written after each epoch. If it exists, the run goes on from
        there, and ends with the same bytes; a finished run is returned at once. A file of other
        settings, another model (or other parameters that need a gradient), other data or other
        validation (of a DataLoader only the number of batches is compared) is refused. Not with
        a DataLoader of ``persistent_workers``, whose random numbers cannot be set anew.
    mixed_precision
        Compute in bfloat16 where PyTorch holds that to be safe; on a GPU only.
    device
        Where to train; default where the model is. The result is there, too.
    seed
        Seed of the order of the data and of all randomness in training (dropout, and what a
        DataLoader's transforms take from PyTorch, NumPy and Python). The state of these
        generators is as before afterwards, but a DataLoader's own generator is set.
    progress
        Called after each step with ``"finetune"`` and the number of steps done.

    Returns
    -------
    TrainingResult
        With the trained copy as ``.model``.

    Raises
    ------
    InputError
        A setting, the data or the checkpoint is unusable; the message names it.
    DivergenceError
        The loss is no longer finite; the message names the step and what to try.
    """
    settings = _Settings(
        stage="finetune",
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        milestones=_tuple_of(milestones),
        decay=decay,
        batch_size=batch_size,
        patience=patience,
        mixed_precision=mixed_precision,
        seed=seed,
    )
    return _train(
        model,
        data,
        _cross_entropy,
        settings,
        optimizer=optimizer,
        validation=validation,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
        labelled=True,
    )


def distill(
    student: nn.Module,
    teachers: nn.Module | Sequence[nn.Module],
    data: LabelledData | Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
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
    validation: LabelledData | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    mixed_precision: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingResult:
    r"""Train a copy of a student to give the outputs of one or more teachers.

    With logits :math:`z` of the student, the mean :math:`p` of the teachers' probabilities at
    temperature :math:`T`, and labels :math:`y`, the loss is

    .. math:: \alpha\, T^2\, \mathrm{KL}\bigl(p \,\|\, \mathrm{softmax}(z / T)\bigr)
              + (1 - \alpha)\, \mathrm{CE}(z, y)

    (Hinton et al., arXiv 1503.02531, section 2). The factor :math:`T^2` keeps the gradient's size
    as the temperature changes.

    Parameters
    ----------
    student
        The model to train; it is not modified.
    teachers
        One model or several with the student's inputs and classes; they are not modified, and run
        in eval mode.
    data
        As for :func:`finetune`. With ``alpha=1`` labels are not needed and not looked at: a tensor
        of inputs or batches without labels will do. A batch that is a tuple of two or more still
        ends with what is taken for labels.
    temperature
        Above 0; higher values weigh the small probabilities more.
    alpha
        The teachers' share of the loss, in [0, 1].
    epochs, steps, learning_rate, momentum, weight_decay, schedule, milestones, decay, optimizer
        See :func:`finetune`.
    batch_size, validation, patience, checkpoint, mixed_precision, device, seed
        See :func:`finetune`.
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
    _check_number("temperature", temperature, above=0.0)
    _check_number("alpha", alpha, least=0.0, most=1.0)
    temperature, alpha = _plain(temperature), _plain(alpha)
    if isinstance(data, Tensor) and alpha < 1.0:
        raise InputError(
            f"data is a tensor of inputs alone, but with alpha={alpha:g} labels are needed: give "
            "(inputs, labels), or alpha=1"
        )
    is_one = isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList)
    given: list[Any] = [teachers]
    if not is_one:
        given = list(teachers) if isinstance(teachers, Iterable) else []
    if not given or not all(isinstance(one, nn.Module) for one in given):
        raise InputError("teachers must be a torch.nn.Module or a list of at least one")
    settings = _Settings(
        stage="distill",
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        milestones=_tuple_of(milestones),
        decay=decay,
        batch_size=batch_size,
        patience=patience,
        mixed_precision=mixed_precision,
        seed=seed,
        loss={
            "temperature": temperature,
            "alpha": alpha,
            "teachers": [_digest(one) for one in given],
        },
    )
    _check_model("student", student)
    target = _device(device, student)
    frozen = [copy.deepcopy(one).to(target).eval() for one in given]

    def loss(model: nn.Module, batch: _Batch) -> Tensor:
        logits = _logits(model, batch)
        with torch.no_grad():
            outputs = [_logits(teacher, batch, f"teacher {i}") for i, teacher in enumerate(frozen)]
            for i, one in enumerate(outputs):
                if one.shape != logits.shape:
                    raise InputError(
                        f"teacher {i} gives outputs of shape {tuple(one.shape)}, the student of "
                        f"{tuple(logits.shape)}: distillation needs the same classes"
                    )
            wanted = torch.stack([(one / temperature).softmax(1) for one in outputs]).mean(0)
        found = (logits / temperature).log_softmax(1)
        # The divergence of each prediction, of which an output (batch, classes, ...) holds many.
        divergence = F.kl_div(found, wanted, reduction="none").sum(1).mean()
        soft = temperature**2 * divergence
        if not math.isfinite(float(soft.detach())) and _is_finite(batch):
            for i, one in enumerate(outputs):
                if not bool(torch.isfinite(one).all()):
                    raise InputError(
                        f"teacher {i} gives NaN or infinite outputs: check its weights and the "
                        "scale of the data"
                    )
        if alpha == 1.0:
            return soft
        return alpha * soft + (1.0 - alpha) * _cross_entropy_of(logits, batch[2])

    return _train(
        student,
        (data, None) if isinstance(data, Tensor) else data,
        loss,
        settings,
        optimizer=optimizer,
        validation=validation,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
        labelled=alpha < 1.0,
    )


# --- settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What a run depends on beside the model and the data; refuses what is out of range."""

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
    loss: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InputError(
                "give either epochs or steps, how long to train; got "
                f"epochs={self.epochs!r} and steps={self.steps!r}"
            )
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(value))
        object.__setattr__(self, "milestones", tuple(map(_plain, self.milestones)))
        for name in ("epochs", "steps", "batch_size", "patience"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        _check_count("seed", self.seed, 0)
        _check_number("learning_rate", self.learning_rate, above=0.0)
        _check_number("momentum", self.momentum, least=0.0, most=1.0)
        _check_number("weight_decay", self.weight_decay, least=0.0)
        _check_number("decay", self.decay, above=0.0)
        if self.schedule not in get_args(Schedule):
            raise InputError(
                f"schedule must be one of {', '.join(map(repr, get_args(Schedule)))}; "
                f"got {self.schedule!r}"
            )
        for milestone in self.milestones:
            _check_count("milestones", milestone, 1)
        if (self.schedule == "step") != bool(self.milestones):
            raise InputError(
                "milestones, the epochs at which the learning rate falls, go with schedule "
                f"'step'; got schedule {self.schedule!r} and milestones {self.milestones!r}"
            )

    def factor(self, step: int, epoch: int, total: int) -> float:
        """Return what the learning rates are multiplied with in a step (from 0)."""
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * step / total))
        if self.schedule == "step":
            return float(self.decay ** sum(epoch >= one for one in self.milestones))
        return 1.0


def _plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's, so that they give the same settings."""
    return value.item() if isinstance(value, np.generic) else value


def _tuple_of(milestones: Any) -> tuple[int, ...]:
    if isinstance(milestones, str) or not isinstance(milestones, Iterable):
        raise InputError(f"milestones must be a list of epochs; got {milestones!r}")
    return tuple(milestones)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}; got {value!r}")


def _check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> None:
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (fits and value > above and least <= value <= most):
        bounds = [
            f"{text} {bound:g}"
            for text, bound in (("above", above), ("at least", least), ("at most", most))
            if math.isfinite(bound)
        ]
        raise InputError(f"{name} must be a finite number {' and '.join(bounds)}; got {value!r}")


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must be a torch.nn.Module; got {type(model).__name__}")
    if not any(one.requires_grad for one in model.parameters()):
        raise InputError(
            f"{name} has no parameter that can be trained: set requires_grad of those that should"
        )
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode() keeps no gradients: leave it to train")


# --- the loop -----------------------------------------------------------------------------------


@dataclass
class _Run:
    """Where a run is; what a checkpoint holds, beside the tensors."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    finished: bool = False
    stopped_early: bool = False

    def best_epoch(self) -> int | None:
        if not self.accuracies:
            return None
        return max(range(len(self.accuracies)), key=self.accuracies.__getitem__)


def _train(
    model: nn.Module,
    data: Any,
    loss: _Loss,
    settings: _Settings,
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    validation: LabelledData | None,
    checkpoint: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    progress: Progress | None,
    labelled: bool,
) -> TrainingResult:
    _check_model("student" if settings.stage == "distill" else "model", model)
    if settings.patience is not None and validation is None:
        raise InputError("patience needs validation, on which a better epoch shows")
    target = _device(device, model)
    if settings.mixed_precision and not (
        target.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    ):
        raise InputError(
            f"mixed_precision needs a GPU with bfloat16, and the device is {str(target)!r}: leave "
            "it off, or give device='cuda'"
        )
    _check_data("data", data, labelled)
    if validation is not None:
        _check_data("validation", validation, True)
    path = None if checkpoint is None else check_output(checkpoint, (".pt",), "checkpoint")
    if path is not None and getattr(data, "persistent_workers", False):
        raise InputError(
            "checkpoint does not go with a DataLoader of persistent_workers, whose random numbers "
            "do not start anew in each epoch, as a resumed run's would: give "
            "persistent_workers=False"
        )
    length = _num_batches(data, settings.batch_size)
    if settings.steps is None and length is None:
        raise InputError("data has no length, so epochs do not tell how long to train: give steps")
    total = settings.steps or (settings.epochs or 0) * (length or 0)

    trained = copy.deepcopy(model).to(target)
    solver = _optimizer(optimizer, trained, settings)
    rates = [group["lr"] for group in solver.param_groups]
    run = _Run()
    key = "" if path is None else _run_key(model, data, validation, solver, settings)
    if path is not None and path.exists():
        run = _resume(path, key, trained, solver)

    while not run.finished:
        with _seeded(settings.seed, run.epoch, target):
            trained.train()
            sum_of_losses, count = 0.0, 0
            for batch in _batches("data", data, settings.batch_size, target, labelled):
                factor = settings.factor(run.step, run.epoch, total)
                for group, rate in zip(solver.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                sum_of_losses += _step(trained, batch, loss, solver, settings, run)
                count += 1
                run.step += 1
                if progress is not None:
                    progress(settings.stage, run.step)
                if run.step == total:
                    break
            if count == 0:
                raise InputError("data is empty: give at least one batch")
            run.losses.append(sum_of_losses / count)
            run.epoch += 1
            if validation is not None:
                run.accuracies.append(_accuracy(trained, validation, target))
        run.finished = run.step >= total
        best = run.best_epoch()
        if settings.patience is not None and best is not None:
            if best == run.epoch - 1:
                run.best = {k: v.clone() for k, v in tensors_of(trained).items()}
            elif run.epoch - 1 - best >= settings.patience and not run.finished:
                run.finished = run.stopped_early = True
        if path is not None:
            _save(path, key, trained, solver, run)

    if run.best is not None:
        trained.load_state_dict(run.best, strict=False)
    for one, given in zip(trained.modules(), model.modules(), strict=True):
        one.training = given.training
    for parameter in trained.parameters():
        parameter.grad = None
    return TrainingResult(
        trained,
        tuple(run.losses),
        tuple(run.accuracies),
        run.best_epoch(),
        run.step,
        run.stopped_early,
    )


def _step(
    model: nn.Module,
    batch: _Batch,
    loss: _Loss,
    solver: torch.optim.Optimizer,
    settings: _Settings,
    run: _Run,
) -> float:
    """Take one optimizer step and return the loss before it."""
    solver.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=settings.mixed_precision):
        value = loss(model, batch)
    number = float(value.detach())
    if not math.isfinite(number):
        if not _is_finite(batch):
            advice = "the batch itself holds NaN or infinite values: clean the data"
        elif run.step == 0:
            advice = "no step was taken yet: check the model's weights and the data's scale"
        else:
            advice = "lower learning_rate, or check the labels and the scale of the data" + (
                "; or leave mixed_precision off" if settings.mixed_precision else ""
            )
        raise DivergenceError(
            f"the loss is {number} in step {run.step} (epoch {run.epoch}); {advice}", run.step
        )
    value.backward()
    solver.step()
    return number


def _optimizer(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    model: nn.Module,
    settings: _Settings,
) -> torch.optim.Optimizer:
    parameters = [one for one in model.parameters() if one.requires_grad]
    if make is None:
        return torch.optim.SGD(
            parameters,
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    wanted = (
        "optimizer must be a function of the parameters that returns a torch optimizer, for "
        "example lambda parameters: torch.optim.AdamW(parameters, 1e-3)"
    )
    if not callable(make):
        raise InputError(f"{wanted}; got {type(make).__name__}")
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(f"{wanted}; it returned {type(made).__name__}")
    if isinstance(made, torch.optim.LBFGS):
        raise InputError("optimizer must take its step from one gradient, which LBFGS does not")
    own = {id(one) for one in parameters}
    if not all(id(one) in own for group in made.param_groups for one in group["params"]):
        raise InputError(
            "optimizer must be of the parameters that it is called with, which are those of the "
            "copy that is trained; it has others, perhaps model.parameters()"
        )
    return made


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Set every generator for one epoch, and put back its state afterwards."""
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 for transforms
    deterministic = torch.backends.cudnn.deterministic
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(number)
            random.seed(number)
            np.random.seed(number)  # noqa: NPY002
            torch.backends.cudnn.deterministic = True
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002
            torch.backends.cudnn.deterministic = deterministic


@torch.no_grad()
def _accuracy(model: nn.Module, validation: LabelledData, device: torch.device) -> float:
    model.eval()
    right, count = 0, 0
    for batch in _batches(
        "validation", validation, _EVALUATED_AT_ONCE, device, True, shuffle=False
    ):
        logits = _logits(model, batch, where="validation")
        labels = _checked_labels("validation", logits, batch[2])
        right += int((logits.argmax(1) == labels).sum())
        count += labels.numel()
    if count == 0:
        raise InputError("validation is empty: give at least one batch")
    return right / count


# --- losses -------------------------------------------------------------------------------------


def _cross_entropy(model: nn.Module, batch: _Batch) -> Tensor:
    return _cross_entropy_of(_logits(model, batch), batch[2])


def _cross_entropy_of(logits: Tensor, labels: Tensor | None) -> Tensor:
    return F.cross_entropy(logits, _checked_labels("data", logits, labels))


def _is_finite(batch: _Batch) -> bool:
    inputs = [*batch[0], *batch[1].values()]
    return all(bool(torch.isfinite(x).all()) for x in inputs if x.is_floating_point())


def _logits(model: nn.Module, batch: _Batch, who: str = "the model", where: str = "data") -> Tensor:
    inputs, named, _ = batch
    try:
        output = model(*inputs, **named)
    except (ClafusionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shown = [f"{x.dtype} of shape {tuple(x.shape)}" for x in inputs]
        shown += [f"{name!r}, {x.dtype} of shape {tuple(x.shape)}" for name, x in named.items()]
        raise InputError(
            f"{who} does not run on a batch of {where} ({'; '.join(shown)}): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() < 2:
        found = (
            f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        )
        raise InputError(
            f"{who} must return logits (batch, classes) or an object with .logits; got {found}"
        )
    return output.float()


def _checked_labels(name: str, logits: Tensor, labels: Tensor | None) -> Tensor:
    shape = (logits.size(0), *logits.shape[2:])
    if labels is None or labels.shape != shape or labels.dtype != torch.int64:
        found = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise InputError(
            f"{name}: the labels of a batch must be int64 of shape {shape}, one for each "
            f"prediction; got {found}"
        )
    low, high = (int(one) for one in labels.aminmax())
    if low < 0 or high >= logits.size(1):
        raise InputError(
            f"{name} holds the label {low if low < 0 else high}, but the model tells "
            f"{logits.size(1)} classes apart: labels must be from 0 to {logits.size(1) - 1}"
        )
    return labels


# --- data ---------------------------------------------------------------------------------------


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)


def _check_data(name: str, data: Any, labelled: bool) -> None:
    if isinstance(data, Iterator):
        raise InputError(
            f"{name} can be read only once, but is needed in each epoch: give tensors, a list of "
            "batches or a DataLoader instead of an iterator"
        )
    if isinstance(data, (Tensor, str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise InputError(
            f"{name} must be a pair of tensors (inputs, labels) or a DataLoader; "
            f"got {type(data).__name__}"
        )
    if not _is_pair(data):
        several = isinstance(data, (list, tuple)) and len(data) > 1
        if labelled and several and all(isinstance(one, Tensor) for one in data):
            raise InputError(
                f"{name} must be a pair of tensors (inputs, labels), or batches [(input, ..., "
                f"labels), ...]; got a {type(data).__name__} of tensors"
            )
        return
    inputs, labels = data
    if inputs.dim() == 0 or len(inputs) == 0:
        raise InputError(f"{name} is empty: its inputs have shape {tuple(inputs.shape)}")
    if isinstance(labels, Tensor):
        if labels.dim() == 0 or len(labels) != len(inputs):
            raise InputError(
                f"{name} has {len(inputs)} inputs, but labels of shape {tuple(labels.shape)}"
            )
        if not labelled and labels.is_floating_point():
            raise InputError(
                f"{name} is a pair, of which the second must be labels; got {labels.dtype}. Give "
                "two batches of inputs as a list"
            )
    elif labelled or labels is not None:
        raise InputError(
            f"{name} must be a pair of tensors (inputs, labels); its second entry is "
            f"{type(labels).__name__}"
        )


def _num_batches(data: Any, batch_size: int) -> int | None:
    if _is_pair(data):
        count = len(data[0])
        return 1 if count <= batch_size else -(-(count - (count % batch_size == 1)) // batch_size)
    try:
        return len(data)
    except TypeError:
        return None


def _batches(
    name: str,
    data: Any,
    batch_size: int,
    device: torch.device,
    labelled: bool,
    *,
    shuffle: bool = True,
) -> Iterator[_Batch]:
    """Yield batches on the device: positional inputs, named inputs, labels or None."""
    if _is_pair(data):
        inputs, labels = data
        order = torch.randperm(len(inputs)) if shuffle else torch.arange(len(inputs))
        for chosen in order.split(batch_size):
            if shuffle and batch_size > 1 and len(chosen) == 1 < len(order):
                return
            own = None if labels is None else labels[chosen.to(labels.device)].to(device)
            yield (inputs[chosen.to(inputs.device)].to(device),), {}, own
        return
    if shuffle:
        for generator in {
            id(one): one
            for one in (
                getattr(data, "generator", None),
                getattr(getattr(data, "sampler", None), "generator", None),
                getattr(getattr(data, "batch_sampler", None), "generator", None),
                getattr(
                    getattr(getattr(data, "batch_sampler", None), "sampler", None),
                    "generator",
                    None,
                ),
            )
            if isinstance(one, torch.Generator)
        }.values():
            generator.manual_seed(int(torch.randint(2**62, ())))
    for i, batch in enumerate(data):
        yield _unpacked(name, batch, i, device, labelled)


def _unpacked(name: str, batch: Any, index: int, device: torch.device, labelled: bool) -> _Batch:
    if isinstance(batch, Mapping):
        named = {key: one.to(device) for key, one in batch.items() if isinstance(one, Tensor)}
        labels = named.pop("labels", None)
        if named and not (labelled and labels is None):
            return (), named, labels
    parts = [batch] if isinstance(batch, Tensor) else batch
    if isinstance(parts, (tuple, list)) and all(isinstance(one, Tensor) for one in parts):
        moved = [one.to(device) for one in parts]
        if len(moved) > 1:
            return tuple(moved[:-1]), {}, moved[-1]
        if len(moved) == 1 and not labelled:
            return tuple(moved), {}, None
    wanted = (
        "tensors (input, ..., labels) or a mapping with a tensor 'labels'"
        if labelled
        else "a tensor or a tuple"
    )
    raise InputError(f"{name}, batch {index}, must be {wanted}; got {_kind(batch)}")


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        entries = (f"{name!r} ({type(one).__name__})" for name, one in batch.items())
        return f"a mapping with {', '.join(entries) or 'nothing'}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(type(one).__name__ for one in batch)})"
    return type(batch).__name__


def _device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    if device is None:
        return next(one.device for one in model.parameters())
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here: {reason}") from error
    return torch.device(device)


# --- checkpoints --------------------------------------------------------------------------------


def _run_key(
    model: nn.Module,
    data: Any,
    validation: Any,
    solver: torch.optim.Optimizer,
    settings: _Settings,
) -> str:
    """Return the hash of all that the run's result depends on."""

    def content(data: Any) -> str | int | None:
        if _is_pair(data):
            return data_digest([tuple(one for one in data if one is not None)])
        return _num_batches(data, settings.batch_size)

    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in solver.param_groups
    ]
    return digest_of(
        {
            "settings": repr(settings),
            "optimizer": f"{type(solver).__name__} {groups!r}",
            "model": _digest(model),
            "trained": [name for name, one in model.named_parameters() if one.requires_grad],
            "data": content(data),
            "validation": None if validation is None else [content(validation)],
        }
    )


def _digest(model: nn.Module) -> str:
    return digest_of([structure_digest(model), tensors_digest(tensors_of(model))])


def _save(path: Path, key: str, model: nn.Module, solver: torch.optim.Optimizer, run: _Run) -> None:
    memory = io.BytesIO()  # so that the file does not depend on its temporary name
    content = {"key": key, "model": tensors_of(model), "optimizer": solver.state_dict()}
    torch.save({**content, "run": vars(run)}, memory)
    with replacing(path, "checkpoint") as temporary:
        temporary.write_bytes(memory.getbuffer())


def _resume(path: Path, key: str, model: nn.Module, solver: torch.optim.Optimizer) -> _Run:
    stored = read_torch(path, "checkpoint")
    if not isinstance(stored, dict) or set(stored) != {"key", "model", "optimizer", "run"}:
        raise InputError(
            f"checkpoint {str(path)!r} exists and was not written by this function: choose "
            "another name"
        )
    if stored["key"] != key:
        raise InputError(
            f"checkpoint {str(path)!r} belongs to a run of another model, other data or other "
            "settings: delete it to begin anew, or choose another name"
        )
    model.load_state_dict(stored["model"], strict=False)
    solver.load_state_dict(stored["optimizer"])
    return _Run(**stored["run"])
