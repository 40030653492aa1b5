"""What a run keeps: a file of weights for each pair, and a line for each pair in results.jsonl.

A line carries a key, the hash of all that the result depends on, and the hash of the file. So a
later run resumes what is whole, and fuses what is stale, corrupt or missing again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.batch.results import Pair, PairResult, result_of
from clafusion.batch.worker import Job, Outcome
from clafusion.errors import InputError
from clafusion.interop.huggingface import ModelDirectory
from clafusion.interop.model_card import pair_card
from clafusion.interop.records import METADATA, record_of_pair
from clafusion.interop.saving import save_pair
from clafusion.weights.atomic import replacing
from clafusion.weights.digests import digest_of, structure_digest, tensors_digest, versions
from clafusion.weights.factories import Model, ModelFile, source_of
from clafusion.weights.messages import one_line
from clafusion.weights.state_files import (
    check_extra_state,
    file_digest,
    files_of,
    save_state,
    tensors_of,
    weights_digest,
)

__all__ = ["CACHE", "RESULTS", "Store", "check_names"]

RESULTS = "results.jsonl"
CACHE = "profiles"

_ENDINGS = (".safetensors", ".pt")
"""How a pair's file ends; the second where a module's extra state is no tensor."""
_OF_ALL = ("first", "second", "warnings", "models", "settings", "weights")
"""Facts of failed pairs, too."""
_KEY = 8  # letters of the settings' hash in a name, where other settings have the plain one
_LONGEST = 255 - len(".") - len(".12345678.tmp") - _KEY - len(".")  # a name, while it is written


def check_names(folder: Path, pairs: Sequence[Pair], models: Mapping[str, Model]) -> None:
    """Refuse pairs whose files cannot be written.

    Raises
    ------
    InputError
        The names are too long for a file's name, or a file would replace a model's own.
    """
    for pair in pairs:
        if len(_file_name(pair).encode()) > _LONGEST:
            raise InputError(
                f"pairs: the names {pair[0]!r} and {pair[1]!r} are too long for a file's name "
                f"together: {_LONGEST} bytes with the ending are possible"
            )
    endings = (*_ENDINGS, "")
    results = {folder.resolve() / _file_name(pair, ending) for pair in pairs for ending in endings}
    for name, model in models.items():
        files = files_of(model.path) if isinstance(model, ModelFile) else []
        files += [Path(model.path)] if isinstance(model, ModelDirectory) else []
        lost = next((one for one in files if one.resolve() in results), None)
        if lost is not None:
            raise InputError(
                f"models[{name!r}]: {str(lost)!r} would be written over by a pair's "
                "result: choose another out_dir"
            )


class Store:
    """Turns outcomes into results, and keeps them in a folder if there is a folder."""

    def __init__(self, folder: Path | None, models: Mapping[str, Model], job: Job) -> None:
        self._folder = folder
        self._models = models
        self._job = job
        self._digests: dict[str, str] = {}
        self._taken: set[str] = set()  # names of files of other settings
        self._hashes: dict[str, str | None] = {}

    @property
    def is_on_disk(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    def add(self, pair: Pair, outcome: Outcome) -> PairResult:
        """Write a pair's weights, then its line; without a folder keep the weights in memory.

        Raises
        ------
        InputError
            A file cannot be written.
        """
        facts, state = self._with_sources(pair, outcome.facts), outcome.state
        if self._folder is None:
            return result_of(facts, models=self._models, state=state)
        facts["key"], facts["settings_key"] = self._key(pair), self._settings_key
        if state is not None:
            try:
                path = self._written(self._folder, pair, facts, state)
                facts["file"], facts["sha256"] = path.name, _digest_of(path)
            except _PairError as error:
                facts = {one: facts[one] for one in (*_OF_ALL, "key", "settings_key")}
                facts["error"] = str(error)
        line = json.dumps(facts, allow_nan=False) + "\n"
        try:
            with (self._folder / RESULTS).open("a", encoding="utf-8") as lines:
                lines.write(line)
                lines.flush()
                os.fsync(lines.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write to out_dir {str(self._folder)!r}: {error.strerror or error}; "
                "what is done is kept. Call again to go on"
            ) from error
        return result_of(facts, models=self._models, folder=self._folder)

    def _with_sources(self, pair: Pair, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts with the settings, and with where both models come from."""
        known = facts.get("models", {})
        models = {
            name: {"source": source_of(self._models[name]), "sha256": self._sha256(name)}
            | known.get(name, {})
            for name in pair
        }
        settings = {"settings": self._job.config.to_dict(), "weights": list(self._job.weights)}
        return {**facts, "models": models, **settings}

    def _sha256(self, name: str) -> str | None:
        """Return the SHA-256 of a model's weights; None where they cannot be read."""
        if name not in self._hashes:
            model = self._models[name]
            try:
                self._hashes[name] = (
                    tensors_digest(tensors_of(model))
                    if isinstance(model, nn.Module)
                    else weights_digest(model.path)
                    if type(model) is ModelFile
                    else model.digest()
                )
            except (InputError, OSError):
                self._hashes[name] = None
        return self._hashes[name]

    def _written(
        self, folder: Path, pair: Pair, facts: Mapping[str, Any], state: Mapping[str, Any]
    ) -> Path:
        """Write a pair's weights: a file, or of two Hugging Face directories a directory."""
        kind = self._models[facts["structure"]]
        if isinstance(kind, ModelDirectory) and all(
            isinstance(self._models[name], ModelDirectory) for name in pair
        ):
            path = folder / self._free_name(pair, "")
            digests = {name: self._digest(name) for name in pair}
            card = pair_card(facts, digests, self._job.weights, self._job.config.to_dict())
            with _of_pair():
                save_pair(state, kind, path, card)
            return path
        with _of_pair():
            check_extra_state(state, _ENDINGS[-1])
        is_all_tensors = all(isinstance(one, Tensor) for one in state.values())
        path = folder / self._free_name(pair, _ENDINGS[0 if is_all_tensors else 1])
        record = record_of_pair(facts, self._models, self._job.data_hash)
        save_state(state, path, metadata={METADATA: json.dumps(record, allow_nan=False)})
        return path

    def resume(self, pairs: Sequence[Pair], *, keep: bool = True) -> dict[Pair, PairResult]:
        """Return the results of an earlier run that are whole, and drop the lines of the others.

        Lines of pairs that are not asked for stay as they are, and so do those of other settings,
        with their files. With ``keep=False`` no result is whole.

        Raises
        ------
        InputError
            The lines cannot be read or written.
        """
        if self._folder is None or not (self._folder / RESULTS).exists():
            return {}
        path = self._folder / RESULTS
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(
                f"out_dir: {str(path)!r} cannot be read: {error.strerror or error}; choose another "
                "out_dir"
            ) from error
        wanted = set(pairs)
        kept: dict[tuple[Pair, str], str] = {}
        whole: dict[Pair, PairResult] = {}
        for line in lines:
            try:
                facts = json.loads(line)
                pair = facts["first"], facts["second"]
                settings = str(facts["settings_key"])
                if settings != self._settings_key and facts["error"] is None:
                    self._taken.add(str(facts["file"]))
                if pair in wanted and settings == self._settings_key:
                    kept.pop((pair, settings), None)
                    whole.pop(pair, None)
                    if not (keep and self._is_whole(self._folder, pair, facts)):
                        continue
                    whole[pair] = _checked(
                        result_of(facts, models=self._models, folder=self._folder, resumed=True)
                    )
                kept[pair, settings] = line
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that was cut short, or that this version did not write
        with replacing(path, "out_dir") as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")
        return whole

    def _is_whole(self, folder: Path, pair: Pair, facts: Mapping[str, Any]) -> bool:
        if facts["error"] is not None or facts["key"] != self._key(pair):
            return False
        path = folder / str(facts["file"])
        known = [name for ending in (*_ENDINGS, "") for name in self._names(pair, ending)]
        if path.name not in known or path.parent != folder or not path.exists():
            return False
        try:
            return bool(_digest_of(path) == facts["sha256"])
        except OSError:  # it may not be read, but perhaps replaced
            return False

    @property
    def _settings_key(self) -> str:
        """The hash of options and weights, in short."""
        job = self._job
        return digest_of({"config": job.config.to_dict(), "weights": job.weights})[:_KEY]

    def _names(self, pair: Pair, ending: str) -> tuple[str, str]:
        """Return the names that a pair's file may have: the plain one, and that of its settings."""
        return _file_name(pair, ending), _file_name(pair, f".{self._settings_key}{ending}")

    def _free_name(self, pair: Pair, ending: str) -> str:
        """Return the plain name, unless other settings' result has it."""
        plain, own = self._names(pair, ending)
        return own if plain in self._taken else plain

    def _key(self, pair: Pair) -> str:
        """Return the hash of all that a pair's result depends on."""
        job = self._job
        leaves = torch.utils._pytree.tree_leaves(job.example_inputs)
        labels = {} if job.labels is None else {"labels": tensors_digest({"labels": job.labels})}
        return digest_of(
            {
                **labels,
                **versions(),
                "models": [self._digest(name) for name in pair],
                "data": job.data_hash,
                "example": tensors_digest({str(i): one for i, one in enumerate(leaves)}),
                "weights": job.weights,
                "config": job.config.to_dict(),
                "device": None if job.device is None else torch.device(job.device).type,
            }
        )

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            model = self._models[name]
            try:
                self._digests[name] = (
                    model.digest()
                    if isinstance(model, ModelFile)
                    else digest_of([structure_digest(model), tensors_digest(tensors_of(model))])
                )
            except (InputError, OSError) as error:  # the pair itself reports it
                self._digests[name] = one_line(error, most=None)
        return self._digests[name]


