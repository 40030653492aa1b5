"""Train a classifier further on labelled data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from clafusion.profiling.batches import Progress
from clafusion.training.data import LabelledData
from clafusion.training.loop import TrainingResult, train
from clafusion.training.losses import cross_entropy
from clafusion.training.settings import Norms, Schedule, Settings, milestones_of

__all__ = ["finetune"]


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
    """Train a copy of a classifier on labelled data with the cross-entropy loss.

    The optimizer is stochastic gradient descent with momentum and weight decay, as for finetuning
    fused networks in CLAFusion (arXiv 2110.15538, section 5). To train as its public code does,
    give ``schedule="step"``, ``milestones=(150, 250)``, ``learning_rate=0.1`` and
    ``batch_size=256`` over 300 epochs.

    Parameters
    ----------
    model
        The classifier; it is not modified. Parameters that need no gradient stay as they are. Its
        output is a tensor of logits ``(batch, classes, ...)`` or an object with ``.logits``.
    data
        A pair of tensors ``(inputs, labels)``, which is shuffled in each epoch, or a DataLoader
        (or another iterable of batches), which is read once in each epoch. Labels are ``int64``,
        from 0.
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
        Samples in each step, where ``data`` is a pair of tensors. If a single sample would be left
        over, the epoch drops it, for BatchNorm cannot normalise it.
    norms
        What BatchNorm does in training: ``"frozen"`` uses its running statistics, which stay;
        ``"batch"`` uses each batch's own, which its running statistics follow; ``"auto"`` freezes
        those that have statistics, as in every trained or fused network. Statistics of batches
        destroy a fused network first.
    held_out
        The share of a pair of tensors that is kept out of training, evenly spaced, where no
        ``validation`` is given. On it the loss is measured before training and after each epoch,
        and the weights with the lowest one are returned: so the result is never worse there than
        the model that was given. 0 for none, to train a new network on all data.
    validation
        Labelled data that give the accuracy after each epoch, and the loss in place of
        ``held_out``.
    patience
        Stop after this many epochs in a row without a better validation accuracy, and return the
        best epoch's weights.
    checkpoint
        A ``.pt`` file that holds the run after each epoch. If the file exists, the run goes on
        from there and ends with the same bytes as an uninterrupted run; a finished run returns at
        once. The file must be of the same settings, the same model with the same trainable
        parameters, the same data and the same validation (of a DataLoader, the same number of
        batches). A DataLoader with ``persistent_workers`` does not go with it, for its random
        numbers cannot be seeded in each epoch.
    mixed_precision
        Compute in bfloat16 where ``torch.autocast`` holds that to be safe; on a GPU only.
    device
        Where to train; default where the model is. The result is there, too.
    seed
        Seed of the order of the data and of all randomness in training (dropout, and what a
        DataLoader's transforms take from PyTorch, NumPy and Python). These generators have their
        old state back afterwards; a DataLoader's own generator has not.
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
    settings = Settings(
        stage="finetune",
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
    )
    return train(
        model,
        data,
        cross_entropy,
        settings,
        optimizer=optimizer,
        validation=validation,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
        labelled=True,
    )
