"""Run the networks on what was held out, compare them, and warn where a parent does better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from clafusion.assessment.comparison import Comparison
from clafusion.assessment.nearness import FusionAssessment
from clafusion.assessment.output_cache import OutputCache, OutputStream
from clafusion.assessment.own_outputs import OwnOutputs
from clafusion.assessment.parts import Parts, compared_output, most_assessed
from clafusion.calibration.outputs import KnownOutputs
from clafusion.config import Assessment, FusionConfig, LeastSquares
from clafusion.errors import AssessmentWarning, warn
from clafusion.execution.call import in_eval_mode
from clafusion.merging.combination import Means
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Progress, batches
from clafusion.profiling.masks import counting_outputs, kept_positions
from clafusion.profiling.moments import inputs_in_cache
from clafusion.profiling.thinning import whole_numbers
from clafusion.tracing.model import TracedModel
from clafusion.transport.plan import TransportPlan

__all__ = ["assess", "compare", "warn_of"]

_CHUNK, _CHUNK_NUMBERS = 256, 1 << 22  # rows, and numbers that are compared, at a time
_CHUNK_WHOLE = 1 << 24  # numbers that the result puts out at a time


def assess(
    model: nn.Module,
    problem: FusionProblem,
    parents: Mapping[str, TracedModel],
    weights: Sequence[float],
    parts: Parts,
    settings: Assessment,
    progress: Progress | None = None,
    known: OutputCache | None = None,
    own_outputs: KnownOutputs = (),
) -> FusionAssessment | None:
    """Compare the result and each parent with the parents together, in one pass of each.

    Parameters
    ----------
    model
        The fused network. Its mode stays as it is.
    problem
        What it was made from. Where outputs were matched the parents' move by its plans. It says
        what the parents put out together.
    parents
        All parents by name.
    weights
        Their weights, in order; they add up to 1.
    parts
        See :func:`clafusion.assessment.parts.parts_of`. At most 500 inputs are looked at, and 100
        where none is held out.
    settings
        The options.
    known
        What the parents put out in earlier assessments.
    own_outputs
        What the fused network put out when it was calibrated.

    Returns
    -------
    FusionAssessment
        None where nothing is to be compared, or outputs were matched one model after another.
    """
    plans = [one.output_plan for one in problem.parents]
    if len(plans) != len(parents):  # one after another: those of the last step
        if any(one is not None for one in plans):
            return None  # earlier steps have moved outputs, too
        plans = [None] * len(parents)
    return compare(
        model,
        parents,
        weights,
        parts,
        settings,
        progress,
        known,
        plans=plans,
        means=problem.combination.means,
        own_outputs=own_outputs,
    )


@torch.no_grad()
def compare(
    model: nn.Module,
    parents: Mapping[str, TracedModel],
    weights: Sequence[float],
    parts: Parts,
    settings: Assessment,
    progress: Progress | None = None,
    known: OutputCache | None = None,
    *,
    plans: Sequence[TransportPlan | None] = (),
    means: Means = "logits",
    own_outputs: KnownOutputs = (),
) -> FusionAssessment | None:
    """Do what :func:`assess` does for any network with the parents' inputs and outputs.

    ``plans`` are those by which the parents' outputs move; none if empty. ``means`` says of what
    the parents together are the mean. ``own_outputs`` are what is known of the network's own.
    """
    traced = tuple(parents.values())
    plans = plans or [None] * len(traced)
    compared = compared_output(traced[0], settings)
    if compared is None:
        return None
    output, kind = compared
    axis = settings.axis if kind == "classes" else -1
    sums = Comparison(kind, axis, tuple(weights), means)
    known = OutputCache() if known is None else known
    streams = [OutputStream(one, output, known, held_out=parts.held_out) for one in traced]

    def read(inputs: tuple[Tensor, ...]) -> None:
        for one in streams:
            one.feed(inputs)

    with in_eval_mode(model):
        fused = OwnOutputs(model, traced[0], output, own_outputs)
        for inputs in _chunks(parts, traced, output, read):
            found = [one.take(inputs) for one in streams]
            outputs = [_moved(one, plan, axis) for one, plan in zip(found, plans, strict=True)]
            mask = counting_outputs(traced[0], kept_positions(traced[0], inputs), output)
            sums.add(outputs, fused.take(inputs), mask)
            if progress is not None:
                progress("assess", sums.num_inputs)
    return sums.assessment(tuple(parents), parts.held_out)


def _chunks(
    parts: Parts,
    models: Sequence[TracedModel],
    output: int,
    read: Callable[[tuple[Tensor, ...]], None],
) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs in chunks that memory and caches allow, whatever the batches' sizes.

    ``read`` is called with each batch, before its first inputs are yielded.
    """
    first, data = models[0], parts.assessed
    most = most_assessed(held_out=parts.held_out)
    compared, whole = math.prod(first.outputs[output][0]), whole_numbers(first, output)
    rows = min(_CHUNK, _CHUNK_NUMBERS // max(1, compared), _CHUNK_WHOLE // max(1, whole))
    rows = max(1, rows)
    rows = min([rows, *(count for one in models if (count := inputs_in_cache(one)) is not None)])
    is_whole = any(one.takes_whole_batches for one in models)
    of_graphs = first.graph if first.output_rows[output] == "graphs" else None
    held: list[tuple[Tensor, ...]] = []
    waiting = seen = 0
    for inputs in batches(data, first.example_inputs, first.keywords, device=first.device):
        read(inputs)
        if is_whole:
            yield inputs
        else:
            inputs = tuple(one[: most - seen] for one in inputs)
            held.append(inputs)
            waiting += inputs[0].size(0)
        seen += inputs[0].size(0) if of_graphs is None else of_graphs.num_graphs(inputs)
        if waiting >= rows:
            yield from _joined(held, rows)
            held, waiting = [], 0
        if seen >= most:
            break
    if held:
        yield from _joined(held, rows)


def _joined(held: Sequence[tuple[Tensor, ...]], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield chunks of at most ``rows`` inputs, none much smaller: a batch of one is special."""
    joined = [torch.cat(one) for one in zip(*held, strict=True)]
    chunks = [one.tensor_split(math.ceil(len(one) / rows)) for one in joined]
    yield from zip(*chunks, strict=True)


def _moved(outputs: Tensor, plan: TransportPlan | None, axis: int) -> Tensor:
    """Bring outputs that were matched into the result's order."""
    if plan is None or outputs.size(axis) != plan.shape[0]:
        return outputs
    return plan.outgoing(outputs, axis)


def warn_of(assessment: FusionAssessment | None, config: FusionConfig) -> None:
    """Warn where a parent alone is clearly nearer than the result; say what to try.

    Warns
    -----
    AssessmentWarning
        See above.
    """
    if assessment is None or not assessment.nearer:
        return
    wider = "more width" if config.has_own_places else "a wider target (width='wide')"
    remedies = ["more data", wider, "training (clafusion.distill)"]
    if not isinstance(config.used_calibration, LeastSquares):
        remedies.insert(0, "calibration='least_squares'")
    warn(
        f"{assessment.verdict}. Try {', '.join(remedies[:-1])} or {remedies[-1]}", AssessmentWarning
    )
