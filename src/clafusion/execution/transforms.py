"""Levels of torch.func's transforms (vmap, grad), which a graph may enter as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["transforms_undone"]


@contextmanager
def transforms_undone() -> Iterator[None]:
    """Leave those levels that what runs in here has entered, also where it fails.

    An exported graph enters a level by one node and leaves it by a later one. If an error comes
    between the two, the whole process would stay within.
    """
    levels = torch._C._functorch
    before = levels.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if levels.get_dynamic_layer_stack_depth() > before:
            levels.pop_dynamic_layer_stack_and_undo_to_depth(before)
