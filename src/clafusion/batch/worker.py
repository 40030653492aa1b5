"""Prepares the models that a pair needs, fuses the pair, and stays within the memory limit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clafusion.alignment.models import check_models, label
from clafusion.assessment.output_cache import OutputCache
from clafusion.assessment.parts import parts_of
from clafusion.batch.prepared import PreparedModel, prepare
from clafusion.batch.results import Pair, facts_of
from clafusion.config import FusionConfig
from clafusion.errors import FusionWarning, InputError, StructureError
from clafusion.fusion import align_profiles, fuse_aligned
from clafusion.interop.rebuilding import Architecture, of_factory
from clafusion.profiling.batches import Data
from clafusion.results import FusionResult
from clafusion.stages import Clock, ExampleInputs, profile_traced
from clafusion.targets.completed import completed_models
from clafusion.tracing.copies import copied
from clafusion.tracing.model import TracedModel
from clafusion.weights.factories import Model, ModelFile
from clafusion.weights.messages import one_line
from clafusion.weights.round_trip import check_round_trip
from clafusion.weights.state_files import state_of

__all__ = ["Job", "Outcome", "Worker", "has_code", "union_refusal"]

Source: TypeAlias = "Callable[[str], Model]"
"""Returns a model by its name."""


@dataclass(frozen=True)
class Job:
    """What all pairs share. It can be pickled if the data can be."""

    data: Data
    example_inputs: ExampleInputs
    weights: tuple[float, ...]
    config: FusionConfig
    device: str | None
    cache_dir: str | None
    memory_limit: int | None
    data_hash: str
    labels: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What a worker returns for a pair.

    Attributes
    ----------
    facts
        See :func:`clafusion.batch.results.result_of`.
    state
        The fused weights, and what ``get_extra_state`` returned; None where the pair failed.
    categories
        The categories of the warnings.
    """

    facts: dict[str, Any]
    state: dict[str, Any] | None
    categories: tuple[type[Warning], ...] = ()


def has_code(model: TracedModel, own: Sequence[TracedModel]) -> bool:
    """Return whether the code of one of a pair builds the structure of a completed model.

    ``own`` are the two as their code builds them. A model is completed by modules of the other
    one's, and then has its structure, unless it was the deeper one elsewhere.
    """
    names = model.model.state_dict().keys()
    return any(one.model.state_dict().keys() == names for one in own)


def union_refusal(pair: Pair) -> str:
    """Return why a pair is not fused whose result would have the structure of neither model."""
    return (
        f"{label(pair[0])} and {label(pair[1])} are each the deeper one somewhere. Their union is "
        "a network that neither's code builds: fuse the two by clafusion.fuse"
    )


class _ModelError(Exception):
    """No pair can use a model; the message says why."""


