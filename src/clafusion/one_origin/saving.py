"""A merged model -> a file of weights with a record, or a Hugging Face directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clafusion.errors import InputError, check_type
from clafusion.interop.huggingface import tokens_directory
from clafusion.interop.model_card import merge_card
from clafusion.interop.programs import PROGRAM, save_program
from clafusion.interop.rebuilding import (
    Architecture,
    of_transformers,
    program_beside,
    program_path,
)
from clafusion.interop.records import METADATA, check_companions, parent_facts, recording
from clafusion.interop.saving import save_directory
from clafusion.weights.atomic import check_output, path_of, removed_on_error
from clafusion.weights.digests import versions
from clafusion.weights.factories import origin_of
from clafusion.weights.state_files import WRITABLE, save_model

if TYPE_CHECKING:
    from clafusion.one_origin.result import MergeResult

__all__ = ["save_merged"]


def save_merged(
    result: MergeResult,
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    command: str | None = None,
) -> None:
    """Write what :meth:`clafusion.MergeResult.save` says."""
    path = path_of(path, "path")
    check_type(command, (str, type(None)), "command", "text")
    facts = _facts(result)
    if not path.name.lower().endswith((*WRITABLE, PROGRAM)):
        save_directory(
            result.model,
            path,
            tokens_directory(result.base),
            merge_card(type(result.model).__name__, facts, command),
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
        return
    check_output(path, (*WRITABLE, PROGRAM), "path")
    check_companions(path, "path")
    made = {"command": command, "seconds": dict(result.timings)}
    if path.name.lower().endswith(PROGRAM):
        record = {"architecture": Architecture("program", path.name).to_dict(), **facts}
        with recording(record | made, path):
            _save_program(result, path, dtype)
        return
    with removed_on_error(program_path(path)):
        record = {"architecture": _architecture(result, path).to_dict(), **facts}
        metadata = {METADATA: json.dumps(record, allow_nan=False)}
        with recording(record | made, path):
            save_model(result.model, path, dtype=dtype, metadata=metadata)


def _save_program(result: MergeResult, path: Path, dtype: str | torch.dtype | None) -> None:
    if dtype is not None:
        raise InputError(
            f"dtype={str(dtype)!r} is for files of weights; {str(path)!r} is a program, which "
            "computes in the network's own type"
        )
    if result.example is None:
        raise InputError(
            f"{str(path)!r} would be an exported program, and there are no inputs to export the "
            "network with: give clafusion.merge data or example_inputs, or give a file of weights "
            f"({', '.join(WRITABLE)})"
        )
    save_program(result.model, *result.example, path)


def _facts(result: MergeResult) -> dict[str, Any]:
    """Return what depends on the merge alone."""
    return {
        "base": parent_facts(result.base),
        "parents": [
            {
                "name": name,
                "weight": weight,
                "distance": result.distances[name],
                **parent_facts(model),
            }
            for (name, model), weight in zip(result.models.items(), result.weights, strict=True)
        ],
        "settings": result.config.to_dict(),
        "taken": result.taken,
        "data": result.data_hash,
        "versions": versions(),
        "assessment": None if result.assessment is None else result.assessment.to_dict(),
    }


def _architecture(result: MergeResult, path: Path) -> Architecture:
    """Return what builds the network again; an exported program is written for a plain module."""
    base = result.base
    origin = origin_of(base)
    if origin is not None:
        return Architecture("factory", origin.factory)
    found = of_transformers(base)
    return found or program_beside(path, result.model, result.example, "merged")
