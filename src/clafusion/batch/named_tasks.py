"""Merges and reassemblies of a zoo's models, each by a name of its own: what is done is kept.

A line of ``tasks.jsonl`` carries a key, the hash of all that the result depends on, and the hash of
what was written. So a later run takes over what is whole, and does again what is stale, corrupt or
missing.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clafusion.assessment.nearness import FusionAssessment
from clafusion.config import MergeConfig, NoCalibration, ReassemblyConfig, Sensitivity
from clafusion.errors import ClafusionError, FusionWarning, InputError, warn
from clafusion.interop.huggingface import ModelDirectory
from clafusion.interop.inputs import example_of, readable
from clafusion.interop.model_card import is_model_card
from clafusion.interop.vocabulary import check_alike
from clafusion.one_origin.merge import merge
from clafusion.one_origin.networks import check_distances, check_same_entries, opened
from clafusion.one_origin.result import BASE
from clafusion.profiling.batches import data_digest
from clafusion.reassembly.reassemble import check_cuts, reassemble
from clafusion.stages import merge_weights
from clafusion.weights.atomic import replacing
from clafusion.weights.digests import digest_of, versions
from clafusion.weights.factories import ModelFile
from clafusion.weights.messages import one_line
from clafusion.weights.state_files import file_digest

__all__ = [
    "MergeTask",
    "NamedResult",
    "NamedTask",
    "ReassemblyTask",
    "TaskStore",
    "check_task",
    "task_cause",
]

TASKS = "tasks.jsonl"
_KEY = 8  # letters of the settings' hash in a name, where other settings have the plain one


@dataclass(frozen=True)
class NamedTask:
    """One network of several models, by a name that its file gets.

    Attributes
    ----------
    name
        The name.
    models
        The names of the models.
    data
        Unlabelled inputs, or None.
    """

    name: str
    models: tuple[str, ...]
    data: Any

    @property
    def kind(self) -> str:
        """``merge`` or ``reassembly``."""
        raise NotImplementedError

    @property
    def all_models(self) -> tuple[str, ...]:
        """The names of all models that it reads; of a merge the base comes first."""
        return self.models

    def facts(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        raise NotImplementedError


@dataclass(frozen=True)
class MergeTask(NamedTask):
    """A merge: the arguments of :func:`clafusion.merge`.

    ``data`` is None, or data, or for each model by its name inputs of its own task.
    """

    base: str
    weights: tuple[float, ...] | None = None
    config: MergeConfig = field(default_factory=MergeConfig)
    memory_limit: str | int | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError(f"the merge {self.name!r} has no model besides its base")
        if self.base in self.models:
            raise InputError(
                f"the merge {self.name!r} has its base {self.base!r} among its models, too"
            )
        if self.data is None and not isinstance(self.config.calibration, NoCalibration):
            raise InputError(
                f"the merge {self.name!r}: calibration={self.config.calibration.name!r} needs data"
            )
        if isinstance(self.config.method, Sensitivity) and not isinstance(self.data, Mapping):
            raise InputError(
                f"the merge {self.name!r}: method='sensitivity' needs data of each model's own task"
            )
        merge_weights(self.weights, self.models)

    @property
    def kind(self) -> str:
        """``merge``."""
        return "merge"

    @property
    def all_models(self) -> tuple[str, ...]:
        """The names of the base and the models."""
        return (self.base, *self.models)

    def facts(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        weights = list(merge_weights(self.weights, self.models))
        return {"base": self.base, "weights": weights, "settings": self.config.to_dict()}


@dataclass(frozen=True)
class ReassemblyTask(NamedTask):
    """A reassembly: the arguments of :func:`clafusion.reassemble`."""

    config: ReassemblyConfig = field(default_factory=ReassemblyConfig)

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise InputError(f"the reassembly {self.name!r} needs two models at least")
        if self.data is None:
            raise InputError(f"the reassembly {self.name!r} needs data")

    @property
    def kind(self) -> str:
        """``reassembly``."""
        return "reassembly"

    def facts(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return {"settings": self.config.to_dict()}


@dataclass(frozen=True)
class NamedResult:
    """What became of a task.

    Attributes
    ----------
    name, kind
        The task's name, and whether it was a ``merge`` or a ``reassembly``.
    models
        The models' names; of a merge the base comes first.
    error
        Why there is no network; None where there is one.
    settings
        The options as plain data.
    made_of
        Of a reassembly where the blocks come from; of a merge the models' weights.
    assessment
        How near the network comes to what the models put out together; None without data.
    seconds
        How long it took.
    warnings
        The texts of the warnings.
    path
        The file of the network, of a merge of Hugging Face directories a directory.
    resumed
        Whether an earlier run did it.
    """

    name: str
    kind: str
    models: tuple[str, ...]
    error: str | None
    settings: Mapping[str, Any]
    made_of: str
    assessment: FusionAssessment | None
    seconds: float
    warnings: tuple[str, ...]
    path: Path | None
    resumed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "models": list(self.models),
            "error": self.error,
            "settings": dict(self.settings),
            "made_of": self.made_of,
            "assessment": None if self.assessment is None else self.assessment.to_dict(),
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "path": None if self.path is None else str(self.path),
            "resumed": self.resumed,
        }


class TaskStore:
    """Does tasks one after another, and keeps what comes of them in a folder.

    Parameters
    ----------
    folder
        Where networks and lines are written.
    models
        Name -> model, for all tasks.
    device
        Where the networks run; None for where they are.
    resume
        Whether what an earlier run did is taken over.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, ModelFile],
        *,
        device: str | None = None,
        resume: bool = True,
    ) -> None:
        self._folder = folder
        self._models = models
        self._device = device
        self._resume = resume
        self._digests: dict[str, str] = {}
        self._lines: dict[tuple[str, str], dict[str, Any]] = {}
        for facts in self._read():
            self._lines[facts["name"], facts["settings_key"]] = facts

    def run(self, task: NamedTask) -> NamedResult:
        """Do a task, unless an earlier run did it with the same models, data and options.

        Raises
        ------
        InputError
            The folder cannot be written to. What goes wrong with the task itself is in its result.
        """
        key, settings_key = self._key(task), self._settings_key(task)
        known = self._lines.get((task.name, settings_key))
        if self._resume and known is not None and self._is_whole(known, key):
            return self._result(known, resumed=True)
        facts: dict[str, Any] = {
            "name": task.name,
            "kind": task.kind,
            "models": list(task.all_models),
            **task.facts(),
            "key": key,
            "settings_key": settings_key,
            "error": None,
            "made_of": "",
            "assessment": None,
            "seconds": {},
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FusionWarning)
            try:
                facts |= self._done(task, settings_key)
            except Exception as error:
                facts["error"] = one_line(error, most=None)
        facts["warnings"] = []
        for one in caught:
            text = " ".join(str(one.message).split())
            if issubclass(one.category, FusionWarning):
                facts["warnings"].append(text)
                warn(f"the {task.kind} {task.name!r}: {text}", one.category)
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        self._lines[task.name, settings_key] = facts
        self._write()
        return self._result(facts, resumed=False)

    def _done(self, task: NamedTask, settings_key: str) -> dict[str, Any]:
        """Make the network, write it, and return what is to be told of it."""
        models = {name: self._models[name] for name in task.models}
        path = self._folder / self._free_name(task, settings_key)
        lost = [name for name, one in self._models.items() if _is_same(path, Path(one.path))]
        if lost:
            raise InputError(
                f"{str(path)!r} would be written over model {lost[0]!r}: choose another name, or "
                "another directory for the results"
            )
        if isinstance(task, MergeTask):
            merged = merge(
                self._models[task.base],
                models,
                task.data,
                task.weights,
                task.config,
                device=self._device,
                memory_limit=task.memory_limit,
            )
            if path.is_dir() and is_model_card(path / "README.md"):
                shutil.rmtree(path)  # which an earlier merge wrote
            merged.save(path)
            shares = zip(merged.models, merged.weights, strict=True)
            made_of = ", ".join(f"{name} {weight:.3g}" for name, weight in shares)
            assessment, seconds = merged.assessment, merged.timings
        else:
            assert isinstance(task, ReassemblyTask)
            loaded = {name: one.load() for name, one in models.items()}
            found = reassemble(loaded, task.data, task.config, device=self._device)
            found.save(path)
            made_of, assessment, seconds = found.tried[0].text, found.assessment, found.timings
        return {
            "made_of": made_of,
            "assessment": None if assessment is None else assessment.to_dict(),
            "seconds": dict(seconds),
            "file": path.name,
            "sha256": _digest_of(path),
        }

    def _result(self, facts: Mapping[str, Any], *, resumed: bool) -> NamedResult:
        found = facts["assessment"]
        return NamedResult(
            name=facts["name"],
            kind=facts["kind"],
            models=tuple(facts["models"]),
            error=facts["error"],
            settings=facts["settings"],
            made_of=facts["made_of"],
            assessment=None if found is None else FusionAssessment.from_dict(found),
            seconds=math.fsum(facts["seconds"].values()),
            warnings=tuple(facts["warnings"]),
            path=None if facts["error"] is not None else self._folder / facts["file"],
            resumed=resumed,
        )

    # --- what is kept ---

    def _read(self) -> list[dict[str, Any]]:
        """Return the lines of an earlier run, but for those that this version did not write."""
        path = self._folder / TASKS
        if not path.exists():
            return []
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(
                f"{str(path)!r} cannot be read: {error.strerror or error}; choose another "
                "directory for the results"
            ) from error
        found = []
        for line in lines:
            try:
                facts = json.loads(line)
                self._result(facts, resumed=True)
                if isinstance(facts["name"], str) and isinstance(facts["settings_key"], str):
                    found.append(facts)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that was cut short
        return found

    def _write(self) -> None:
        """Write all lines, whole or not at all."""
        text = "".join(f"{json.dumps(one, allow_nan=False)}\n" for one in self._lines.values())
        with replacing(self._folder / TASKS, "the lines of what is done") as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _is_whole(self, facts: Mapping[str, Any], key: str) -> bool:
        if facts["error"] is not None or facts["key"] != key:
            return False
        path = self._folder / str(facts.get("file"))
        try:
            is_there = path.parent == self._folder and path.exists()
            return is_there and _digest_of(path) == facts.get("sha256")
        except OSError:  # it may not be read, but perhaps replaced
            return False

    def _free_name(self, task: NamedTask, settings_key: str) -> str:
        """Return the plain name of a task's file, unless other settings' result has it."""
        every = [self._models[name] for name in task.all_models]
        ending = ".pt2"
        if isinstance(task, MergeTask):
            is_directory = all(isinstance(one, ModelDirectory) for one in every)
            ending = "" if is_directory else ".safetensors"
        plain = f"{task.name}{ending}"
        taken = {
            facts.get("file")
            for (_, key), facts in self._lines.items()
            if key != settings_key and facts["error"] is None
        }
        return f"{task.name}.{settings_key}{ending}" if plain in taken else plain

    def _settings_key(self, task: NamedTask) -> str:
        """Return the hash of what is made of which models, in short."""
        return digest_of([task.kind, list(task.all_models), task.facts()])[:_KEY]

    def _key(self, task: NamedTask) -> str:
        """Return the hash of all that a task's result depends on."""
        return digest_of(
            {
                **versions(),
                "task": self._settings_key(task),
                "models": [self._digest(name) for name in task.all_models],
                "data": None if task.data is None else _data_digests(task.data),
                "device": None if self._device is None else torch.device(self._device).type,
            }
        )

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            try:
                self._digests[name] = self._models[name].digest()
            except (InputError, OSError) as error:  # the task itself reports it
                self._digests[name] = one_line(error, most=None)
        return self._digests[name]


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _data_digests(data: Any) -> str | dict[str, str]:
    """Return the hash of a task's data, or of each model's own."""
    if isinstance(data, Mapping):
        return {str(name): data_digest(one) for name, one in data.items()}
    return data_digest(data)