class Worker:
    """Prepares models when a pair needs them, fuses pairs, and frees models to stay in memory.

    Attributes
    ----------
    prepared
        The models at hand, the oldest first.
    """

    def __init__(self, job: Job) -> None:
        self.prepared: OrderedDict[str, PreparedModel] = OrderedDict()
        self._job = job
        self._failed: dict[str, str] = {}
        self._files: dict[str, ModelFile] = {}
        self._known_outputs = OutputCache()
        self._largest = 0

    def fuse(self, pair: Pair, source: Source) -> Outcome:
        """Fuse a pair. An error is an outcome too, for the other pairs go on."""
        facts: dict[str, Any] = {"first": pair[0], "second": pair[1], "error": None}
        state = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FusionWarning)
            try:
                clock = Clock(None if self._job.device is None else torch.device(self._job.device))
                result = self._fuse(pair, source, clock)
                prepared = [self.prepared[name] for name in pair]
                operations = [one.operations for one in prepared]
                made = facts_of(result, [one.profile.traced for one in prepared], operations)
                made["peak_memory"] = clock.peak_memory | made["peak_memory"]
                for name, count in zip(pair, operations, strict=True):
                    made["models"][name]["operations"] = count
                kept = state_of(result.model)
                self._check(result, made["structure"], kept)
                made["architecture"] = self._architecture(result, made, kept)
                facts |= made
                state = kept
            except _ModelError as error:
                facts["error"] = str(error)
            except Exception as error:
                facts["error"] = one_line(error, most=None)
        facts["warnings"] = []
        categories = []
        for one in caught:
            if issubclass(one.category, FusionWarning):
                facts["warnings"].append(" ".join(str(one.message).split()))
                categories.append(one.category)
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return Outcome(facts, state, tuple(categories))

    def prepare(self, name: str, source: Source) -> None:
        """Prepare a model. An error is kept for the pairs that need the model."""
        with suppress(_ModelError, InputError):
            self._prepared(name, (name, name), source)

    def _fuse(self, pair: Pair, source: Source, clock: Clock) -> FusionResult:
        job = self._job
        with clock.stage("prepare"):
            profiles = [self._prepared(name, pair, source).profile for name in pair]
            own = [one.traced for one in profiles]
            traced = completed_models(own)
        known = self._known_outputs
        is_completed = any(one is not other for one, other in zip(traced, own, strict=True))
        if is_completed:
            check_models(pair, traced, job.config)
        if is_completed or len({one.static_batch is None for one in traced}) == 2:
            # Beside a model of one batch size the other one sees all data, as in clafusion.fuse.
            kept = parts_of(job.data, traced, job.config.assessment).kept
            profiles = profile_traced(traced, kept, job.config, names=pair)
            known = OutputCache()  # what one put out on its part alone has other last digits
        aligned = align_profiles(pair, profiles, job.config, timings=clock.seconds)
        reference = traced[aligned.reference]
        if aligned.alignment.unmatched_shallow or not has_code(reference, own):
            raise StructureError(union_refusal(pair))
        result = fuse_aligned(
            aligned,
            job.data,
            job.weights,
            job.config,
            known_outputs=known,
            data_hash=job.data_hash,
            labels=job.labels,
        )
        self._make_room(pair, 0)
        return result

    def _check(self, result: FusionResult, structure: str, state: dict[str, Any]) -> None:
        """Refuse a result that would compute something else when it comes back from its file."""
        if structure not in self._files:  # a module, of which nobody knows how it is built
            return
        fresh = self._files[structure].build()
        shapes = [
            {name: getattr(one, "shape", None) for name, one in kept.items()}
            for kept in (state, fresh.state_dict())
        ]
        if shapes[0] != shapes[1]:  # of other widths, which no factory builds
            return
        parent = next(
            profile.traced
            for name, profile in zip(result.aligned.names, result.aligned.profiles, strict=True)
            if name == structure
        )
        check_round_trip(
            result.model,
            state,
            lambda: fresh,
            parent.example_inputs,
            parent.keywords,
            called=repr(self._files[structure].factory),
        )

    def _architecture(
        self, result: FusionResult, made: Mapping[str, Any], state: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return what builds the result again from its file; None where no factory does."""
        kind = self._files.get(made["structure"])
        if type(kind) is not ModelFile:
            return None
        if not made["resized"]:
            return Architecture("factory", kind.factory).to_dict()
        found = of_factory(result, kind.factory, state)
        return None if found is None else found.to_dict()

    def _prepared(self, name: str, pair: Pair, source: Source) -> PreparedModel:
        if name in self._failed:
            raise _ModelError(self._failed[name])
        if name not in self.prepared:
            self._make_room(pair, self._largest)
            try:
                made = self._prepare(name, source(name))
            except Exception as error:
                self._failed[name] = one_line(error, label(name), most=None)
                raise _ModelError(self._failed[name]) from error
            self.prepared[name] = made
            self._largest = max(self._largest, made.num_bytes)
            self._make_room(pair, 0)
            self._check_limit(pair)
        return self.prepared[name]

    def _prepare(self, name: str, kind: Model) -> PreparedModel:
        job = self._job
        if isinstance(kind, ModelFile):
            self._files[name] = kind
            model = kind.load()
        else:
            model = kind
        example = job.example_inputs
        if job.device is not None:
            model = copied(model).to(job.device)
            example = torch.utils._pytree.tree_map(lambda x: x.to(job.device), example)
        return prepare(
            name,
            model,
            job.data,
            example,
            job.config,
            data_hash=job.data_hash,
            cache_dir=None if job.cache_dir is None else Path(job.cache_dir),
            known_outputs=self._known_outputs,
        )

    # --- memory ---

    def _make_room(self, pair: Pair, coming: int) -> None:
        """Free known outputs, then the newest models: the oldest meet all others."""
        limit = self._job.memory_limit
        if limit is None:
            return
        if self._num_bytes() + coming > limit:
            self._known_outputs.forget()  # they are made again faster than any model
        for name in reversed(list(self.prepared)):
            if self._num_bytes() + coming <= limit:
                return
            if name not in pair:
                del self.prepared[name]

    def _check_limit(self, pair: Pair) -> None:
        limit, taken = self._job.memory_limit, self._num_bytes()
        if limit is not None and taken > limit:
            for name in pair:
                self.prepared.pop(name, None)
            raise InputError(
                f"memory_limit is {limit:,} bytes, but the models of this pair take {taken:,}; "
                "raise it, or lower profiling.alignment_samples or profiling.matching_rows"
            )

    def _num_bytes(self) -> int:
        of_models = sum(one.num_bytes for one in self.prepared.values())
        return of_models + self._known_outputs.num_bytes
