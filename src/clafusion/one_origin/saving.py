"""A merged model -> a file of weights with a record, or a Hugging Face directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clafusion.interop.configs import config_of
from clafusion.interop.huggingface import is_of_transformers, tokens_directory
from clafusion.interop.model_card import merge_card
from clafusion.interop.rebuilding import Architecture
from clafusion.interop.records import METADATA, check_companions, parent_facts, write_record
from clafusion.interop.saving import save_directory
from clafusion.weights.atomic import check_output
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
    path = Path(path)
    facts = _facts(result)
    if not path.name.lower().endswith(WRITABLE):
        save_directory(
            result.model,
            path,
            tokens_directory(result.base),
            merge_card(type(result.model).__name__, facts, command),
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
        return
    check_output(path, WRITABLE, "path")
    check_companions(path, "path")
    record = {"architecture": _architecture(result.base).to_dict(), **facts}
    metadata = {METADATA: json.dumps(record, allow_nan=False)}
    save_model(result.model, path, dtype=dtype, metadata=metadata)
    write_record({**record, "command": command, "seconds": dict(result.timings)}, path)


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
        "data": result.data_hash,
        "versions": versions(),
        "assessment": None if result.assessment is None else result.assessment.to_dict(),
    }


def _architecture(base: nn.Module) -> Architecture:
    """Return what builds the base again: its factory, or its config."""
    origin = origin_of(base)
    if origin is not None:
        return Architecture("factory", origin.factory)
    if is_of_transformers(base):
        facts = json.loads(config_of(base).to_json_string(use_diff=False))
        return Architecture(
            "transformers", type(base).__name__, config={**facts, "_name_or_path": ""}
        )
    return Architecture("none", "the network was merged as a module, whose code builds it")
