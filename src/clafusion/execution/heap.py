"""How much memory this process holds, what of it is kept, and what goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["WHILE_TRACING", "freed_memory", "give_back", "held_by_process", "held_now"]

_MUCH = 1 << 30  # bytes that a process holds: of less nothing is given back after a stage
WHILE_TRACING = 1 << 29
"""The same within a trace, which comes once, and makes and frees all weights several times."""

_FROM_SYSTEM, _FREE_AT_END = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
# Bytes. With more the heap held several freed values of one size: 0.3 to 0.7 GB of large networks.
_KEPT = {_FROM_SYSTEM: 1 << 25, _FREE_AT_END: 1 << 27}
_SPARED = {_FROM_SYSTEM: 1 << 20, _FREE_AT_END: 1 << 20}
_AFTERWARDS = {_FROM_SYSTEM: 1 << 25, _FREE_AT_END: 1 << 26}  # to which glibc itself comes
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_open = {True: 0, False: 0}  # contexts that keep memory, and that spare it
_lock = threading.Lock()


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


@contextmanager
def freed_memory(*, stays: bool) -> Iterator[None]:
    """Keep memory that is freed within the context for what is made next, or give it back at once.

    Layer by layer a network makes and frees values of the same sizes. By itself glibc takes those
    that are larger than any freed so far from the system one by one, and gives the end of its heap
    back as soon as twice that size is free. The system clears every page before it hands it out
    again, which may take longer than to fill it: a convolution of 256 images took twice as long. So
    values of up to 32 MB and up to 128 MB at the heap's end stay, unless there is a limit to what
    is held: where one context says so, all give it back. What is free between values stays until
    :func:`give_back`. Nothing happens with other allocators, nor where the user has set glibc's by
    its environment variables (mallopt(3)).
    """
    _count(stays, 1)
    try:
        yield
    finally:
        _count(stays, -1)


def _count(stays: bool, more: int) -> None:
    """Count a context that opens or ends, and tell the allocator."""
    with _lock:
        _open[stays] += more
        _set_allocator(_SPARED if _open[False] else _KEPT if _open[True] else _AFTERWARDS)


def _set_allocator(thresholds: Mapping[int, int]) -> None:
    if not sys.platform.startswith("linux") or any(map(os.environ.get, _SET_BY_USER)):
        return
    with suppress(OSError, AttributeError):  # musl has no such function
        for name, size in thresholds.items():
            ctypes.CDLL(None).mallopt(name, size)


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
