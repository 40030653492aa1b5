"""Worker processes of this machine that end with their parent, and at once when it stops.

The executor schedules. Here is only what :class:`concurrent.futures.ProcessPoolExecutor` does not
do. Its workers receive a terminal's Ctrl-C even while they import, finish tasks whose results
nobody takes, and stay for ever if the parent is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import torch

from clafusion._native import set_num_threads

__all__ = ["block_sigint", "stoppable", "worker_processes"]

_GRACE = 5.0  # seconds that a worker has to end after it was told to


class _Spawning(SpawnContext):
    """Spawns the workers, for forked ones inherit locks of running threads, and lists them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *given: Any, **named: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = SpawnProcess(*given, **named)
        self.started.append(process)
        return process


@contextmanager
def worker_processes(count: int, scratch: str) -> Iterator[Executor]:
    """Yield an executor of ``count`` processes of this machine; leave none running afterwards.

    The processes share the cores. They remove the folder ``scratch`` if the parent is killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = _Spawning()
    pool = ProcessPoolExecutor(
        count,
        mp_context=context,
        initializer=_start_worker,
        initargs=(max(1, (cores or 1) // count), scratch),
    )
    try:
        yield pool
    except BaseException:  # nobody takes what they are working on
        pool.shutdown(wait=False, cancel_futures=True)
        running = [one for one in context.started if one.pid is not None]
        try:
            for one in running:
                one.terminate()
            end = time.monotonic() + _GRACE
            for one in running:
                wait([one.sentinel], max(0.0, end - time.monotonic()))
        finally:
            for one in running:
                one.kill()
        raise
    pool.shutdown()


@contextmanager
def block_sigint() -> Iterator[None]:
    """Block SIGINT for processes that start in here, even while they import.

    A terminal sends Ctrl-C to all processes, but the parent decides whether they stop.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _State:
    """Whether this process works; while it waits or sends it must not stop: pipes would break."""

    at_work = False
    is_to_stop = False

    @classmethod
    def stop(cls, *_: Any) -> None:
        cls.is_to_stop = True
        if cls.at_work:
            raise SystemExit(1)


@contextmanager
def stoppable() -> Iterator[None]:
    """Allow the parent to stop this process in here. Elsewhere it stops at the next such place."""
    _State.at_work = True
    try:
        if _State.is_to_stop:
            raise SystemExit(1)
        yield
    finally:
        _State.at_work = False


def _start_worker(threads: int, scratch: str) -> None:
    signal.signal(signal.SIGTERM, _State.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where there are no signal masks
    threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True).start()
    torch.set_num_threads(threads)
    set_num_threads(threads)


def _end_with_parent(scratch: str) -> None:
    """End this process when its parent was killed, whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)
