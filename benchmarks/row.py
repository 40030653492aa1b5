"""What a benchmark is: a peer and ours, side by side, with answers that must agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_REST = 0.1  # seconds


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    name
        The work and the peer, as the table shows them.
    peer, ours
        Do the work once and return the answer.
    check
        Asserts that two answers ``(peer's, ours)`` agree.
    target
        The least ratio of the peer's time to ours.
    peer_share
        The part of the work that the peer does, where all of it would take too long: its time
        is divided by it. The name says so.
    note
        Called after the timing with our median seconds; one more line for the table.
    """

    name: str
    peer: Callable[[], Any]
    ours: Callable[[], Any]
    check: Callable[[Any, Any], None]
    target: float
    peer_share: float = 1.0
    note: Callable[[float], str] | None = None


@dataclass(frozen=True)
class Ratio:
    """A measured row: median seconds over interleaved runs."""

    name: str
    peer_seconds: float
    our_seconds: float
    ratio: float
    target: float
    runs: int
    note: str


def wall_clock(work: Callable[[], Any]) -> float:
    """Run once and return the seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(
    row: Row,
    *,
    seconds: float = 6.0,
    least: int = 3,
    most: int = 30,
    clock: Callable[[Callable[[], Any]], float] = wall_clock,
) -> Ratio:
    """Check the answers, then time both in turns: what slows the machine down slows down both.

    Before each run the machine rests: the threads of BLAS and OpenMP go on spinning for a while
    after their last call and would take the next one's processors.
    """
    started = time.perf_counter()
    row.check(row.peer(), row.ours())
    both = time.perf_counter() - started
    runs = max(least, min(most, int(seconds / both)))
    peer_times, our_times = [], []
    for _ in range(runs):
        for work, times in ((row.peer, peer_times), (row.ours, our_times)):
            time.sleep(_REST)
            times.append(clock(work))
    peer = statistics.median(peer_times) / row.peer_share
    ours = statistics.median(our_times)
    note = "" if row.note is None else row.note(ours)
    return Ratio(row.name, peer, ours, peer / ours, row.target, runs, note)
