"""Compare outputs of the parents and of the result, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.assessment.nearness import FusionAssessment, Kind, Nearness
from clafusion.merging.combination import (
    FAR,
    Means,
    are_probabilities,
    log_probabilities,
    together,
)
from clafusion.profiling.masks import zeroed
from clafusion.profiling.thinning import most_positions

__all__ = ["Comparison", "is_nearer", "some_positions"]

_ROUNDING = 1e-12  # nats, which is none
_NOISE, _ERRORS = 1e-4, 2.0  # a difference counts that is above both; the latter in standard errors


class Comparison:
    """What is added up over the chunks: for each parent, and last for the result."""

    def __init__(
        self, kind: Kind, axis: int, weights: tuple[float, ...], means: Means = "logits"
    ) -> None:
        self.num_inputs = 0
        self._means = means
        self._kind = kind
        self._axis = axis
        self._weights = weights
        self._are_soft: bool | None = None
        count = len(weights) + 1
        self._rows = 0
        self._distances: list[list[Tensor]] = [[] for _ in range(count)]  # of each input
        self._agreements = [0] * count
        self._apart, self._alike = 0.0, 0  # between the parents
        self._squares, self._total = 0.0, torch.zeros(())

    def add(self, parents: Sequence[Tensor], result: Tensor, mask: Tensor | None = None) -> None:
        """Add a chunk's outputs.

        ``mask`` says which positions of outputs ``(num_inputs, num_positions, ...)`` count.
        """
        self.num_inputs += result.size(0)
        outputs = [*parents, result]
        if mask is not None and result.shape[:2] != mask.shape:  # computed at some that count
            mask = None
        if self._kind == "classes":
            moved = [one.movedim(self._axis, -1) for one in outputs]
            if mask is not None and moved[0].dim() == 2:  # the positions are the classes
                mask = mask | ~mask.any(1, keepdim=True)
                moved = [one.double().masked_fill(~mask, -math.inf) for one in moved]
            if mask is not None and moved[0].dim() == 3:
                mask = some_positions(mask.unsqueeze(-1), moved[0].size(-1)).squeeze(-1)
            else:
                mask = None
            chosen = [some_positions(one, one.size(-1)) for one in moved]
            self._add_classes(chosen, mask)
        else:
            counting = None if mask is None else mask.view(*mask.shape, *[1] * (result.dim() - 2))
            self._add_values([zeroed(one.double(), counting) for one in outputs])

    def _add_classes(self, outputs: list[Tensor], mask: Tensor | None) -> None:
        if self._are_soft is None:
            self._are_soft = all(map(are_probabilities, outputs[:-1]))
        logs = [log_probabilities(one, are_soft=self._are_soft) for one in outputs]
        parts = [one.exp() for one in logs[:-1]]
        mean = together(logs[:-1], self._weights, self._means)
        chosen = mean.argmax(-1)
        choices = [one.argmax(-1) for one in logs]
        counting = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask
        self._rows += int(counting.sum())
        for i, (log, choice) in enumerate(zip(logs, choices, strict=True)):
            self._distances[i].append(_divergence(mean, log, mask))
            self._agreements[i] += int(((choice == chosen) & counting).sum())
        alike = torch.stack([one == choices[0] for one in choices[:-1]]).all(0)
        self._alike += int((alike & counting).sum())
        self._apart += sum(
            float(_divergence(one, log, mask).sum())
            for i, one in enumerate(parts)
            for j, log in enumerate(logs[:-1])
            if i != j
        )

    def _add_values(self, outputs: list[Tensor]) -> None:
        parents = outputs[:-1]
        mean = _mean(parents, self._weights)
        for i, one in enumerate(outputs):
            self._distances[i].append((one - mean).square().reshape(len(one), -1).sum(1))
        self._squares += float(mean.square().sum())
        self._total = self._total.to(mean) + mean.sum(0)
        self._apart += sum(
            float((one - other).square().sum())
            for i, one in enumerate(parents)
            for j, other in enumerate(parents)
            if i != j
        )

    def assessment(self, names: Sequence[str], held_out: bool) -> FusionAssessment:
        """Return what the sums say."""
        is_classes = self._kind == "classes"
        scale = 1.0 if is_classes else self._variation() / self.num_inputs
        distances = [torch.cat(one) / scale for one in self._distances]
        all_of_them = [
            Nearness(_finite(distance.mean()), count / self._rows if is_classes else None)
            for distance, count in zip(distances, self._agreements, strict=True)
        ]
        pairs = max(len(names) * (len(names) - 1), 1) * self.num_inputs
        between = Nearness(
            _finite(self._apart / scale / pairs), self._alike / self._rows if is_classes else None
        )
        return FusionAssessment(
            self._kind,
            all_of_them[-1],
            dict(zip(names, all_of_them[:-1], strict=True)),
            between,
            self.num_inputs,
            held_out,
            tuple(
                name
                for name, one in zip(names, distances[:-1], strict=True)
                if is_nearer(one, distances[-1])
            ),
        )

    def _variation(self) -> float:
        """Return how much the parents' mean varies; of a constant one its squares."""
        around = self._squares - float(self._total.square().sum()) / self.num_inputs
        return max(around if around > 1e-9 * self._squares else self._squares, 1e-30)


def some_positions(outputs: Tensor, classes: int) -> Tensor:
    """Return outputs ``(inputs, positions, classes)`` at some of many positions, evenly spaced.

    A language model's neighbouring tokens, or an image's pixels, say little more than these.
    """
    if outputs.dim() < 3:
        return outputs
    flat = outputs.reshape(len(outputs), -1, outputs.size(-1))
    return flat[:, :: math.ceil(flat.size(1) / most_positions(classes))]


def _mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean, in which a weight of 0 leaves out what is not finite."""
    mean = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        if weight > 0:
            mean = mean + weight * part
    return mean


def _divergence(of: Tensor, log: Tensor, mask: Tensor | None) -> Tensor:
    """Return each input's divergence of ``exp(log)`` from ``of``, the mean of its positions.

    Only positions in ``mask`` count; None for all.
    """
    terms = (torch.special.xlogy(of, of) - of * log.clamp(min=-FAR)).sum(-1)
    if mask is None:
        found = terms.reshape(len(terms), -1).mean(1).clamp(min=0)
    else:
        counts = mask.sum(1).clamp(min=1)
        found = (torch.where(mask, terms, 0.0).sum(1) / counts).clamp(min=0)
    found = torch.where(found > _ROUNDING, found, 0.0 * found)
    return torch.where(torch.isfinite(found), found, math.inf)


def is_nearer(one: Tensor, result: Tensor) -> bool:
    """Say whether distances of the inputs are clearly less than the result's."""
    if not bool(torch.isfinite(result).all()):
        return bool(torch.isfinite(one).all())
    further = result - one
    error = further.std() / math.sqrt(len(further)) if len(further) > 1 else torch.zeros(())
    return float(further.mean()) > max(_NOISE, _ERRORS * float(error))


def _finite(distance: float | Tensor) -> float:
    return float(distance) if math.isfinite(distance) else math.inf
