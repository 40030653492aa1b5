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
from typing import Any

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


def typed_command() -> str | None:
    """Return the command that runs, as for a shell; None outside of the command line."""
    typed = TYPED.get()
    return shlex.join(("clafusion", *typed)) if typed else None


@contextlib.contextmanager
def progress(
    count: int, expected: Mapping[str, int]
) -> Iterator[Callable[[str, int], None] | None]:
    """Show how far the long steps are; nothing where stderr is no terminal.

    ``count`` is the number of samples, ``expected`` how many of them each stage looks at.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal or QUIET.get():
        yield None
        return
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    following = {"profile": "aligning and matching", "calibrate": "finishing"}
    with bar:
        task = bar.add_task("tracing and verifying", total=None)

        def report(stage: str, done: int) -> None:
            total = expected.get(stage, count)
            total = total if done <= total else count
            if done < total:
                bar.update(task, description=stage, completed=done, total=total)
            else:  # until the next stage reports
                bar.update(task, description=following.get(stage, stage), total=None)

        yield report


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
