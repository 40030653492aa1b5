"""A result -> the same with its assessment, its evaluation where there are labels, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from clafusion.assessment.assess import assess, warn_of
from clafusion.assessment.evaluation import Evaluation
from clafusion.assessment.output_cache import OutputCache
from clafusion.assessment.parts import Parts
from clafusion.profiling.batches import Data, Part, Progress, batches, data_digest
from clafusion.results import FusionResult
from clafusion.stages import Clock
from clafusion.tracing.model import TracedModel

__all__ = ["assessed", "hash_of"]


def hash_of(data: Data) -> str | None:
    """Return the hash of data in memory, which another pass over costs little."""
    return data_digest(data) if isinstance(data, (Tensor, list, tuple)) else None


def assessed(
    result: FusionResult,
    parents: Mapping[str, TracedModel],
    parts: Parts,
    progress: Progress | None,
    known_outputs: OutputCache | None = None,
    labels: Tensor | None = None,
) -> FusionResult:
    """Return the result with its assessment and evaluation; warn where the former is bad."""
    config = result.config
    clock = Clock(result.problem.target.device, result.timings, result.peak_memory)
    with clock.stage("assess"):
        found = assess(
            result.model,
            result.problem,
            parents,
            result.weights,
            parts,
            config.assessment,
            progress,
            known_outputs,
        )
        if labels is not None:
            result = replace(result, evaluation=_evaluation(result, parts, labels, known_outputs))
    if found is None and labels is None:
        return result
    warn_of(found, config)
    return replace(result, assessment=found, timings=clock.seconds, peak_memory=clock.peak_memory)


def _evaluation(
    result: FusionResult, parts: Parts, labels: Tensor, known_outputs: OutputCache | None
) -> Evaluation:
    """Compare with the labels of what was held out, or of all data."""
    first = next(iter(result.parent_models.values()))
    if isinstance(parts.assessed, Part):
        labels = labels[parts.assessed.places(len(labels))]
    inputs = batches(parts.assessed, first.example_inputs, first.keywords, device=first.device)
    return result.evaluated(inputs, labels, known_outputs)
