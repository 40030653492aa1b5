"""A model made ready for any number of pairs: traced, proved and profiled once, kept on disk.

An entry of the cache is one safetensors file. Its name is the hash of all that its contents depend
on, and it carries a hash of its contents: what is stale is not found, what is corrupt is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from clafusion.errors import InputError
from clafusion.fusion import FusionConfig, profiled, traced_to_fuse
from clafusion.profiling.batches import Data
from clafusion.profiling.moments import observed_moments
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.model import TracedModel
from clafusion.tracing.trace import Architecture, architecture, traced_like
from clafusion.tracing.verify import verify_graph
from clafusion.weights.atomic import replacing
from clafusion.weights.digests import digest_of, tensors_digest, versions

__all__ = [
    "PreparedModel",
    "prepare",
]

_LOG = logging.getLogger("clafusion")

_TRACING = threading.Lock()  # torch.export changes settings of the whole process

Known: TypeAlias = "dict[Architecture, TracedModel]"

_PROFILED_BY = (
    "alignment_samples",
    "matching_rows",
    "layer_values",
    "profile_inputs",
    "importance",
    "layer_weights",
    "seed",
    "verify",
)


@dataclass(frozen=True)
class PreparedModel:
    """What every pair of a model shares.

    Attributes
    ----------
    profile
        Of the traced and proved model; with the moments for REPAIR where the calibration needs
        them.
    num_bytes
        Memory that the weights, the profile and the moments take.
    from_cache
        Whether the profile came from the disk, and with it that the model was proved.
    """

    profile: ModelProfile
    num_bytes: int
    from_cache: bool


def prepare(
    name: str,
    model: nn.Module,
    data: Data,
    example_inputs: Any,
    config: FusionConfig,
    *,
    data_hash: str,
    cache_dir: Path | None = None,
    known: Known | None = None,
) -> PreparedModel:
    """Trace a model; prove and profile it, or take that from the cache.

    The profile depends on the model, the data and the settings only, so that it is the same
    whichever models are profiled together.

    Parameters
    ----------
    name
        What errors call the model.
    data_hash
        :func:`data_digest` of ``data``.
    cache_dir
        Where entries are kept; None for no cache on disk.
    known
        Graphs that were traced with the same example inputs; a new one is added. Models of one
        architecture share one.

    Raises
    ------
    InputError, UnsupportedOpError, GraphVerificationError, StructureError
        As for :func:`clafusion.fuse`.
    """
    graph = _traced(name, model, example_inputs, config, {} if known is None else known)
    entry = None
    found = None
    if cache_dir is not None:
        key = _entry_key(graph, config, data_hash)
        entry = cache_dir / f"{key[:40]}.safetensors"
        found = _read_entry(entry, key, graph)
    from_cache = found is not None
    if found is None:
        if config.verify:
            verify_graph(graph, graph.example_inputs, seed=config.seed)
        is_repaired = config.calibration == "repair"
        at_once = is_repaired and config.profile_inputs is None  # one pass sees all inputs
        (profile,) = profiled([graph], data, config, moments=at_once)
        if is_repaired and not at_once:
            profile = replace(profile, moments=tuple(observed_moments(graph, data)))
        if entry is not None:
            try:
                _write_entry(entry, key, profile)
            except (OSError, InputError, SafetensorError) as error:
                _LOG.warning("cache entry %s cannot be written: %s", entry, error)
    else:
        profile = found
    rows = {id(one): one for one in profile.rows.values()}.values()
    moments = [one for batch in profile.moments or () for pair in batch.values() for one in pair]
    tensors = [
        *graph.state().values(),
        *profile.grams,
        *rows,
        *profile.importance,
        *([] if profile.sensitivity is None else [profile.sensitivity]),
        *moments,
    ]
    size = sum(one.numel() * one.element_size() for one in tensors)
    return PreparedModel(profile, size, from_cache)


def _traced(
    name: str, model: nn.Module, example_inputs: Any, config: FusionConfig, known: Known
) -> TracedModel:
    kind = architecture(model)
    with _TRACING:
        if kind is None or kind not in known:
            graph = traced_to_fuse(name, model, example_inputs, replace(config, verify=False))
            if kind is not None:
                known[kind] = replace(graph, model=nn.Module())  # without its weights
            return graph
    try:
        return traced_like(known[kind], model)
    except InputError as error:
        raise InputError(f"the {name} model: {error}") from error


# --- entries on disk ----------------------------------------------------------------------------


def _entry_key(graph: TracedModel, config: FusionConfig, data_hash: str) -> str:
    settings = asdict(config)
    device = next((one.device.type for one in graph.model.parameters()), "cpu")
    return digest_of(
        {
            **versions(),
            "weights": tensors_digest(graph.state()),
            "code": hashlib.sha256(str(graph.module.graph).encode()).hexdigest(),
            "data": data_hash,
            "example": tensors_digest({str(i): x for i, x in enumerate(graph.example_inputs)}),
            "settings": {name: settings[name] for name in _PROFILED_BY},
            "moments": config.calibration == "repair",
            "device": device,
        }
    )


def _write_entry(path: Path, key: str, profile: ModelProfile) -> None:
    observed = profile.moments
    tensors = {f"gram.{i}": one for i, one in enumerate(profile.grams)}
    tensors |= {f"importance.{i}": one for i, one in enumerate(profile.importance)}
    if profile.sensitivity is not None:
        tensors["sensitivity"] = profile.sensitivity
    names: dict[int, str] = {}
    places = []
    for place, one in profile.rows.items():
        name = names.setdefault(id(one), f"rows.{len(names)}")
        tensors[name] = one
        places.append([*place, name])
    if observed:
        for node in observed[0]:  # (batches, 2, channels)
            pairs = [torch.stack(batch[node]) for batch in observed]
            tensors[f"moments.{node}"] = torch.stack(pairs)
    tensors = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    facts = {
        "key": key,
        "features": list(profile.features),
        "places": places,
        "num_samples": profile.num_samples,
        "num_inputs": profile.num_inputs,
        "data_key": profile.data_key,
        "importance": len(profile.importance),
        "moments": observed is not None,
    }
    facts["digest"] = digest_of([facts, tensors_digest(tensors)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "cache entry") as temporary:
        save_file(tensors, temporary, metadata={"clafusion": json.dumps(facts)})


def _read_entry(path: Path, key: str, graph: TracedModel) -> ModelProfile | None:
    """Return what an entry holds, or None where there is none that is whole."""
    if not path.exists():
        return None
    try:
        device = next((one.device for one in graph.model.parameters()), torch.device("cpu"))
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["clafusion"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = facts.pop("digest")
        if facts["key"] != key or digest != digest_of([facts, tensors_digest(tensors)]):
            raise ValueError("its contents do not have the hash that it states")
        rows = {(layer, i): tensors[name].to(device) for layer, i, name in facts["places"]}
        profile = ModelProfile(
            graph,
            tuple(tensors[f"gram.{i}"].to(device) for i in range(len(graph.layers))),
            tuple(facts["features"]),
            rows,
            facts["num_samples"],
            facts["num_inputs"],
            facts["data_key"],
            tuple(tensors[f"importance.{i}"] for i in range(facts["importance"])),
            sensitivity=tensors.get("sensitivity"),
        )
        if not facts["moments"]:
            return profile
        moments = {
            name.removeprefix("moments."): one.to(device)
            for name, one in tensors.items()
            if name.startswith("moments.")
        }
        count = max((len(one) for one in moments.values()), default=0)
        observed = tuple(
            {node: (one[i, 0], one[i, 1]) for node, one in moments.items()} for i in range(count)
        )
    except Exception as error:  # whatever is wrong with it, it can be made again
        _LOG.warning("cache entry %s is corrupt and is made again: %s", path, error)
        return None
    return replace(profile, moments=observed)