class _PairError(Exception):
    """A pair cannot be written; the others can."""


@contextmanager
def _of_pair() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise _PairError(str(error)) from error


def _digest_of(path: Path) -> str:
    """Return the hash of a pair's file or directory."""
    return ModelDirectory(str(path), path).digest() if path.is_dir() else file_digest(path)


def _file_name(pair: Pair, ending: str = _ENDINGS[0]) -> str:
    return f"{pair[0]}+{pair[1]}{ending}"


def _checked(result: PairResult) -> PairResult:
    """Return a result that was read from a line if its parts fit each other.

    Raises
    ------
    ValueError
        They do not.
    """
    sizes = len(result.deep_layers), len(result.shallow_layers)
    alignment = result.alignment
    if alignment is None or not (
        alignment.cost.shape == sizes
        and len(alignment.deep_to_shallow) == sizes[0]
        and isinstance(alignment.total_cost, float)
        and result.deep in (result.first, result.second)
        and len(result.layer_weights) in sizes
        and all(len(one) == 2 for one in result.layer_weights)
        and all(isinstance(one, str) for one in (*result.deep_layers, *result.shallow_layers))
        and all(isinstance(one, str) for one in result.warnings)
        and isinstance(result.distance, float)
    ):
        raise ValueError("this version did not write the line")
    return result
