"""A model prepared for any number of pairs: traced, proved and profiled once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from clafusion.assessment.combining import observer_of_outputs
from clafusion.assessment.output_cache import OutputCache
from clafusion.assessment.parts import parts_of
from clafusion.config import FusionConfig
from clafusion.errors import FusionWarning
from clafusion.execution.flops import count_operations
from clafusion.profiling.batches import Data
from clafusion.profiling.cache import profile_key, read_profile, write_profile
from clafusion.profiling.profile import ModelProfile
from clafusion.profiling.proofs import ProofsOnDisk
from clafusion.stages import ExampleInputs, profile_options, profile_traced, traced_parent
from clafusion.tracing.model import TracedModel

__all__ = ["PreparedModel", "operations_of", "prepare"]


@dataclass(frozen=True)
class PreparedModel:
    """What all pairs of a model share.

    Attributes
    ----------
    profile
        The profile of the traced and proved model.
    num_bytes
        The memory that the weights and the profile take.
    operations
        What :func:`operations_of` gives for the model.
    from_cache
        Whether the profile comes from the disk. The model was proved when it was written there.
    """

    profile: ModelProfile
    num_bytes: int
    operations: int
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
    known_outputs: OutputCache | None = None,
) -> PreparedModel:
    """Trace and prove a model and profile it, or read the profile of a proved one from the cache.

    The profile depends on the model, the data and the options only. It is the same whichever
    models are profiled together.

    Parameters
    ----------
    name
        What errors call the model.
    data_hash
        :func:`clafusion.profiling.batches.data_digest` of ``data``.
    cache_dir
        The folder of the cache of profiles and of proofs with random weights; None for no cache.

    known_outputs
        Keeps what the model puts out while it is profiled, where fusions will look at it.

    Raises
    ------
    InputError, UnsupportedOpError, GraphVerificationError, StructureError
        As for :func:`clafusion.fuse`.
    """
    options = profile_options(config)
    key, before, proofs = "", None, None
    if cache_dir is not None:
        proofs = ProofsOnDisk(cache_dir)
        unproved = replace(config, verify=False)
        before = traced_parent(name, model, example_inputs, unproved, proofs)
        key = profile_key(before, options, data_hash)
        cached = read_profile(cache_dir, key, before)
        if cached is not None:
            return PreparedModel(cached, _num_bytes(cached), operations_of(before), True)
    with warnings.catch_warnings():
        if before is not None:
            warnings.simplefilter("ignore", FusionWarning)  # told once already
        traced = traced_parent(name, model, example_inputs, config, proofs)
    if before is not None and traced.module is not before.module:  # which did not stand the proof
        key = profile_key(traced, options, data_hash)
    parts = parts_of(data, [traced], config.assessment)
    observe = observer_of_outputs(traced, parts, config, known_outputs)
    (profile,) = profile_traced([traced], parts.kept, config, names=[name], observe=observe)
    if cache_dir is not None:
        write_profile(cache_dir, key, profile)
    return PreparedModel(profile, _num_bytes(profile), operations_of(traced), False)


def operations_of(model: TracedModel) -> int:
    """Return the floating-point operations that a model takes for one of its example inputs.

    See :func:`clafusion.execution.flops.count_operations`.
    """
    inputs = model.example_inputs
    return round(count_operations(lambda: model.run(inputs)) / inputs[0].size(0))


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
