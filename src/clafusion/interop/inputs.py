"""What a network takes of a batch of data."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from clafusion.interop.huggingface import ModelDirectory, input_names, is_of_transformers
from clafusion.profiling.batches import Data, first_batch
from clafusion.weights.factories import Model

__all__ = ["example_of"]


def example_of(data: Data, model: Model | nn.Module) -> Any:
    """Return inputs to trace a model with: the first batch, of a mapping what the model takes.

    So what a table has beside the inputs, as the rows' numbers, is left out by its name.
    """
    found = first_batch(data)
    if not isinstance(found, Mapping):
        return found
    names: Collection[str] = found
    if isinstance(model, ModelDirectory):
        names = input_names(Path(model.path))
    elif isinstance(model, nn.Module):
        known = inspect.signature(model.forward).parameters
        takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
        names = found if takes_all and not is_of_transformers(model) else known
    return {name: one for name, one in found.items() if name in names} or found
