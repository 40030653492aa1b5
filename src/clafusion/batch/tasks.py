"""What is sent to workers elsewhere, and what they do: bytes in, bytes out, for any executor."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from clafusion.batch.processes import stoppable
from clafusion.batch.results import Pair
from clafusion.batch.worker import Job, Outcome, Worker
from clafusion.errors import InputError
from clafusion.weights.factories import Model
from clafusion.weights.messages import one_line

__all__ = [
    "SentJob",
    "fuse_pairs_task",
    "outcomes_of",
    "packed_job",
    "packed_models",
    "prepare_model_task",
]

Sent: TypeAlias = "bytes | str"
"""Pickled bytes, or the path of the file that holds them."""

_of_thread = threading.local()  # an executor of threads has a worker in each


@dataclass(frozen=True)
class SentJob:
    """A job as it is sent.

    Attributes
    ----------
    sent
        The pickled job.
    key
        Its hash, by which a worker knows a job that it has already.
    """

    sent: Sent
    key: str


def packed_job(job: Job, spill: str | None = None) -> SentJob:
    """Pickle a job, with the batches of a DataLoader instead of itself.

    With ``spill`` write it into that folder.
    """
    if not isinstance(job.data, Tensor):
        job = replace(job, data=list(job.data))
    pickled = pickle.dumps(job)
    key = hashlib.sha256(pickled).hexdigest()
    return SentJob(pickled if spill is None else _spilled(pickled, spill, "job"), key)


def packed_models(models: Mapping[str, Model], spill: str | None = None) -> dict[str, Sent]:
    """Pickle models. With ``spill`` write them into that folder.

    Raises
    ------
    InputError
        A model cannot be pickled, or the folder cannot be written to.
    """
    packed: dict[str, Sent] = {}
    for i, (name, model) in enumerate(models.items()):
        try:
            pickled = pickle.dumps(model)
        except Exception as error:
            raise InputError(
                f"models[{name!r}] cannot be sent to other processes "
                f"({one_line(error, most=None)}): give a clafusion.ModelFile, which is loaded there"
            ) from error
        packed[name] = pickled if spill is None else _spilled(pickled, spill, f"model-{i}")
    return packed


def _spilled(pickled: bytes, folder: str, name: str) -> str:
    """Write pickled bytes into a file for the workers; return its path."""
    path = Path(folder, f"{name}.pickle")
    try:
        path.write_bytes(pickled)
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r} for the workers: {error.strerror or error}; free space, "
            "or set TMPDIR"
        ) from error
    return str(path)


# --- in the worker ------------------------------------------------------------------------------


def prepare_model_task(job: SentJob, name: str, model: Sent) -> None:
    """Prepare a model, for the cache that all workers share."""
    with stoppable():
        _worker(job).prepare(name, lambda _: _unpacked(model))


def fuse_pairs_task(job: SentJob, models: Mapping[str, Sent], pairs: Sequence[Pair]) -> bytes:
    """Fuse some pairs; return the pickled outcomes."""
    worker = _worker(job)
    outcomes = []
    for pair in pairs:
        with stoppable():
            outcome = worker.fuse(pair, lambda name: _unpacked(models[name]))
        state = outcome.state
        if state is not None:
            state = {
                name: one.cpu() if isinstance(one, Tensor) else one for name, one in state.items()
            }
        outcomes.append(replace(outcome, state=state))
    return pickle.dumps(outcomes)


def outcomes_of(sent: bytes) -> list[Outcome]:
    """Return the outcomes that :func:`fuse_pairs_task` pickled."""
    outcomes: list[Outcome] = pickle.loads(sent)
    return outcomes


def _worker(job: SentJob) -> Worker:
    """Return this thread's worker. It keeps the models that it prepared for the next task."""
    if getattr(_of_thread, "key", None) != job.key:
        _of_thread.key, _of_thread.worker = job.key, Worker(_unpacked(job.sent))
    worker: Worker = _of_thread.worker
    return worker


def _unpacked(sent: Sent) -> Any:
    return pickle.loads(sent if isinstance(sent, bytes) else Path(sent).read_bytes())
