"""What a network takes of a batch of data."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.interop.huggingface import ModelDirectory, input_names, is_of_transformers
from clafusion.interop.torch_geometric import graph_batches
from clafusion.profiling.batches import Data, first_batch
from clafusion.profiling.graphs import is_graph
from clafusion.tracing.graphs import EDGES
from clafusion.weights.factories import Model

__all__ = ["example_of", "readable"]

_ALIKE = 0.85  # from 0 to 1: names that are more alike than this are one name, misspelt


def readable(data: Data, models: Mapping[str, Any]) -> Data:
    """Return data as stages read it: graphs as batches of inputs by name, all else as it is."""
    found = graph_batches(data, next(iter(models.values()), None))
    return data if found is None else found


def example_of(data: Data, model: Model | nn.Module) -> Any:
    """Return inputs to trace a model with: the first batch, of a mapping what the model takes.

    What a table has beside the inputs, such as the rows' numbers, is left out by its name. Of
    graphs it is the first batch with edges, along which a graph network is traced.
    """
    found = first_batch(data)
    if isinstance(found, Mapping) and is_graph(found) and not _has_edges(found):
        found = next((one for one in data if _has_edges(one)), found)
    is_known = isinstance(model, ModelDirectory) or (
        isinstance(model, nn.Module) and is_of_transformers(model)
    )
    if not isinstance(found, Mapping):
        if is_known:
            _refuse_masks_by_place(data)
        return found
    names: Collection[str] = found
    if isinstance(model, ModelDirectory):
        names = input_names(Path(model.path))
    elif isinstance(model, nn.Module):
        known = inspect.signature(model.forward).parameters
        takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
        names = found if takes_all and not is_of_transformers(model) else known
    if is_known:
        _refuse_misspelt(found, names)
    return {name: one for name, one in found.items() if name in names} or found


def _has_edges(batch: Any) -> bool:
    return is_graph(batch) and bool(batch[EDGES].numel())


def _refuse_masks_by_place(data: Data) -> None:
    """Refuse batches ``(tokens, mask, ...)``, of which the mask would be taken for labels."""
    if isinstance(data, Tensor):
        return
    for batch in data:
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            tokens, mask = batch[:2]
            if (
                isinstance(tokens, Tensor)
                and isinstance(mask, Tensor)
                and tokens.shape == mask.shape
                and tokens.dim() > 1
                and bool(((mask == 0) | (mask == 1)).all())
            ):
                raise InputError(
                    "the batches of data are tuples, of which only the first entry is an input, "
                    "and the second looks like an attention mask: give mappings, as "
                    "{'input_ids': tokens, 'attention_mask': mask}"
                )
        return


def _refuse_misspelt(batch: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse an entry that the model does not take, and whose name is nearly one that it takes."""
    for name in batch:
        near = get_close_matches(name, names, 1, _ALIKE)
        if name not in names and near and near[0] not in batch:
            raise InputError(
                f"data has {name!r}, which the model does not take; is it {near[0]!r}?"
            )
