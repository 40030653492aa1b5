"""Memory that is free goes back to the system."""

import platform

import pytest
import torch

from clafusion.execution import heap


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators keep what they keep"
)
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
