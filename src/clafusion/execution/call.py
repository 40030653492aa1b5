"""Run modules, and list the tensors that they put out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["State", "call_model", "flatten_tensors"]

State: TypeAlias = Mapping[str, Tensor]
"""Parameters and buffers by name, as in ``Module.state_dict()``."""


def call_model(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...] = (),
    *,
    state: State | None = None,
) -> list[Tensor]:
    """Run a module itself and return its output tensors, in order.

    Parameters
    ----------
    model
        The module.
    inputs
        Its inputs.
    keywords
        The names of the inputs, where the module takes them by keyword; else empty.
    state
        Parameters and buffers to run with; default the module's own.
    """
    arguments = () if keywords else inputs
    named = dict(zip(keywords, inputs, strict=True)) if keywords else {}
    if state is None:
        return list(flatten_tensors(model(*arguments, **named)))
    outputs = torch.func.functional_call(
        model, dict(state), arguments, named, strict=False, tie_weights=True
    )
    return list(flatten_tensors(outputs))


def flatten_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nested output, in order."""
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))
