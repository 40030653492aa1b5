"""The training loop: epochs, steps, learning rates, validation.

Every epoch starts from random numbers that follow from the seed and the epoch's number alone. So a
checkpoint at the end of an epoch needs no generator's state. On the same machine, with as many
threads, a resumed run ends with the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clafusion.errors import DivergenceError, InputError, check_callable
from clafusion.execution.results import forget_results
from clafusion.merging.combination import Combination
from clafusion.profiling.batches import PROGRESS, Progress
from clafusion.tracing.copies import copied
from clafusion.training.checkpoint import Run, resume_run, run_key, save_run
from clafusion.training.data import (
    Batch,
    LabelledData,
    batches_of,
    check_data,
    num_batches,
    parted,
    training_device,
)
from clafusion.training.losses import Loss, checked_labels, is_finite, logits_of
from clafusion.training.settings import Settings, check_model
from clafusion.weights.atomic import check_output
from clafusion.weights.state_files import tensors_of

__all__ = ["TrainingResult", "seeded", "train"]

_VALIDATION_BATCH_SIZE = 512


@dataclass(frozen=True)
class TrainingResult:
    """A trained model and how its training went.

    Attributes
    ----------
    model
        The trained copy, in the mode (train or eval) of the original model. Its weights are those
        of the best epoch with ``patience``, else those with the lowest loss on what was kept out,
        which may be those before training, or without any of that those of the last epoch.
    losses
        The mean training loss of each epoch.
    accuracies
        The share of the validation labels that the model predicts rightly after each epoch, in
        [0, 1]; empty without validation.
    best_epoch
        The epoch (from 0) with the highest validation accuracy, the first of equals; None without
        validation.
    steps
        The number of optimizer steps, including those before a resumption.
    stopped_early
        Whether ``patience`` ended the run before the last epoch.
    held_out_losses
        The mean loss on ``validation``, or on the inputs that were kept out, before training and
        after each epoch; empty with ``patience`` and where nothing was kept out.
    kept
        After how many epochs the model has its weights; 0: those before training.
    combination
        What the teachers put out together, of a distillation; else None.
    """

    model: nn.Module
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    best_epoch: int | None
    steps: int
    stopped_early: bool
    held_out_losses: tuple[float, ...]
    kept: int
    combination: Combination | None = None

    def __repr__(self) -> str:
        best = f", accuracy {100 * max(self.accuracies):.1f} %" if self.accuracies else ""
        last = f", loss {self.losses[-1]:.3g}" if self.losses else ""
        return (
            f"<TrainingResult {type(self.model).__name__}, {len(self.losses)} epochs{last}{best}>"
        )


def train(
    model: nn.Module,
    data: Any,
    loss: Loss,
    settings: Settings,
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    validation: LabelledData | None,
    checkpoint: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    progress: Progress | None,
    labelled: bool,
) -> TrainingResult:
    """Train a copy of a model.

    Parameters
    ----------
    model
        The model; it is not modified.
    data
        As for :func:`clafusion.finetune`; with ``labelled=False`` labels may be missing.
    loss
        The loss of the model on a batch.
    settings
        How to train.
    optimizer, validation, checkpoint, device, progress
        As for :func:`clafusion.finetune`.
    labelled
        Whether the loss needs labels.

    Raises
    ------
    InputError, DivergenceError
        As for :func:`clafusion.finetune`.
    """
    check_callable(progress, "progress", PROGRESS)
    check_model("student" if settings.stage == "distill" else "model", model)
    if settings.patience is not None and validation is None:
        raise InputError("patience needs validation, on which a better epoch shows")
    target = training_device(device, model)
    if settings.mixed_precision:
        _check_mixed_precision(target)
    check_data("data", data, labelled)
    if validation is not None:
        check_data("validation", validation, True)
    path = _checkpoint_path(checkpoint, data)
    watched = validation
    if validation is None:
        data, watched = parted(data, settings.held_out)
    total = _num_steps(data, settings)

    trained = copied(model).to(target)
    solver = _optimizer(optimizer, trained, settings)
    rates = [group["lr"] for group in solver.param_groups]
    frozen = _frozen_norms(trained, settings.norms)
    run = Run()
    key = "" if path is None else run_key(model, data, validation, solver, settings)
    if path is not None and path.exists():
        run = resume_run(path, key, trained, solver)

    def watch() -> None:
        if watched is not None and settings.patience is None:
            name = "data" if validation is None else "validation"
            _keep_nearest(run, trained, _mean_loss(name, trained, watched, loss, target))

    if run.epoch == 0:
        watch()
    while not run.finished:
        with seeded(settings.seed, run.epoch, target):
            batches = batches_of("data", data, settings.batch_size, target, labelled)
            trained.train()
            for norm in frozen:
                norm.eval()
            _train_epoch(trained, batches, loss, solver, rates, settings, run, total, progress)
            watch()
            if validation is not None:
                run.accuracies.append(_accuracy(trained, validation, target))
        run.finished = run.step >= total
        if settings.patience is not None:
            _keep_best(run, trained, settings.patience)
        if path is not None:
            save_run(path, key, trained, solver, run)

    if run.best is not None:
        trained.load_state_dict(run.best, strict=False)
    forget_results(trained)  # those of the weights that were looked at last
    for module, original in zip(trained.modules(), model.modules(), strict=True):
        module.training = original.training
    for parameter in trained.parameters():
        parameter.grad = None
    return TrainingResult(
        trained,
        tuple(run.losses),
        tuple(run.accuracies),
        run.best_epoch(),
        run.step,
        run.stopped_early,
        tuple(run.held_out),
        run.epoch if run.kept is None else run.kept,
    )


def _check_mixed_precision(device: torch.device) -> None:
    if not (device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        raise InputError(
            f"mixed_precision needs a GPU with bfloat16, and the device is {str(device)!r}: leave "
            "it off, or give device='cuda'"
        )


def _checkpoint_path(checkpoint: str | os.PathLike[str] | None, data: Any) -> Path | None:
    """Return the path of the checkpoint, checked; None where the run writes none."""
    path = None if checkpoint is None else check_output(checkpoint, (".pt",), "checkpoint")
    if path is not None and getattr(data, "persistent_workers", False):
        raise InputError(
            "checkpoint does not go with a DataLoader of persistent_workers, whose random numbers "
            "do not start anew in each epoch, as a resumed run's would: give "
            "persistent_workers=False"
        )
    return path


def _num_steps(data: Any, settings: Settings) -> int:
    """Return the number of optimizer steps in the whole run."""
    length = num_batches(data, settings.batch_size)
    if settings.steps is None and length is None:
        raise InputError("data has no length, so epochs do not tell how long to train: give steps")
    return settings.steps or (settings.epochs or 0) * (length or 0)


def _train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    solver: torch.optim.Optimizer,
    rates: Sequence[float],
    settings: Settings,
    run: Run,
    total: int,
    progress: Progress | None,
) -> None:
    """Take the steps of one epoch, at most up to step ``total``, and note them in ``run``."""
    sum_of_losses, count = 0.0, 0
    for batch in batches:
        factor = settings.factor(run.step, run.epoch, total)
        for group, rate in zip(solver.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        sum_of_losses += _step(model, batch, loss, solver, settings, run)
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


def _frozen_norms(model: nn.Module, norms: str) -> list[nn.Module]:
    """Return the norms of batches that use their running statistics in training, too.

    By default those that have any: in a network that was never trained they say nothing.
    """
    return [
        one
        for one in model.modules()
        if isinstance(one, nn.modules.batchnorm._BatchNorm)
        and isinstance(mean := one.running_mean, Tensor)
        and isinstance(variance := one.running_var, Tensor)
        and (norms == "frozen" or (norms == "auto" and bool(((mean != 0) | (variance != 1)).any())))
    ]


@torch.no_grad()
def _mean_loss(name: str, model: nn.Module, data: Any, loss: Loss, device: torch.device) -> float:
    """Return the mean loss on data that is not trained on, in eval mode."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches_of(name, data, _VALIDATION_BATCH_SIZE, device, False, shuffle=False):
        inputs, named, _ = batch
        size = len(next(iter((*inputs, *named.values()))))
        total += size * float(loss(model, batch, name))
        count += size
    if count == 0:
        raise InputError(f"{name} is empty: give at least one batch")
    return total / count


