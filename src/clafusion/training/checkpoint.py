"""Write a run to a file after each epoch, and go on from there."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.profiling.batches import data_digest
from clafusion.training.data import is_pair, num_batches
from clafusion.training.settings import Settings
from clafusion.weights.atomic import replacing
from clafusion.weights.digests import digest_of, structure_digest, tensors_digest
from clafusion.weights.state_files import read_torch, tensors_of

__all__ = ["Run", "model_digest", "resume_run", "run_key", "save_run"]


@dataclass
class Run:
    """The state of a run beside model and optimizer; a checkpoint holds it.

    Attributes
    ----------
    epoch, step
        The number of finished epochs and steps.
    losses, accuracies
        The mean training loss and the validation accuracy of each finished epoch.
    held_out
        The loss on inputs that are kept out, before training and after each epoch.
    best, kept
        The weights of the best epoch, where they may not be the last, and after how many epochs
        they came.
    finished, stopped_early
        Whether the run has ended, and whether ``patience`` ended it.
    """

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    kept: int | None = None
    finished: bool = False
    stopped_early: bool = False

    def best_epoch(self) -> int | None:
        """Return the epoch with the highest accuracy, the first of equals; None without any."""
        if not self.accuracies:
            return None
        return max(range(len(self.accuracies)), key=self.accuracies.__getitem__)


def run_key(
    model: nn.Module,
    data: Any,
    validation: Any,
    solver: torch.optim.Optimizer,
    settings: Settings,
) -> str:
    """Return the SHA-256 of all that the result of a run depends on.

    Of data that are no pair of tensors, only the number of batches enters.
    """

    def content(data: Any) -> str | int | None:
        if is_pair(data):
            return data_digest([tuple(tensor for tensor in data if tensor is not None)])
        return num_batches(data, settings.batch_size)

    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in solver.param_groups
    ]
    return digest_of(
        {
            "settings": repr(settings),
            "optimizer": f"{type(solver).__name__} {groups!r}",
            "model": model_digest(model),
            "trained": [name for name, value in model.named_parameters() if value.requires_grad],
            "data": content(data),
            "validation": None if validation is None else [content(validation)],
        }
    )


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of what a model computes with its tensors, and of their values."""
    return digest_of([structure_digest(model), tensors_digest(tensors_of(model))])


def save_run(
    path: Path, key: str, model: nn.Module, solver: torch.optim.Optimizer, run: Run
) -> None:
    """Write a checkpoint; the old one stays whole until the new one is complete."""
    memory = io.BytesIO()  # torch.save would write the file's temporary name into the file
    content = {"key": key, "model": tensors_of(model), "optimizer": solver.state_dict()}
    torch.save({**content, "run": vars(run)}, memory)
    with replacing(path, "checkpoint") as temporary:
        temporary.write_bytes(memory.getbuffer())


def resume_run(path: Path, key: str, model: nn.Module, solver: torch.optim.Optimizer) -> Run:
    """Load a checkpoint into model and optimizer; return where its run is.

    Raises
    ------
    InputError
        The file is no checkpoint, or one of a run with another ``key``.
    """
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
    return Run(**stored["run"])
