"""Profiles kept on disk: a model is proved and profiled once for all runs.

An entry is one safetensors file. Its name is the hash of all that its contents depend on, so a
stale entry is not read. It holds a hash of its contents, so a corrupt entry is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clafusion.errors import InputError
from clafusion.profiling.moments import BatchMoments
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.model import TracedModel
from clafusion.weights.atomic import replacing
from clafusion.weights.digests import digest_of, tensors_digest, versions

__all__ = ["profile_key", "read_profile", "write_profile"]

_LOG = logging.getLogger("clafusion")


def profile_key(model: TracedModel, options: Mapping[str, Any], data_digest: str) -> str:
    """Return the hash of all that a model's profile depends on.

    Parameters
    ----------
    model
        The traced model.
    options
        The options on which a profile depends, as plain data.
    data_digest
        The hash of the data.
    """
    return digest_of(
        {
            **versions(),
            "weights": tensors_digest(model.state()),
            "code": hashlib.sha256(str(model.module.graph).encode()).hexdigest(),
            "layers": [layer.nodes for layer in model.layers],
            "data": data_digest,
            "example": tensors_digest({str(i): x for i, x in enumerate(model.example_inputs)}),
            "options": options,
            "device": model.device.type,
        }
    )


def write_profile(folder: Path, key: str, profile: ModelProfile) -> None:
    """Write an entry. A failure is logged and not raised, for work can go on without the entry."""
    path = _path(folder, key)
    tensors, places = _tensors_of(profile)
    facts: dict[str, Any] = {
        "key": key,
        "features": list(profile.features),
        "places": places,
        "num_samples": profile.num_samples,
        "num_inputs": profile.num_inputs,
        "data_key": profile.data_key,
        "importance": len(profile.importance),
        "moments": profile.moments is not None,
        "batch_sizes": list(profile.batch_sizes),
        "of_structure": sorted(map(list, profile.of_structure)),
    }
    facts["digest"] = digest_of([facts, tensors_digest(tensors)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, "cache entry") as temporary:
            save_file(tensors, temporary, metadata={"clafusion": json.dumps(facts)})
    except (OSError, InputError, SafetensorError) as error:
        _LOG.warning("cache entry %s cannot be written: %s", path, error)


def read_profile(folder: Path, key: str, model: TracedModel) -> ModelProfile | None:
    """Return a model's profile from its entry; None where there is no whole entry."""
    path = _path(folder, key)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["clafusion"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = facts.pop("digest")
        if facts["key"] != key or digest != digest_of([facts, tensors_digest(tensors)]):
            raise ValueError("its contents do not have the hash that it states")
        return _profile_of(model, facts, tensors)
    except Exception as error:  # whatever is wrong with it, it can be made again
        _LOG.warning("cache entry %s is corrupt and is made again: %s", path, error)
        return None


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:40]}.safetensors"


# --- profiles and tensors -----------------------------------------------------------------------


def _tensors_of(profile: ModelProfile) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """Return a profile's tensors by name, and ``[layer, index, name]`` of each place's rows."""
    tensors = {f"gram.{i}": one for i, one in enumerate(profile.grams)}
    tensors |= {f"importance.{i}": one for i, one in enumerate(profile.importance)}
    if profile.sensitivity is not None:
        tensors["sensitivity"] = profile.sensitivity
    if profile.structure is not None:
        tensors["structure"] = profile.structure
    names: dict[int, str] = {}  # places can share rows
    places = []
    for place, one in profile.rows.items():
        name = names.setdefault(id(one), f"rows.{len(names)}")
        tensors[name] = one
        places.append([*place, name])
    if profile.moments:
        for node in profile.moments[0]:  # (batches, 2, channels)
            pairs = [torch.stack(batch[node]) for batch in profile.moments]
            tensors[f"moments.{node}"] = torch.stack(pairs)
    return {name: one.detach().cpu().contiguous() for name, one in tensors.items()}, places


def _profile_of(
    model: TracedModel, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ModelProfile:
    device = model.device
    return ModelProfile(
        traced=model,
        grams=tuple(tensors[f"gram.{i}"].to(device) for i in range(len(model.layers))),
        features=tuple(facts["features"]),
        rows={(layer, i): tensors[name].to(device) for layer, i, name in facts["places"]},
        num_samples=facts["num_samples"],
        num_inputs=facts["num_inputs"],
        data_key=facts["data_key"],
        importance=tuple(tensors[f"importance.{i}"] for i in range(facts["importance"])),
        moments=_moments_of(tensors, device) if facts["moments"] else None,
        sensitivity=tensors.get("sensitivity"),
        structure=tensors.get("structure"),
        of_structure=frozenset((layer, i) for layer, i in facts["of_structure"]),
        batch_sizes=tuple(facts["batch_sizes"]),
    )


def _moments_of(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[BatchMoments, ...]:
    moments = {
        name.removeprefix("moments."): one.to(device)
        for name, one in tensors.items()
        if name.startswith("moments.")
    }
    count = max((len(one) for one in moments.values()), default=0)
    return tuple(
        {node: (one[i, 0], one[i, 1]) for node, one in moments.items()} for i in range(count)
    )
