"""What a manifest names as data -> inputs: of its pairs, and of each merge and reassembly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clafusion.batch.named_tasks import NamedTask
from clafusion.cli.entries import DataEntry
from clafusion.cli.inputs import read_data
from clafusion.cli.manifest import Manifest
from clafusion.errors import InputError
from clafusion.interop.huggingface import ModelDirectory
from clafusion.interop.vocabulary import check_alike
from clafusion.weights.factories import ModelFile

__all__ = ["DataReader", "data_of_manifest", "models_of_pairs"]


class DataReader:
    """Reads what a manifest's tasks name, and keeps the last: many tasks have the same data.

    Parameters
    ----------
    models
        The manifest's models, of which a directory says how texts become tokens.
    most
        Read at most so many samples.
    """

    def __init__(self, models: Mapping[str, ModelFile], most: int | None = None) -> None:
        self._models = models
        self._most = most
        self._last: tuple[DataEntry, tuple[str, ...], Any] | None = None

    def filled(self, task: NamedTask) -> NamedTask:
        """Return a task with its data.

        Raises
        ------
        InputError
            They cannot be read; the message names the task.
        """
        data = task.data
        try:
            if isinstance(data, DataEntry):
                return replace(task, data=self._read(data, task.models))
            if isinstance(data, Mapping):
                found = {name: self._read(one, (name,)) for name, one in data.items()}
                return replace(task, data=found)
        except InputError as error:
            raise InputError(f"the {task.kind} {task.name!r}: {error}") from error
        return task

    def _read(self, entry: DataEntry, names: tuple[str, ...]) -> Any:
        if self._last is None or self._last[:2] != (entry, names):
            models = {name: self._models[name] for name in names}
            self._last = entry, names, data_of_manifest(models, entry.settings, self._most)
        return self._last[2]


def data_of_manifest(
    models: Mapping[str, ModelFile], data: Mapping[str, Any], most: int | None = None
) -> Tensor | list[dict[str, Tensor]]:
    """Read data that a manifest names, at most so many samples.

    Raises
    ------
    InputError
        The data cannot be read, or Hugging Face directories have other tokens or labels.
    """
    folders = {
        name: Path(one.path) for name, one in models.items() if isinstance(one, ModelDirectory)
    }
    check_alike(models)
    known = ("limit", "text_column", "max_length")
    if most is not None:
        data = {**data, "limit": most}
    return read_data(
        data["file"],
        next(iter(folders.values()), None),
        {name: data.get(name) for name in ("key", "shape", "scale", "mean", "std")},
        **{name: data[name] for name in known if name in data},
        called=lambda name: f"data, {name}",
    )


def models_of_pairs(given: Manifest) -> dict[str, ModelFile]:
    """Return the models that a manifest's pairs are of, in its order."""
    if isinstance(given.pairs, str):
        return dict(given.models)
    of_pairs = set(itertools.chain.from_iterable(given.pairs))
    return {name: one for name, one in given.models.items() if name in of_pairs}