def _keep_nearest(run: Run, model: nn.Module, loss: float) -> None:
    """Note the loss on what was kept out, and keep the weights where it is the least so far."""
    if not run.held_out or loss < min(run.held_out):
        _keep(run, model)
    run.held_out.append(loss)


def _keep(run: Run, model: nn.Module) -> None:
    run.best = {name: value.clone() for name, value in tensors_of(model).items()}
    run.kept = run.epoch


def _keep_best(run: Run, model: nn.Module, patience: int) -> None:
    """Keep the weights of the best epoch; end the run where ``patience`` is at its end."""
    best = run.best_epoch()
    if best is None:
        return
    if best == run.epoch - 1:
        _keep(run, model)
    elif run.epoch - 1 - best >= patience and not run.finished:
        run.finished = run.stopped_early = True


def _step(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    solver: torch.optim.Optimizer,
    settings: Settings,
    run: Run,
) -> float:
    """Take an optimizer step and return the loss before it; raise where that is not finite."""
    solver.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=settings.mixed_precision):
        value = loss(model, batch, "data")
    number = float(value.detach())
    if not math.isfinite(number):
        if not is_finite(batch):
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
    settings: Settings,
) -> torch.optim.Optimizer:
    """Return the optimizer of a model's trainable parameters, made by ``make``; default SGD."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
    check_callable(make, "optimizer", ("parameters",))
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(f"{wanted}; it returned {type(made).__name__}")
    if isinstance(made, torch.optim.LBFGS):
        raise InputError("optimizer must take its step from one gradient, which LBFGS does not")
    own = {id(parameter) for parameter in parameters}
    if not all(id(value) in own for group in made.param_groups for value in group["params"]):
        raise InputError(
            "optimizer must be of the parameters that it is called with, which are those of the "
            "copy that is trained; it has others, perhaps model.parameters()"
        )
    return made


@contextlib.contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Seed every random generator for an epoch, and restore its state afterwards."""
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
    """Return the share of validation labels that the model predicts rightly."""
    model.eval()
    right, count = 0, 0
    for batch in batches_of(
        "validation", validation, _VALIDATION_BATCH_SIZE, device, True, shuffle=False
    ):
        logits = logits_of(model, batch, where="validation")
        labels = checked_labels("validation", logits, batch[2])
        right += int((logits.argmax(1) == labels).sum())
        count += labels.numel()
    if count == 0:
        raise InputError("validation is empty: give at least one batch")
    return right / count
