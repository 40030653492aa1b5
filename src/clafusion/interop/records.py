"""The record of a written result: where it comes from, and what builds its network again.

It lies beside the weights as JSON. A ``.safetensors`` file holds it, too, but for the command and
the seconds: the same fusion gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from clafusion.errors import InputError
from clafusion.interop.huggingface import directory_of
from clafusion.interop.programs import PROGRAM
from clafusion.interop.rebuilding import Architecture, program_path
from clafusion.weights.atomic import check_output, replacing
from clafusion.weights.digests import tensors_digest, versions
from clafusion.weights.factories import Model, ModelFile, origin_of
from clafusion.weights.state_files import tensors_of

if TYPE_CHECKING:
    from clafusion.results import FusionResult

__all__ = [
    "METADATA",
    "check_companions",
    "parent_facts",
    "read_record",
    "record_of",
    "record_of_pair",
    "record_path",
    "recording",
]

METADATA = "clafusion"
"""The record's name in the header of a ``.safetensors`` file."""


def record_path(path: Path) -> Path:
    """Return where the record of a file of weights lies."""
    return path.with_name(f"{path.name.removesuffix('.index.json')}.json")


def check_companions(path: Path, argument: str) -> None:
    """Refuse a file beside which its record or its program could not be written.

    Raises
    ------
    InputError
        Something that is no file has their name.
    """
    for beside in (record_path(path), program_path(path)):
        check_output(beside, (".json", PROGRAM), f"{argument}: what is written beside it,")


def record_of(result: FusionResult, architecture: Architecture) -> dict[str, Any]:
    """Return what depends on the fusion alone.

    That is parents with hashes, settings, what was taken where these leave a choice, data,
    assessment.
    """
    return {
        "architecture": architecture.to_dict(),
        "parents": [
            {"name": name, "weight": weight, **parent_facts(one.model)}
            for (name, one), weight in zip(
                result.parent_models.items(), result.weights, strict=True
            )
        ],
        "settings": result.config.to_dict(),
        "taken": result.taken,
        "data": result.data_hash,
        "versions": versions(),
        "assessment": None if result.assessment is None else result.assessment.to_dict(),
        "evaluation": None if result.evaluation is None else result.evaluation.to_dict(),
    }


def record_of_pair(
    facts: Mapping[str, Any], models: Mapping[str, Model], data_hash: str
) -> dict[str, Any]:
    """Return the same of one of many pairs: see :func:`clafusion.batch.results.result_of`."""
    parents = []
    for name, weight in zip((facts["first"], facts["second"]), facts["weights"], strict=True):
        one = models[name]
        of_file: dict[str, str | None] = dict.fromkeys(("factory", "file", "key"))
        if isinstance(one, ModelFile):
            of_file = {"factory": one.factory, "file": str(one.path), "key": one.key}
        sha256 = facts["models"][name]["sha256"]
        parents.append({"name": name, "weight": weight, **of_file, "sha256": sha256})
    return {
        "architecture": facts["architecture"],
        "parents": parents,
        "settings": facts["settings"],
        "taken": facts["taken"],
        "data": data_hash,
        "versions": versions(),
        "assessment": facts["assessment"],
        "evaluation": facts["evaluation"],
    }


@contextmanager
def recording(record: Mapping[str, Any], path: Path) -> Iterator[None]:
    """Write a record beside a file of weights, which is written in the block.

    The record gets its name after that. So there is neither one without the other: on a full disk
    the record cannot fail once the weights are written, and without the weights it is gone.

    Raises
    ------
    InputError
        Writing failed.
    """
    text = json.dumps(record, indent=1, allow_nan=False)
    with replacing(record_path(path), "path") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
        yield


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a file of weights: that beside it, else its own; None for none.

    Raises
    ------
    InputError
        The record cannot be read.
    """
    text = None
    if record_path(path).is_file():
        text = record_path(path).read_text(encoding="utf-8")
    elif path.name.lower().endswith(".safetensors"):
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(METADATA)
        except Exception:  # which reading the weights tells
            return None
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"the record of {str(path)!r} is no JSON: {error}") from error
    is_record = isinstance(found, dict) and isinstance(found.get("architecture"), dict)
    return found if is_record else None


def parent_facts(model: torch.nn.Module) -> dict[str, Any]:
    """Return where a network comes from, and the hash of its weights."""
    origin, directory = origin_of(model), directory_of(model)
    where = str(directory) if directory is not None else None if origin is None else origin.path
    return {
        "factory": None if origin is None else origin.factory,
        "file": where,
        "key": None if origin is None else origin.key,
        "class": f"{type(model).__module__}:{type(model).__qualname__}",
        "sha256": tensors_digest(tensors_of(model)),
    }
