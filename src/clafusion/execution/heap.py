"""How much memory this process holds, and what of it goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["WHILE_TRACING", "give_back", "held_by_process", "held_now"]

_MUCH = 1 << 30  # bytes that a process holds: of less nothing is given back after a stage
WHILE_TRACING = 1 << 29
"""The same within a trace, which comes once, and makes and frees all weights several times."""


def held_now() -> int:
    """Return the memory that this process holds, in bytes, but for files that can be read again."""
    if not sys.platform.startswith("linux"):
        return _most_held()
    resident, of_files = _pages()
    return (resident - of_files) * mmap.PAGESIZE


def held_by_process() -> tuple[int, int]:
    """Return the bytes of memory that the process holds now, and that it held at the most so far.

    Where the system does not tell one of them, it is 0.
    """
    if not sys.platform.startswith("linux"):
        return 0, _most_held()
    return _pages()[0] * mmap.PAGESIZE, _most_held()


def give_back(much: int = _MUCH) -> None:
    """Give memory that is free back to the system, in a process that holds much.

    Activations and weights are freed between values that stay. The C library keeps their memory for
    others of their size, and what is larger comes on top. Nothing happens where its allocator
    cannot do it (other ones than glibc's), nor where little is held: memory takes longer to get
    than to fill.

    Parameters
    ----------
    much
        How many bytes are much.
    """
    if held_now() > much:
        with suppress(OSError, AttributeError, TypeError):  # Windows, musl
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _pages() -> tuple[int, int]:
    """Return how many pages of memory the process holds, and how many of these are of files.

    Not by ``/proc/self/status``, where not every kernel tells them apart (gVisor's, for one).
    """
    counts = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(counts[1]), int(counts[2])


def _most_held() -> int:
    """Return the bytes that the process held at the most so far; 0 where nobody tells."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
