"""A model prepared for any number of pairs: traced, proved and profiled once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from torch import nn

from clafusion.alignment.models import label
from clafusion.assessment import parts_of
from clafusion.config import FusionConfig
from clafusion.errors import InputError
from clafusion.profiling.batches import Data
from clafusion.profiling.cache import profile_key, read_profile, write_profile
from clafusion.profiling.profile import ModelProfile
from clafusion.stages import ExampleInputs, profile_options, profile_traced, traced_parent
from clafusion.tracing.model import TracedModel
from clafusion.tracing.trace import Architecture, architecture, traced_like
from clafusion.tracing.verify import verify_graph

__all__ = ["KnownModels", "PreparedModel", "prepare"]

_TRACING = threading.Lock()  # torch.export changes settings of the whole process

KnownModels: TypeAlias = "dict[Architecture, TracedModel]"
"""Traced models, without their weights, by architecture."""


@dataclass(frozen=True)
class PreparedModel:
    """What all pairs of a model share.

    Attributes
    ----------
    profile
        The profile of the traced and proved model.
    num_bytes
        The memory that the weights and the profile take.
    from_cache
        Whether the profile comes from the disk. The model was proved when it was written there.
    """

    profile: ModelProfile
    num_bytes: int
    from_cache: bool


def prepare(
    name: str,
    model: nn.Module,
    data: Data,
    example_inputs: ExampleInputs,
    config: FusionConfig,
    *,
    data_hash: str,
    cache_dir: Path | None = None,
    known: KnownModels | None = None,
) -> PreparedModel:
    """Trace a model, then prove and profile it or read its profile from the cache.

    The profile depends on the model, the data and the options only. It is the same whichever
    models are profiled together.

    Parameters
    ----------
    name
        What errors call the model.
    data_hash
        :func:`clafusion.weights.digests.data_digest` of ``data``.
    cache_dir
        The folder of the cache; None for no cache.
    known
        Models that were traced with the same example inputs. The model is added. Models of one
        architecture share a trace.

    Raises
    ------
    InputError, UnsupportedOpError, GraphVerificationError, StructureError
        As for :func:`clafusion.fuse`.
    """
    traced = _traced(name, model, example_inputs, config, {} if known is None else known)
    key = ""
    if cache_dir is not None:
        key = profile_key(traced, profile_options(config), data_hash)
        cached = read_profile(cache_dir, key, traced)
        if cached is not None:
            return PreparedModel(cached, _num_bytes(cached), True)
    if config.verify:
        verify_graph(traced, traced.example_inputs, seed=config.seed)
    kept = parts_of(data, [traced], config.assessment).kept
    (profile,) = profile_traced([traced], kept, config)
    if cache_dir is not None:
        write_profile(cache_dir, key, profile)
    return PreparedModel(profile, _num_bytes(profile), False)


def _traced(
    name: str,
    model: nn.Module,
    example_inputs: ExampleInputs,
    config: FusionConfig,
    known: KnownModels,
) -> TracedModel:
    """Trace a model, or take the trace of another model of its architecture; prove nothing."""
    kind = architecture(model)
    with _TRACING:
        if kind is None or kind not in known:
            traced = traced_parent(name, model, example_inputs, replace(config, verify=False))
            if kind is not None:
                known[kind] = replace(traced, model=nn.Module())
            return traced
    try:
        return traced_like(known[kind], model)
    except InputError as error:
        raise InputError(f"{label(name)}: {error}") from error


def _num_bytes(profile: ModelProfile) -> int:
    """Return the memory that a model's weights and its profile take."""
    moments = [one for batch in profile.moments or () for pair in batch.values() for one in pair]
    tensors = [
        *profile.traced.state().values(),
        *profile.grams,
        *{id(one): one for one in profile.rows.values()}.values(),
        *profile.importance,
        *([] if profile.sensitivity is None else [profile.sensitivity]),
        *moments,
    ]
    return sum(one.numel() * one.element_size() for one in tensors)