def _digest_of(path: Path) -> str:
    return ModelDirectory(str(path), path).digest() if path.is_dir() else file_digest(path)


# --- checks before anything runs ------------------------------------------------------------------


def task_cause(task: NamedTask, models: Mapping[str, ModelFile]) -> str | None:
    """Return why a task cannot be done; None where nothing speaks against it.

    See :func:`check_task`.
    """
    try:
        check_task(task, models)
    except ClafusionError as error:
        return str(error)
    return None


def check_task(task: NamedTask, models: Mapping[str, ModelFile]) -> None:
    """Refuse a task that its models do not admit; nothing is merged, stitched or proved.

    Of a merge all weights are read once: entries, shapes, labels and tokens must be those of the
    base, and the models must be near to it. Of a reassembly each model is traced: it must have
    enough places to be cut at, and all must have the same inputs and outputs. Whether blocks can be
    joined shows on data only.

    Raises
    ------
    ClafusionError
        The models do not admit it.
    """
    own = {name: models[name] for name in task.models}
    if isinstance(task, MergeTask):
        every = {BASE: models[task.base], **own}
        check_alike(every)
        networks = {name: opened(name, one) for name, one in every.items()}
        base = networks.pop(BASE)
        check_same_entries(base, networks)
        check_distances(base, networks, task.config.furthest)
        return
    assert isinstance(task, ReassemblyTask)
    data = readable(task.data, own)
    check_cuts(own, example_of(data, next(iter(own.values()))), task.config)
