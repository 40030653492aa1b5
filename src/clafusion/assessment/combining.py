"""Choose what the parents put out together: the mean of their logits or of their probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clafusion.assessment.comparison import some_positions
from clafusion.assessment.output_cache import OutputCache, OutputStream
from clafusion.assessment.parts import Parts, compared_output
from clafusion.config import FusionConfig
from clafusion.errors import InputError
from clafusion.merging.combination import (
    FAR,
    Combination,
    are_probabilities,
    log_probabilities,
    together,
)
from clafusion.profiling.batches import Data, batches
from clafusion.profiling.masks import counting_outputs, kept_positions
from clafusion.profiling.profile import Observer
from clafusion.profiling.thinning import whole_numbers
from clafusion.tracing.model import TracedModel

__all__ = [
    "MOST_CLASSES",
    "MOST_COMPARED",
    "by_divergence",
    "chosen_combination",
    "observer_of_outputs",
]

MOST_CLASSES = 4096
"""With more "auto" takes logits: refitting the last layer would take longer than all else."""
MOST_COMPARED = 256
"""Inputs on which "auto" compares the two means."""

_APART = 0.1  # nats between the two means, from which on probabilities are taken
_CHUNK_NUMBERS = 1 << 22


def observer_of_outputs(
    model: TracedModel, parts: Parts, config: FusionConfig, known: OutputCache | None
) -> Observer | None:
    """Return what keeps in ``known`` what models put out while they are profiled.

    None where neither :func:`chosen_combination` nor the assessment will look at it, as of models
    of other classes. ``model`` is one of the models, and ``parts`` says which part of the data they
    are profiled on.
    """
    compared = compared_output(model, config.assessment)
    if known is None or compared is None or config.outputs == "both":
        return None
    output, kind = compared
    may_compare = (
        config.combine == "auto"
        and kind != "values"
        and _num_classes(model, output, config.assessment.axis) <= MOST_CLASSES
    )
    return known.observer(output, MOST_COMPARED) if may_compare or not parts.held_out else None


def _num_classes(model: TracedModel, output: int, axis: int) -> int:
    return model.outputs[output][0][axis if axis < 0 else axis - 1]


@torch.no_grad()
def chosen_combination(
    models: Sequence[TracedModel],
    weights: Sequence[float],
    data: Data,
    config: FusionConfig,
    known: OutputCache | None = None,
) -> Combination:
    """Return what models put out together, as ``config.combine`` asks for.

    ``"auto"`` runs the models on the first 256 inputs, without labels: see :func:`by_divergence`.
    ``known`` holds what they put out before.

    Raises
    ------
    InputError
        Probabilities are asked for, and the outputs are no classes.
    """
    settings = config.assessment
    if settings.outputs == "none":
        settings = replace(settings, outputs="auto")
    compared = compared_output(models[0], settings)
    if compared is None or compared[1] == "values":
        if config.combine == "probabilities":
            raise InputError(
                "combine='probabilities' needs outputs that are classes; "
                f"{_outputs_of(models[0])}. Take 'logits', or say what they are: "
                "assessment.outputs='classes' and assessment.axis"
            )
        return Combination(reason="the outputs are no classes")
    output, axis = compared[0], settings.axis
    if config.combine != "auto":
        return Combination.asked_for(config.combine, output, axis)
    classes = _num_classes(models[0], output, axis)
    if max(weights) >= 1.0:
        reason = "one parent has all the weight"
    elif config.matching.outputs:
        reason = "the outputs are matched, too"
    elif classes > MOST_CLASSES:
        reason = f"of {classes} classes the last layer is not refitted"
    else:
        rows = _logits(models, data, output, axis, known)
        return replace(by_divergence(rows, weights), output=output, axis=axis)
    return Combination("logits", reason, output, axis)


def _outputs_of(model: TracedModel) -> str:
    shapes = [f"(batch, {', '.join(map(str, shape))})" for shape, _ in model.outputs]
    return f"the models put out {' and '.join(shapes)}, which count as values"


def _logits(
    models: Sequence[TracedModel],
    data: Data,
    output: int,
    axis: int,
    known: OutputCache | None,
) -> Iterable[list[Tensor]]:
    """Yield each model's outputs at positions that count, ``(num_rows, num_classes)``."""
    first = models[0]
    known = OutputCache() if known is None else known
    streams = [OutputStream(one, output, known, held_out=False) for one in models]
    chunk = None
    if not any(one.takes_whole_batches for one in models):
        chunk = max(1, min(MOST_COMPARED, _CHUNK_NUMBERS // max(1, whole_numbers(first, output))))
    for inputs in _parts(data, first, chunk, streams):
        found = [one.take(inputs) for one in streams]
        rows = [some_positions(one.movedim(axis, -1), one.size(axis)) for one in found]
        mask = counting_outputs(first, kept_positions(first, inputs), output)
        if mask is not None and found[0].dim() == 3 and mask.shape == found[0].shape[:2]:
            counting = some_positions(mask.unsqueeze(-1), found[0].size(axis)).squeeze(-1)
            rows = [one[counting] for one in rows]
        yield [one.flatten(0, -2) for one in rows]


def _parts(
    data: Data, model: TracedModel, chunk: int | None, streams: Sequence[OutputStream]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the first inputs in chunks; streams are fed whole batches, as a profile is.

    Without a chunk's size whole batches are yielded, too.
    """
    left = MOST_COMPARED
    for batch in batches(data, model.example_inputs, model.keywords, device=model.device):
        for one in streams:
            one.feed(batch)
        if chunk is None:
            yield batch
        else:
            yield from zip(*(one[:left].split(chunk) for one in batch), strict=True)
        left -= len(batch[0])
        if left <= 0:
            return


def by_divergence(rows: Iterable[Sequence[Tensor]], weights: Sequence[float]) -> Combination:
    r"""Choose between the two means by how far they are apart.

    That is :math:`D_{KL}(\bar y_{prob} \,\|\, \bar y_{logits})`, the mean over all rows. Where the
    networks are sure of the same things both means are the same, and logits are taken, which need
    no refit. Where one is sure of what another one rules out, a mean of logits lets one of them
    decide; then the mean of probabilities was the better one on all sets of networks that were
    measured (the page Results).

    Parameters
    ----------
    rows
        In chunks, each model's outputs ``(num_rows, num_classes)``.
    weights
        The models' weights.
    """
    total, count = 0.0, 0
    are_soft: bool | None = None
    for outputs in rows:
        if are_soft is None:
            are_soft = all(map(are_probabilities, outputs))
        logs = [log_probabilities(one, are_soft=are_soft) for one in outputs]
        mixture, product = (together(logs, weights, one) for one in ("probabilities", "logits"))
        gaps = torch.special.xlogy(mixture, mixture) - mixture * product.log().clamp(min=-FAR)
        total += float(gaps.sum())
        count += len(mixture)
    apart = max(total / count, 0.0)
    far = f"on {count} rows of outputs the two means are {apart:.2g} nats apart"
    if apart > _APART:
        return Combination("probabilities", f"{far}, more than {_APART:g}")
    return Combination("logits", f"{far}, at most {_APART:g}")
