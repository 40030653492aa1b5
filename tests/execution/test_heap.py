"""Memory that is free stays while a stage runs, or goes back to the system."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from clafusion.execution import heap

with_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators keep what they keep"
)
_HELD = """
import torch
from clafusion.execution.heap import freed_memory, held_now

def held(stays):  # more than before, of values that are gone
    before = held_now()
    with freed_memory(stays=stays):
        values = [torch.ones(5_000_000) for _ in range(5)]  # of 20 MB
        del values
        return held_now() - before

torch.ones(10)
print(held(False), held(True))
with freed_memory(stays=False):
    print(held(True))
"""


def _numbers(script, **environment):
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(one) for one in ran.stdout.split()]


@with_glibc
def test_freed_memory_stays_or_goes_back_where_one_context_says_so():
    spared, kept, both = _numbers(_HELD)
    assert spared < 40e6
    assert kept > 60e6
    assert both < 40e6


@with_glibc
def test_a_users_own_settings_of_the_allocator_stay():
    assert max(_numbers(_HELD, MALLOC_MMAP_THRESHOLD_="1048576")) < 40e6


def test_a_context_that_fails_is_closed():
    with pytest.raises(ZeroDivisionError), heap.freed_memory(stays=True):
        _ = 1 / 0
    assert heap._open == {True: 0, False: 0}


@with_glibc
def test_memory_between_values_that_stay_is_given_back():
    size = 100_000  # bytes: the C library gets them from its heap
    values = [torch.ones(size, dtype=torch.uint8) for _ in range(1000)]
    kept = values[::2]
    del values
    before = heap.held_now()
    heap.give_back(0)
    assert before - heap.held_now() > 200 * size
    assert all(bool(one.all()) for one in kept)


def test_little_memory_stays_where_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr("clafusion.execution.heap.held_now", lambda: 1000)
    monkeypatch.setattr("ctypes.CDLL", lambda _: asked.append(True))
    heap.give_back()
    assert not asked
    heap.give_back(999)
    assert asked
