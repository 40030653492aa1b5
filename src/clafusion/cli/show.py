"""What commands show: progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "QUIET",
    "TYPED",
    "pair_progress",
    "print_json",
    "print_line",
    "print_text",
    "progress",
    "say",
    "typed_command",
]

TYPED: ContextVar[tuple[str, ...]] = ContextVar("TYPED", default=())
"""What was typed after the program's name."""
QUIET: ContextVar[bool] = ContextVar("QUIET", default=False)
"""Whether only errors, warnings and JSON are printed."""
_BETWEEN_LINES = 60.0  # seconds
_LEAST_DONE = 0.1  # of a stage, before its own rate tells what is left


def typed_command() -> str | None:
    """Return the command that runs, as for a shell; None outside of the command line."""
    typed = TYPED.get()
    return shlex.join(("clafusion", *typed)) if typed else None


class _Work:
    """What is done of each stage, of which the whole is known beforehand, and what is left.

    Parameters
    ----------
    expected
        Each stage's whole, in order.
    calibration
        How long an input takes the calibration, relative to profiling it.
    """

    def __init__(self, expected: Mapping[str, int], calibration: float) -> None:
        self.whole, self._once = dict(expected), dict(expected)
        self.done = dict.fromkeys(self.whole, 0)
        self._calibration = calibration
        self._last: dict[str, int] = {}
        self._started = {stage: time.monotonic() for stage in [*self.whole][:1]}
        self._ended: dict[str, float] = {}

    def report(self, stage: str, done: int) -> None:
        """Take what a stage reports; stages before it have ended."""
        now = time.monotonic()
        last = self._last.get(stage, 0)
        if stage not in self.whole:
            self.whole[stage], self.done[stage] = done, 0
        elif done < last:  # it comes again, as for a further model
            self.whole[stage] += self._once[stage]
            self._ended.pop(stage, None)
            last = 0
        self.done[stage] += done - last
        self._last[stage] = done
        self.whole[stage] = max(self.whole[stage], self.done[stage])
        order = [*self.whole]
        place = order.index(stage)
        for earlier in order[:place]:
            self.done[earlier] = self.whole[earlier]
            self._started.setdefault(earlier, now)
            self._ended.setdefault(earlier, now)
        self._started.setdefault(stage, now)
        if self.done[stage] == self.whole[stage]:
            self._ended.setdefault(stage, now)
            for later in order[place + 1 : place + 2]:
                self._started.setdefault(later, now)

    def left(self, stage: str) -> float | None:
        """Return the seconds that a stage still takes; None where nothing tells.

        The first inputs of a stage take longer than the others, because they bear its start.
        So nothing is told before a tenth is done. Calibrations have a rate known beforehand,
        which the measured one replaces as the stage goes on: if ``f`` of it is done after ``t``
        seconds, and a whole was expected to take ``e``, then ``(1 - f) (t + (1 - f) e)`` are left.
        """
        if stage in self._ended or stage not in self._started:
            return None
        passed = time.monotonic() - self._started[stage]
        done = self.done[stage] / self.whole[stage]
        expected = self._expected(stage)
        if expected is None:
            return passed * (1 - done) / done if done >= _LEAST_DONE else None
        if done < _LEAST_DONE and passed >= expected:
            return None  # the guess was wrong, and nothing better is known
        if not done:
            return expected - passed
        return (1 - done) * (passed + (1 - done) * expected)

    def _expected(self, stage: str) -> float | None:
        """Return the seconds that a stage was expected to take; None without a rate."""
        if stage != "calibrate" or "profile" not in self._ended or not self._calibration:
            return None
        profiled = self._ended["profile"] - self._started["profile"]
        return profiled / self.whole["profile"] * self._calibration * self.whole[stage]

    def line(self, stage: str) -> str:
        """Return a stage's progress in words."""
        left = self.left(stage)
        more = "" if left is None else f", about {_duration(left)} left"
        return f"{stage} {self.done[stage]} of {self.whole[stage]}{more}"

    @property
    def current(self) -> str:
        """The first stage that has not ended; else the last."""
        return next((one for one in self.whole if one not in self._ended), [*self.whole][-1])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def progress(
    expected: Mapping[str, int], calibration: float = 1.0
) -> Iterator[Callable[[str, int], None] | None]:
    """Show how far the stages are, each once and from the start, and how long they still take.

    Where stderr is no terminal that is a line a minute. ``expected`` is what each stage looks at in
    all, in order; ``calibration`` how long the calibration takes for an input relative to
    profiling, by which its time is told before it starts.
    """
    if QUIET.get():
        yield None
        return
    work = _Work(expected, calibration)
    from rich.console import Console

    console = Console(stderr=True)
    with _bars(work, console) if console.is_terminal else _lines(work) as show:

        def report(stage: str, done: int) -> None:
            work.report(stage, done)
            show()

        yield report


@contextlib.contextmanager
def _lines(work: _Work) -> Iterator[Callable[[], None]]:
    """Print a line now and then."""
    told = time.monotonic()

    def show() -> None:
        nonlocal told
        if time.monotonic() - told >= _BETWEEN_LINES:
            told = time.monotonic()
            print(f"clafusion: {work.line(work.current)}", file=sys.stderr, flush=True)

    yield show


@contextlib.contextmanager
def _bars(work: _Work, console: Console) -> Iterator[Callable[[], None]]:
    """Draw a bar for each stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
    )
    with bar:
        tasks: dict[str, Any] = {}

        def show() -> None:
            for stage, whole in work.whole.items():
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=whole, left="")
                seconds = work.left(stage)
                left = "" if seconds is None else f"about {_duration(seconds)} left"
                bar.update(tasks[stage], completed=work.done[stage], total=whole, left=left)

        show()
        yield show


@contextlib.contextmanager
def pair_progress(what: str = "pairs") -> Iterator[Callable[[int, int], None] | None]:
    """Show how many pairs are done, how fast it goes and how long it will take."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal or QUIET.get():
        yield None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    started = time.monotonic()
    before: list[int] = []  # what an earlier run had done says nothing of the speed
    with bar:
        task = bar.add_task("fusing", total=None, rate="")

        def report(done: int, total: int) -> None:
            if not before:
                before.append(done)
            rate = (done - before[0]) / max(time.monotonic() - started, 1e-9)
            shown = f"{rate:.2f} {what}/s" if done > before[0] else ""
            bar.update(task, completed=done, total=total, rate=shown)

        yield report


def say(line: str) -> None:
    """Show a person at a terminal what goes on."""
    if sys.stderr.isatty() and not QUIET.get():
        print(line, file=sys.stderr)


def print_text(text: str) -> None:
    """Print a table."""
    if not QUIET.get():
        print(text, flush=True)


def print_line(name: str, value: str | Path | None) -> None:
    """Print a name and a value below a table; nothing for None."""
    if value is not None:
        print_text(f"{name:<12} {value}")


def print_json(facts: Any) -> None:
    """Print one JSON object."""
    print(json.dumps(facts, allow_nan=False))
