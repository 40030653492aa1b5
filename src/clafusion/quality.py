"""A result with its assessment, its evaluation where there are labels, and warnings; evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from clafusion.alignment.models import label
from clafusion.assessment.assess import assess, warn_of
from clafusion.assessment.evaluation import Evaluation, evaluated, labelled, network_of
from clafusion.assessment.output_cache import OutputCache
from clafusion.assessment.parts import Parts, labelled_output
from clafusion.calibration.outputs import KnownOutputs
from clafusion.config import Assessment
from clafusion.errors import InputError, kind_of
from clafusion.interop.inputs import example_of, readable
from clafusion.profiling.batches import (
    Data,
    Part,
    Progress,
    batches,
    data_digest,
    first_batch,
)
from clafusion.results import RESULT, FusionResult
from clafusion.stages import Clock, merge_weights, named_models
from clafusion.tracing.examples import example_tensors
from clafusion.tracing.model import TracedModel
from clafusion.weights.storage import InMemory

__all__ = ["assessed", "evaluate", "evaluated_beside", "evaluation_of", "hash_of"]


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
    own_outputs: KnownOutputs = (),
) -> FusionResult:
    """Return the result with its assessment and evaluation; warn where the former is bad."""
    config = result.config
    clock = Clock(
        result.problem.target.device,
        result.timings,
        result.peak_memory,
        keeps_memory=isinstance(result.problem.storage, InMemory),
    )
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
            own_outputs,
        )
        if labels is not None:
            result = replace(result, evaluation=evaluation_of(result, parts, labels, known_outputs))
    if found is None and labels is None:
        return result
    warn_of(found, config)
    return replace(result, assessment=found, timings=clock.seconds, peak_memory=clock.peak_memory)


def evaluation_of(
    result: FusionResult, parts: Parts, labels: Tensor, known_outputs: OutputCache | None = None
) -> Evaluation:
    """Compare a result with the labels of what was held out, or of all data."""
    first = next(iter(result.parent_models.values()))
    if isinstance(parts.assessed, Part):
        labels = labels[parts.assessed.places(len(labels))]
    inputs = batches(parts.assessed, first.example_inputs, first.keywords, device=first.device)
    return result.evaluated(inputs, labels, known_outputs)


def evaluate(
    models: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
    inputs: Data,
    labels: Any = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    *,
    axis: int = -1,
) -> Evaluation:
    """Say how good networks are on inputs with labels, and of several how good their mean is.

    Parameters
    ----------
    models
        A network, or several: a list, or a mapping with names. They run in eval mode, and stay as
        they are.
    inputs
        A tensor, a list of batches or a DataLoader that keeps its order. Of a batch that is a tuple
        the first entry counts, of a mapping all but labels. Or graphs, as for ``clafusion.fuse``.
        Without ``labels`` a pair of tensors ``(inputs, labels)``, or batches with labels: tuples
        of which the last entry is the labels, or mappings with ``"labels"``.
    labels
        One for each input (of graphs for each node or each graph), or for each of its positions:
        whole numbers for classes, where -100 stands for none, real numbers of the outputs' shape
        for values. Default: those in ``inputs``.
    weights
        The networks' weights in their mean, not negative; they are divided by their sum. Default:
        equal.
    axis
        The axis of the classes in the outputs.

    Raises
    ------
    InputError
        The labels or the axis do not fit the inputs or the outputs, labels are NaN or infinite, the
        weights do not fit the networks, a network does not run on the inputs, or there are none.
    """
    named = _networks(models)
    single = isinstance(models, nn.Module)
    shares = merge_weights(weights, tuple(named))
    inputs, known = labelled(readable(inputs, named), labels)
    example = first_batch(inputs)
    keywords: tuple[str, ...] = ()
    given: tuple[Any, ...] = example if isinstance(example, tuple) else (example,)
    if isinstance(example, Mapping):
        keywords, given = tuple(example), tuple(example.values())
    networks = {
        name: network_of(one, keywords, who=name if single else label(name))
        for name, one in named.items()
    }
    return evaluated(networks, shares, batches(inputs, given, keywords), known, axis=axis)


def evaluated_beside(
    result: nn.Module,
    parents: Mapping[str, nn.Module],
    weights: Sequence[float],
    inputs: Data,
    labels: Any,
    settings: Assessment,
    traced: TracedModel | None = None,
) -> Evaluation:
    """Say how good a result is on inputs with labels, beside its parents and their means.

    Parameters
    ----------
    result
        The network.
    parents, weights
        What it came of, by name, and what each counts in the means.
    inputs, labels
        As for :func:`evaluate`.
    settings
        Say which axis has the classes.
    traced
        A traced network of the same inputs and outputs, which says which output counts; without it
        the first one does.

    Raises
    ------
    InputError
        As for :func:`evaluate`; or the networks put out nothing that labels could be of.
    """
    first = next(iter(parents.values()))
    inputs, known = labelled(readable(inputs, {"": first}), labels)
    output = 0
    if traced is None:
        example, keywords = example_tensors(first, example_of(inputs, first))
    else:
        example, keywords = traced.example_inputs, traced.keywords
        output = labelled_output(traced, settings.axis)
    networks = {
        name: network_of(one, keywords, output, name if name == RESULT else label(name))
        for name, one in {RESULT: result, **parents}.items()
    }
    return evaluated(
        networks,
        weights,
        batches(inputs, example, keywords),
        known,
        axis=settings.axis,
        apart=(RESULT,),
    )


def _networks(models: Any) -> dict[str, nn.Module]:
    """Return networks by name; refuse what is none."""
    if isinstance(models, nn.Module):
        return {"the network": models}
    found: dict[str, nn.Module] = {}
    for name, one in named_models(models, least=1).items():
        if not isinstance(one, nn.Module):
            raise InputError(
                f"{label(name)} must be a torch.nn.Module, as clafusion.load returns it; got "
                f"{kind_of(one)}"
            )
        found[name] = one
    return found
