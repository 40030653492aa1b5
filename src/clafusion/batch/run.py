"""Many pairs: each model is prepared once, results come one by one, executors do the shipping.

Nothing here schedules, ships or retries across processes. The executor does that. What a worker
gets and returns is bytes, so that any executor can carry it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from torch import nn

from clafusion.alignment.models import label
from clafusion.assessment.evaluation import checked_labels
from clafusion.batch.check import check_outputs_of_pairs
from clafusion.batch.processes import block_sigint, worker_processes
from clafusion.batch.results import Pair, PairResult
from clafusion.batch.scheduler import Scheduler, split_into_tasks
from clafusion.batch.store import CACHE, Store, check_names
from clafusion.batch.tasks import (
    fuse_pairs_task,
    outcomes_of,
    packed_job,
    packed_models,
    prepare_model_task,
)
from clafusion.batch.worker import Job, Outcome, Worker
from clafusion.config import FusionConfig, Like
from clafusion.errors import (
    ClafusionError,
    InputError,
    check_callable,
    is_number_in_array,
    kind_of,
    warn,
)
from clafusion.execution.call import usable_device
from clafusion.interop.inputs import example_of, readable
from clafusion.profiling.batches import Data, data_digest
from clafusion.profiling.graphs import GraphBatches
from clafusion.stages import ExampleInputs, config_from, merge_weights
from clafusion.weights.atomic import path_of
from clafusion.weights.factories import Model, ModelFile
from clafusion.weights.messages import one_line

__all__ = ["PAIR_PROGRESS", "PairProgress", "fuse_pairs"]

PairProgress: TypeAlias = Callable[[int, int], None]
"""Called with the numbers of pairs that are done and of all pairs."""

PAIR_PROGRESS = ("done", "all")
"""What these arguments are called in errors."""

_NAME = re.compile(r"[\w.,=@-]+")  # what is safe in a file's name


def fuse_pairs(
    models: Mapping[str, Model],
    data: Data,
    pairs: Iterable[Pair] | str = "all",
    weights: Sequence[float] | None = None,
    config: FusionConfig | None = None,
    *,
    executor: Executor | int | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    labels: Any = None,
    progress: PairProgress | None = None,
    **overrides: Any,
) -> Iterator[PairResult]:
    """Fuse many pairs of models. Each pair gives the bytes of ``clafusion.fuse([first, second])``.

    Every model is proved and profiled once, and loaded once in each process, not once a pair.
    Models of one architecture share a trace. The result of a pair that fails says why, and the
    other pairs go on.

    Parameters
    ----------
    models
        Name -> module, or name -> :class:`clafusion.ModelFile` for a model that is loaded when it
        is needed. Names become file names: letters, digits and ``_.,=@-``.
    data
        Inputs, the same for all models. An iterable must give the same batches each
        time.
    pairs
        The names of the first and the second model of each pair, or ``"all"``: every two models,
        in the order of ``models``.
    weights
        The weights of the first and the second model of every pair. Default: equal.
    config
        The options; see :class:`clafusion.FusionConfig`. The target ``"like"`` is not possible.
    executor
        None or 1: fuse here, one pair after another. A number: start so many processes on this
        machine, which share its cores. Any :class:`concurrent.futures.Executor`: use it, for
        example ``Client(...).get_executor()`` of Dask. There the models' classes must be
        importable, and the files of :class:`clafusion.ModelFile` readable.
    out_dir
        Where results are written, one by one: the fused weights of a pair as
        ``FIRST+SECOND.safetensors`` (``.pt`` where ``get_extra_state`` of a module returns no
        tensor) and a line in ``results.jsonl``. Default: results are kept in memory only.
    resume
        Keep the pairs in ``out_dir`` that are whole and were made from the same models, data and
        options. Failed, stale and corrupt pairs are fused again. False: fuse all pairs again. Of
        a model's code only its modules' own ``forward``, or the file of a ``ModelFile``'s factory,
        is compared. After a change in what that calls or imports, give False.
    cache_dir
        Where models' profiles are kept between runs, and shared by the processes of a run; also
        which architectures are proved with random weights: of others with the same graph only
        their own weights are proved then. Default ``out_dir/profiles``. Without either each worker
        of your own ``executor`` profiles the models that it needs.
    memory_limit
        How many bytes the prepared models may take in each process: weights, profiles and moments.
        The two models of a pair must fit. With ``out_dir`` pairs are then fused in an order that
        prepares few models twice. Results come in the order of ``pairs`` all the same.
    example_inputs, device, labels
        As for :func:`clafusion.fuse`. With labels each result has accuracy and loss of the fused
        model, of both models and of the two together.
    progress
        Called with the numbers of pairs that are done and of all pairs.
    overrides
        Any field of ``config``, as for :func:`clafusion.fuse`.

    Returns
    -------
    iterator of PairResult
        In the order of ``pairs``. Work goes on as results are taken.

    Raises
    ------
    InputError
        An argument is unusable. This is raised at once, before any result is taken.
    ClafusionError
        A worker process died, or the executor failed otherwise. What is done is kept in
        ``out_dir``.

    Examples
    --------
    >>> models = {f.stem: ModelFile("nets.py:make", f) for f in paths}  # doctest: +SKIP
    >>> for result in fuse_pairs(models, images, out_dir="fused", executor=4):  # doctest: +SKIP
    ...     print(result.first, result.second, result.error or result.alignment.total_cost)
    """
    config = config_from(config, overrides)
    check_outputs_of_pairs(config)
    if isinstance(config.target, Like):
        raise InputError(
            "fuse_pairs does not take the target 'like', for a pair's result has the structure of "
            "a model in models: fuse each pair by clafusion.fuse([first, second], target=Like(...))"
        )
    models = _checked_models(models)
    wanted = _checked_pairs(pairs, models)
    if not isinstance(resume, bool):
        raise InputError(f"resume must be True or False; got {resume!r}")
    check_callable(progress, "progress", PAIR_PROGRESS)
    _check_executor(executor)
    if device is not None and not isinstance(executor, Executor):
        usable_device(device)  # elsewhere the workers say it
    _check_memory_limit(memory_limit)
    given = _checked_weights(weights)
    data = readable(data, models)
    if isinstance(data, GraphBatches):  # other processes have no loader
        data = list(data)
    known_labels = None if labels is None else checked_labels(labels, data)
    if example_inputs is None:
        example_inputs = example_of(data, next(iter(models.values())))
    folder = None if out_dir is None else _made(out_dir, "out_dir")
    if folder is not None:
        check_names(folder, wanted, models)
        cache_dir = folder / CACHE if cache_dir is None else cache_dir
    job = Job(
        data,
        example_inputs,
        given,
        config,
        None if device is None else str(device),
        None if cache_dir is None else str(_made(cache_dir, "cache_dir").resolve()),
        memory_limit,
        data_digest(data),
        known_labels,
    )
    store = Store(folder, models, job)
    finished = store.resume(wanted, keep=resume)
    return _Run(models, wanted, job, store, finished, executor, progress).results()


# --- arguments ----------------------------------------------------------------------------------


def _checked_models(models: Mapping[str, Model]) -> dict[str, Model]:
    if not isinstance(models, Mapping):
        raise InputError(
            f"models must be a mapping of names to models; got {type(models).__name__}"
        )
    if not models:
        raise InputError("models is empty: give at least two")
    for name, model in models.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise InputError(
                f"models: the name {name!r} is not possible, as it becomes a file's name; use "
                "letters, digits and _.,=@-"
            )
        if not isinstance(model, (nn.Module, ModelFile)):
            raise InputError(
                f"models[{name!r}] must be a torch.nn.Module or a clafusion.ModelFile; got "
                f"{kind_of(model)}"
            )
    return dict(models)


def _checked_pairs(pairs: Iterable[Pair] | str, models: Mapping[str, Model]) -> list[Pair]:
    if isinstance(pairs, str):
        if pairs != "all":
            raise InputError(f"pairs must be 'all' or a list of pairs of names; got {pairs!r}")
        names = list(models)
        return [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    is_unlisted = isinstance(pairs, Mapping) or is_number_in_array(pairs)
    if is_unlisted or not isinstance(pairs, Iterable):
        raise InputError(f"pairs must be 'all' or a list of pairs of names; got {pairs!r}")
    wanted: list[Pair] = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputError(f"pairs[{i}] must be two names; got {pair!r}")
        unknown = [name for name in pair if name not in models]
        if unknown:
            raise InputError(f"pairs[{i}] names {unknown[0]!r}, which models does not have")
        wanted.append((pair[0], pair[1]))
    if len(set(wanted)) != len(wanted):
        twice = next(pair for pair in wanted if wanted.count(pair) > 1)
        raise InputError(f"pairs must be different; {twice} is there twice")
    return wanted


def _checked_weights(weights: Sequence[float] | None) -> tuple[float, ...]:
    if isinstance(weights, Mapping):
        raise InputError(
            "weights must be two numbers, for the first and the second model of every pair; got a "
            "mapping"
        )
    return merge_weights(weights, ("first", "second"))


def _check_executor(executor: Executor | int | None) -> None:
    if isinstance(executor, bool) or not isinstance(executor, (int, Executor, type(None))):
        raise InputError(
            "executor must be None, a number of processes or a concurrent.futures.Executor; got "
            f"{type(executor).__name__}"
        )
    if isinstance(executor, int) and executor < 1:
        raise InputError(f"executor must be at least 1 process; got {executor}")


def _check_memory_limit(limit: int | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"memory_limit must be a positive number of bytes; got {limit!r}")


def _made(path: str | os.PathLike[str], argument: str) -> Path:
    found = path_of(path, argument)
    if not os.fspath(path):
        raise InputError(f"{argument} must be a directory; got {path!r}")
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{argument} {str(path)!r} cannot be made a directory: {error.strerror or error}"
        ) from error
    return found


# --- the run ------------------------------------------------------------------------------------


class _Run:
    """One call of :func:`fuse_pairs`."""

    def __init__(
        self,
        models: Mapping[str, Model],
        pairs: Sequence[Pair],
        job: Job,
        store: Store,
        finished: dict[Pair, PairResult],
        executor: Executor | int | None,
        progress: PairProgress | None,
    ) -> None:
        self._models = models
        self._pairs = pairs
        self._job = job
        self._store = store
        self._finished = finished
        self._count = len(finished)
        self._executor = executor
        self._progress = progress

    def results(self) -> Iterator[PairResult]:
        """Yield the results in the order of the pairs; fuse pairs until the next one is done."""
        left = [pair for pair in self._pairs if pair not in self._finished]
        self._report()
        is_here = self._executor is None or self._executor == 1
        with closing(self._here(left) if is_here else self._elsewhere(left)) as work:
            for pair in self._pairs:
                while pair not in self._finished:
                    next(work)
                yield self._finished.pop(pair)

    def _here(self, left: Sequence[Pair]) -> Generator[None, None, None]:
        """Fuse the pairs one after another in this process."""
        worker = Worker(self._job)
        scheduler = Scheduler(left)
        reorder = self._job.memory_limit is not None and self._store.is_on_disk
        while scheduler.left:
            pair = scheduler.next(worker.prepared) if reorder else next(iter(scheduler.left))
            outcome = worker.fuse(pair, self._models.__getitem__)
            for name in scheduler.done(pair):
                worker.prepared.pop(name, None)
            self._finish(pair, outcome)
            yield

    def _elsewhere(self, left: Sequence[Pair]) -> Generator[None, None, None]:
        """Fuse the pairs in the workers of an executor."""
        futures: dict[Future[Any], list[Pair]] = {}
        with ExitStack() as stack:
            job, executor, spill = self._job, self._executor, None
            if isinstance(executor, int):
                # What a task carries goes through a pipe, and a write of more than a pipe holds
                # would wait for ever for a worker that has died. So it is spilled.
                spill = stack.enter_context(
                    TemporaryDirectory(prefix="clafusion-", ignore_cleanup_errors=True)
                )
                if job.cache_dir is None:
                    job = replace(job, cache_dir=spill)
            names = dict.fromkeys(chain.from_iterable(left))
            models = packed_models({name: self._models[name] for name in names}, spill)
            sent = packed_job(job, spill)
            if isinstance(executor, int):
                assert spill is not None
                executor = stack.enter_context(worker_processes(executor, spill))
            else:
                stack.callback(lambda: [future.cancel() for future in futures])
            assert executor is not None, "without one the pairs are fused here"
            if job.cache_dir is not None:  # no worker need profile what another one has
                for name, model in models.items():
                    futures[self._submit(executor, prepare_model_task, sent, name, model)] = []
                for _ in self._ended(futures):
                    pass
            for task in split_into_tasks(left):
                of_task = {name: models[name] for name in chain.from_iterable(task)}
                futures[self._submit(executor, fuse_pairs_task, sent, of_task, task)] = task
            for task, outcomes in self._ended(futures):
                for pair, outcome in zip(task, outcomes_of(outcomes), strict=True):
                    self._finish(pair, outcome)
                    yield

    def _submit(self, executor: Executor, task: Callable[..., Any], *given: Any) -> Future[Any]:
        try:
            with block_sigint() if isinstance(self._executor, int) else nullcontext():
                return executor.submit(task, *given)
        except Exception as error:
            raise self._executor_error(error) from error

    def _ended(self, futures: dict[Future[Any], list[Pair]]) -> Iterator[tuple[list[Pair], Any]]:
        """Yield each task and what it returned when it ends."""
        while futures:
            ended, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in ended:
                task = futures.pop(future)
                try:
                    returned = future.result()
                except Exception as error:  # what goes wrong with a pair is in its outcome
                    raise self._executor_error(error) from error
                yield task, returned

    def _executor_error(self, error: Exception) -> ClafusionError:
        """Return the error for an executor that failed."""
        return ClafusionError(
            (
                "a worker process died, perhaps for lack of memory, or because the script that "
                "started it has no 'if __name__ == \"__main__\":'; "
                if isinstance(error, BrokenExecutor)
                else f"the executor failed ({one_line(error, most=None)}); "
            )
            + f"{self._count} of {len(self._pairs)} pairs are done. Call again to go on"
            + ("" if self._store.is_on_disk else " (with out_dir, what is done is kept)")
        )

    def _finish(self, pair: Pair, outcome: Outcome) -> None:
        """Store a pair's outcome, and keep its result until its turn comes."""
        result = self._finished[pair] = self._store.add(pair, outcome)
        for text, category in zip(result.warnings, outcome.categories, strict=True):
            warn(f"{label(pair[0])} and {label(pair[1])}: {text}", category)
        self._count += 1
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._count, len(self._pairs))
