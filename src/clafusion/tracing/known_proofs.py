"""What a proof with random weights is a proof of, so that another process need not repeat it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, fx

from clafusion.tracing.architecture import digest_of_values
from clafusion.tracing.model import ParameterUse, TracedModel
from clafusion.tracing.moves import Moves

__all__ = ["KnownProofs", "proof_key"]


class KnownProofs(Protocol):
    """Keys of what random weights have stood; see :func:`proof_key`."""

    def __contains__(self, key: object) -> bool:
        """Say whether a key is known."""
        ...

    def add(self, key: str) -> None:
        """Keep a key."""
        ...


def proof_key(traced: TracedModel, inputs: tuple[Tensor, ...], seed: int, *several: Moves) -> str:
    """Return the hash of all on which it depends whether moves of random weights show in outputs.

    That is the graph, what is not redrawn (the inputs, buffers and constants), the shapes of what
    is, the seed of both, and the moves themselves, however an analysis came to them.

    Parameters
    ----------
    traced
        The traced model, whose own parameters do not enter.
    inputs
        The inputs of the trial.
    seed
        The seed of the random weights.
    several
        The moves.
    """
    digest = hashlib.sha256()

    def add(*facts: object) -> None:
        digest.update(repr(facts).encode())

    for path, module in traced.module.named_modules():
        if isinstance(module, fx.GraphModule):
            add(path, str(module.graph))
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            add(path, name, _facts(value))
    add(traced.placeholders, traced.keywords, sorted(traced.layouts.items()), seed)
    add(torch.get_default_dtype(), [_facts(one) for one in inputs])
    trained = dict(traced.model.named_parameters())
    for name, value in sorted(traced.state().items()):
        form = tuple(value.shape), value.dtype, value.device.type
        add(name, form if name in trained else _facts(value))
    for moves in several:
        for name, steps in sorted(moves.items()):
            for step in steps:
                add(name, [(_use(m.target), _use(m.source), _indices(m.indices)) for m in step])
        add("end")
    return digest.hexdigest()


def _facts(value: Tensor | None) -> object:
    if value is None:
        return None
    return tuple(value.shape), value.dtype, value.device.type, digest_of_values(value)


def _use(use: ParameterUse) -> object:
    return use.parameter, tuple(use.size), tuple(use.stride), use.offset


def _indices(indices: Mapping[int, Tensor]) -> object:
    return [(axis, digest_of_values(index)) for axis, index in sorted(indices.items())]
