"""What models compute at their cuts, and how alike that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.alignment.layer_costs import cka
from clafusion.errors import InputError
from clafusion.execution.walk import Walk
from clafusion.profiling.batches import Data, in_chunks
from clafusion.profiling.gram import gram_matrix, is_constant
from clafusion.reassembly.cutting import Cut
from clafusion.tracing.model import TracedModel

__all__ = ["changes_at", "check_varied", "cut_values", "grams_of", "inputs_of", "similarity"]

_CHUNK = 125  # inputs that run at once
_LEAST_INPUTS = 3  # fewer are always alike by CKA


def inputs_of(
    model: TracedModel, data: Data, samples: int, seed: int = 0
) -> list[tuple[Tensor, ...]]:
    """Return at most so many inputs, in batches, spread over all data.

    Raises
    ------
    InputError
        There are fewer than three.
    """
    whole = list(in_chunks(data, model, None, _CHUNK, device=model.device))
    count = sum(one[0].size(0) for one in whole)
    if count < _LEAST_INPUTS:
        raise InputError(
            f"data has {count} sample(s), to which no stitch can be fitted: give at least "
            f"{_LEAST_INPUTS}, better a few hundred"
        )
    if model.static_batch is not None or count <= samples:
        return whole
    joined = [torch.cat(one) for one in zip(*whole, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:samples].sort().values
    parts = [one[chosen.to(one.device)].split(_CHUNK) for one in joined]
    return list(zip(*parts, strict=True))


@torch.no_grad()
def cut_values(
    model: TracedModel, inputs: Sequence[tuple[Tensor, ...]], nodes: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """Yield for each batch the values of some nodes."""
    for one in inputs:
        walk = Walk(model, one, model.state(), set(nodes))
        yield {name: walk.reach(name) for name in nodes}


def grams_of(
    model: TracedModel, inputs: Sequence[tuple[Tensor, ...]], cuts: Sequence[Cut]
) -> dict[str, Tensor]:
    """Return the inner products of the inputs' values at each cut."""
    names = [one.node for one in cuts]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for values in cut_values(model, inputs, names):
        for name, value in values.items():
            parts[name].append(value.flatten(1))
    return {name: gram_matrix(torch.cat(of)) for name, of in parts.items()}


def check_varied(gram: Tensor, what: str) -> None:
    """Refuse values that are the same for all inputs, of which no similarity can be said.

    Parameters
    ----------
    gram
        Their inner products.
    what
        What the values are, for the message.

    Raises
    ------
    InputError
        They do not differ.
    """
    if is_constant(gram):
        raise InputError(
            f"{what} the same for all inputs, so that nothing can be compared there: check the "
            "model and the scale of the data"
        )


def similarity(one: Sequence[Tensor], other: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return the CKA of all pairs of values, given by their inner products."""
    found: NDArray[np.float64] = cka(one, other)
    return found


def changes_at(grams: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return how much a model's values change around each of its cuts, by CKA.

    Parameters
    ----------
    grams
        The inner products of the inputs, of the values at the cuts in order, and of the outputs.

    Returns
    -------
    ndarray
        For each cut one minus the CKA with the value before, plus one minus that with the one
        behind.
    """
    alike = similarity(grams, grams)
    steps = 1 - np.diagonal(alike, 1)
    found: NDArray[np.float64] = steps[:-1] + steps[1:]
    return found
