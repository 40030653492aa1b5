r"""How near a fused network comes to what its parents put out together, without labels.

The parents together are their weighted mean :math:`\bar y = \sum_p w_p y_p`, where outputs are
classes that of their probabilities. A network :math:`q` is compared with it over all rows
:math:`x`, and over all positions where there are several: by how often both choose the same class
and by

.. math::

    D_{KL}(\bar y \,\|\, q) = \operatorname{mean}_x \sum_c \bar y_c \log(\bar y_c / q_c)
    \quad\text{or}\quad
    \frac{\sum_x \|q - \bar y\|^2}{\sum_x \|\bar y - \operatorname{mean} \bar y\|^2},

the mean Kullback-Leibler divergence in nats (Kullback and Leibler, Ann. Math. Stat. 1951), or where
outputs are values the relative squared error.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clafusion.config import Assessment, FusionConfig, LeastSquares
from clafusion.correspondence.moving import outgoing_map
from clafusion.errors import AssessmentWarning, InputError, warn
from clafusion.execution.call import call_model
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data, Part, Progress, batches, has_rows, keeps_order
from clafusion.tracing.architecture import digest_of_values
from clafusion.tracing.model import TracedModel

__all__ = [
    "FusionAssessment",
    "Nearness",
    "OutputCache",
    "Parts",
    "assess",
    "parts_of",
    "warn_of",
]

Kind = Literal["classes", "values"]

_LEAST_HELD = 50  # of fewer an agreement is known to 14 %, and the fusion misses each of them
_MOST = 500  # held out inputs on which the networks are compared
_MOST_SEEN = 100  # the same where none is held out: more would only cost forward passes
_CHUNK, _CHUNK_NUMBERS = 256, 1 << 22  # rows, and numbers in an output, at a time
_KEPT_NUMBERS = 1 << 20  # in outputs that are kept for each parent
_FAR = 100.0  # nats: a probability of 0 counts as exp(-100), so that one row does not hide all
_ROUNDING = 1e-12  # nats, which is none
_NOISE, _ERRORS = 1e-4, 2.0  # a difference counts that is above both; the latter in standard errors


@dataclass(frozen=True)
class Nearness:
    """How near a network's outputs are to the parents' together.

    Attributes
    ----------
    distance
        The mean Kullback-Leibler divergence in nats, or the relative squared error: 0 where the
        outputs are the same, inf where they are not finite.
    agreement
        Of classes: the share of rows, from 0 to 1, for which both choose the same. Else None.
    """

    distance: float
    agreement: float | None = None

    def __str__(self) -> str:
        """Return both in words."""
        if self.agreement is None:
            return f"relative squared error {self.distance:.3g}"
        return f"agreement {100 * self.agreement:.1f} %, divergence {self.distance:.3g}"


@dataclass(frozen=True)
class FusionAssessment:
    """How near the result comes to the parents together, and how near each parent alone.

    See :mod:`clafusion.assessment` for the equations.

    Attributes
    ----------
    kind
        ``"classes"`` or ``"values"``: as what the outputs are compared.
    result
        How near the result is to the parents together.
    parents
        The same of each parent alone, by name.
    between_parents
        How near the parents are to each other: for how many rows all of them choose the same class,
        and the mean distance of every two.
    num_inputs
        How many inputs were looked at.
    held_out
        Whether these inputs were kept out of the fusion. If not, the result has seen them, and on
        others it may be further away.
    nearer
        The names of the parents that alone are nearer than the result. A difference counts that is
        above two standard errors of the mean over the inputs, and above 0.0001.
    """

    kind: Kind
    result: Nearness
    parents: Mapping[str, Nearness]
    between_parents: Nearness
    num_inputs: int
    held_out: bool
    nearer: tuple[str, ...] = ()

    @property
    def nearest_parent(self) -> str:
        """The name of the parent that alone is the nearest to all together."""
        return min(self.parents, key=lambda name: self.parents[name].distance)

    @property
    def verdict(self) -> str:
        """What the figures say, in one sentence."""
        name = self.nearest_parent
        on = f"{self.num_inputs} inputs" + (" kept out of the fusion" if self.held_out else "")
        if self.nearer:
            return (
                f"{name} alone comes nearer to the parents together than the result, on {on}: "
                f"{self.parents[name]}; the result {self.result}"
            )
        return (
            f"No parent alone comes clearly nearer to the parents together than the result, on "
            f"{on}: {self.result}; {name} alone {self.parents[name]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures and the verdict as plain data for JSON; None for infinity."""
        return {
            "kind": self.kind,
            "result": _plain(self.result),
            "parents": {name: _plain(one) for name, one in self.parents.items()},
            "between_parents": _plain(self.between_parents),
            "num_inputs": self.num_inputs,
            "held_out": self.held_out,
            "nearer": list(self.nearer),
            "verdict": self.verdict,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> FusionAssessment:
        """Return the assessment of which :meth:`to_dict` gave the facts."""
        return cls(
            facts["kind"],
            _read(facts["result"]),
            {name: _read(one) for name, one in facts["parents"].items()},
            _read(facts["between_parents"]),
            facts["num_inputs"],
            facts["held_out"],
            tuple(facts["nearer"]),
        )


def _plain(one: Nearness) -> dict[str, Any]:
    return {
        "distance": one.distance if math.isfinite(one.distance) else None,
        "agreement": one.agreement,
    }


def _read(facts: Mapping[str, Any]) -> Nearness:
    distance = facts["distance"]
    return Nearness(math.inf if distance is None else distance, facts["agreement"])


# --- which part ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Data, parted.

    Attributes
    ----------
    kept
        What the fusion may see.
    assessed
        What the result is assessed on.
    held_out
        Whether the two have no row in common.
    """

    kept: Data
    assessed: Data
    held_out: bool


def parts_of(data: Data, models: Sequence[TracedModel], settings: Assessment) -> Parts:
    """Return which part of the data a fusion sees, and on which the result is assessed.

    All of the data is for both where nothing can be held out: where fewer than 50 inputs
    would be (so of fewer than 500 by default), of data that comes in another order each time, and
    for models that admit one batch size only. The parts depend on the arguments only: with the same
    data and options every way to fuse keeps out the same rows.

    Raises
    ------
    InputError
        The options do not fit the models' outputs.
    """
    share = settings.held_out
    if _compared(models[0], settings) is None or share == 0.0:
        return Parts(data, data, held_out=False)
    least = math.ceil(_LEAST_HELD / share)
    if (
        any(one.static_batch is not None for one in models)
        or not keeps_order(data)
        or not has_rows(data, least)
    ):
        return Parts(data, data, held_out=False)
    return Parts(Part(data, share, held=False), Part(data, share, held=True), held_out=True)


def _compared(model: TracedModel, settings: Assessment) -> tuple[int, Kind] | None:
    """Return which output is compared and as what; None for none."""
    if settings.outputs == "none":
        return None
    floating = [i for i, (_, dtype) in enumerate(model.outputs) if dtype.is_floating_point]
    if not floating:
        if settings.outputs == "auto":
            return None
        raise InputError(
            f"assessment.outputs={settings.outputs!r} needs a floating output, which the models do "
            "not have: take 'auto' or 'none'"
        )
    shape = (-1, *model.outputs[floating[0]][0])
    axis, count = settings.axis, len(shape)
    is_axis = -count < axis < count and axis != 0 and shape[axis] >= 2
    is_wanted = settings.outputs == "classes" or (
        settings.outputs == "auto" and axis != Assessment.axis
    )
    if is_wanted and not is_axis:
        raise InputError(
            f"assessment.axis={axis} must be an axis with at least 2 classes; the outputs have the "
            f"shape ({', '.join(['batch', *map(str, shape[1:])])})"
        )
    # Images have four axes. Of them only the caller can say whether they are classes.
    looks_like = is_axis and (count in (2, 3) or axis != Assessment.axis)
    if settings.outputs == "classes" or (settings.outputs == "auto" and looks_like):
        return floating[0], "classes"
    return floating[0], "values"


class OutputCache:
    """Parents' outputs on the inputs of an assessment, kept for further fusions of these parents.

    They are kept by the inputs' values, as long as the model lives, and as they take at most 4 MB
    a model. A model's weights must not change meanwhile.
    """

    def __init__(self) -> None:
        self._outputs: WeakKeyDictionary[nn.Module, dict[Hashable, Tensor]] = WeakKeyDictionary()

    @property
    def num_bytes(self) -> int:
        """The memory that the outputs take."""
        kept = (one for known in self._outputs.values() for one in known.values())
        return sum(one.numel() * one.element_size() for one in kept)

    def get(
        self, models: Sequence[TracedModel], inputs: tuple[Tensor, ...], output: int
    ) -> list[Tensor]:
        """Return each model's output of a number on some inputs."""
        values = tuple((one.shape, one.dtype, digest_of_values(one)) for one in inputs)
        return [self._get(one, inputs, output, (output, values)) for one in models]

    def _get(
        self, model: TracedModel, inputs: tuple[Tensor, ...], output: int, key: Hashable
    ) -> Tensor:
        known = self._outputs.setdefault(model.model, {})
        if key in known:
            return known[key]
        found: Tensor = model.run(inputs)[output]
        if found.numel() + sum(one.numel() for one in known.values()) <= _KEPT_NUMBERS:
            known[key] = found.detach().clone()  # it may be a view of something larger
        return found

    def forget(self) -> None:
        """Keep none of the outputs any longer."""
        self._outputs.clear()


# --- the comparison -----------------------------------------------------------------------------


@torch.no_grad()
def assess(
    model: nn.Module,
    problem: FusionProblem,
    parents: Mapping[str, TracedModel],
    weights: Sequence[float],
    parts: Parts,
    settings: Assessment,
    progress: Progress | None = None,
    known: OutputCache | None = None,
) -> FusionAssessment | None:
    """Compare the result and each parent with the parents together, in one pass of each.

    Parameters
    ----------
    model
        The fused network. Its mode stays as it is.
    problem
        What it was made from. Where outputs were matched the parents' move by its plans.
    parents
        All parents by name.
    weights
        Their weights, in order; they add up to 1.
    parts
        See :func:`parts_of`. At most 500 inputs are looked at, and 100 where none is held out.
    settings
        The options.
    known
        What the parents put out in earlier assessments.

    Returns
    -------
    FusionAssessment
        None where nothing is to be compared, or outputs were matched one model after another.
    """
    traced = tuple(parents.values())
    compared = _compared(traced[0], settings)
    if compared is None:
        return None
    output, kind = compared
    axis = settings.axis if kind == "classes" else -1
    plans = [one.output_plan for one in problem.parents]
    if len(plans) != len(traced):  # one after another: those of the last step
        if any(one is not None for one in plans):
            return None  # earlier steps have moved outputs, too
        plans = [None] * len(traced)
    sums = _Sums(kind, axis, tuple(weights))
    modes = {one: one.training for one in model.modules()}
    model.eval()
    try:
        for inputs in _chunks(parts, traced, output):
            if known is None:
                found = [one.run(inputs)[output] for one in traced]
            else:
                found = known.get(traced, inputs, output)
            outputs = [_moved(one, plan, axis) for one, plan in zip(found, plans, strict=True)]
            sums.add(outputs, call_model(model, inputs, traced[0].keywords)[output])
            if progress is not None:
                progress("assess", sums.num_inputs)
    finally:
        for one, mode in modes.items():
            one.training = mode
    return sums.assessment(tuple(parents), parts.held_out)


def _chunks(
    parts: Parts, models: Sequence[TracedModel], output: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs in chunks that are as large as memory allows, whatever the batches' sizes."""
    first, data = models[0], parts.assessed
    most = _MOST if parts.held_out else _MOST_SEEN
    rows = max(1, min(_CHUNK, _CHUNK_NUMBERS // max(1, math.prod(first.outputs[output][0]))))
    is_whole = any(one.static_batch is not None for one in models)
    held: list[tuple[Tensor, ...]] = []
    waiting = seen = 0
    for inputs in batches(data, first.example_inputs, first.keywords, device=first.device):
        if is_whole:
            yield inputs
        else:
            inputs = tuple(one[: most - seen] for one in inputs)
            held.append(inputs)
            waiting += inputs[0].size(0)
        seen += inputs[0].size(0)
        if waiting >= rows:
            yield from _joined(held, rows)
            held, waiting = [], 0
        if seen >= most:
            break
    if held:
        yield from _joined(held, rows)


def _joined(held: Sequence[tuple[Tensor, ...]], rows: int) -> Iterator[tuple[Tensor, ...]]:
    joined = [torch.cat(one).split(rows) for one in zip(*held, strict=True)]
    yield from zip(*joined, strict=True)


def _moved(outputs: Tensor, plan: Tensor | None, axis: int) -> Tensor:
    """Bring outputs that were matched into the result's order."""
    if plan is None or outputs.size(axis) != plan.size(0):
        return outputs
    channels = outputs.movedim(axis, -1)
    return (channels @ outgoing_map(plan).to(channels)).movedim(-1, axis)


class _Sums:
    """What is added up over the chunks: for each parent, and last for the result."""

    def __init__(self, kind: Kind, axis: int, weights: tuple[float, ...]) -> None:
        self.num_inputs = 0
        self._kind = kind
        self._axis = axis
        self._weights = weights
        self._are_probabilities: bool | None = None
        count = len(weights) + 1
        self._rows = 0
        self._distances: list[list[Tensor]] = [[] for _ in range(count)]  # of each input
        self._agreements = [0] * count
        self._apart, self._alike = 0.0, 0  # between the parents
        self._squares, self._total = 0.0, torch.zeros(())

    def add(self, parents: Sequence[Tensor], result: Tensor) -> None:
        """Add a chunk's outputs."""
        self.num_inputs += result.size(0)
        outputs = [one.double() for one in (*parents, result)]
        if self._kind == "classes":
            self._add_classes([one.movedim(self._axis, -1) for one in outputs])
        else:
            self._add_values(outputs)

    def _add_classes(self, outputs: list[Tensor]) -> None:
        if self._are_probabilities is None:
            self._are_probabilities = all(map(_are_probabilities, outputs[:-1]))
        if self._are_probabilities:
            logs = [one.clamp(min=0).log() for one in outputs]
        else:
            logs = [one.log_softmax(-1) for one in outputs]
        parts = [one.exp() for one in logs[:-1]]
        mean = _mean(parts, self._weights)
        chosen = mean.argmax(-1)
        choices = [one.argmax(-1) for one in logs]
        self._rows += chosen.numel()
        for i, (log, choice) in enumerate(zip(logs, choices, strict=True)):
            self._distances[i].append(_divergence(mean, log))
            self._agreements[i] += int((choice == chosen).sum())
        alike = torch.stack([one == choices[0] for one in choices[:-1]]).all(0)
        self._alike += int(alike.sum())
        self._apart += sum(
            float(_divergence(one, log).sum())
            for i, one in enumerate(parts)
            for j, log in enumerate(logs[:-1])
            if i != j
        )

    def _add_values(self, outputs: list[Tensor]) -> None:
        parents = outputs[:-1]
        mean = _mean(parents, self._weights)
        for i, one in enumerate(outputs):
            self._distances[i].append((one - mean).square().flatten(1).sum(1))
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
        pairs = len(names) * (len(names) - 1) * self.num_inputs
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
                if _is_nearer(one, distances[-1])
            ),
        )

    def _variation(self) -> float:
        """Return how much the parents' mean varies; of a constant one its squares."""
        around = self._squares - float(self._total.square().sum()) / self.num_inputs
        return max(around if around > 1e-9 * self._squares else self._squares, 1e-30)


def _mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean, in which a weight of 0 leaves out what is not finite."""
    mean = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        if weight > 0:
            mean = mean + weight * part
    return mean


def _divergence(of: Tensor, log: Tensor) -> Tensor:
    """Return each input's divergence of ``exp(log)`` from ``of``, the mean of its positions."""
    terms = (torch.special.xlogy(of, of) - of * log.clamp(min=-_FAR)).sum(-1)
    found = terms.reshape(len(terms), -1).mean(1).clamp(min=0)
    found = torch.where(found > _ROUNDING, found, 0.0 * found)
    return torch.where(torch.isfinite(found), found, math.inf)


def _is_nearer(one: Tensor, result: Tensor) -> bool:
    """Say whether distances of the inputs are clearly less than the result's."""
    if not bool(torch.isfinite(result).all()):
        return bool(torch.isfinite(one).all())
    further = result - one
    error = further.std() / math.sqrt(len(further)) if len(further) > 1 else torch.zeros(())
    return float(further.mean()) > max(_NOISE, _ERRORS * float(error))


def _are_probabilities(outputs: Tensor) -> bool:
    """Say whether the network ends in a softmax itself."""
    sums = outputs.sum(-1)
    return bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())


def _finite(distance: float | Tensor) -> float:
    return float(distance) if math.isfinite(distance) else math.inf


# --- the warning --------------------------------------------------------------------------------


def warn_of(assessment: FusionAssessment | None, config: FusionConfig) -> None:
    """Warn where a parent alone is clearly nearer than the result; say what to try.

    Warns
    -----
    AssessmentWarning
        See above.
    """
    if assessment is None or not assessment.nearer:
        return
    remedies = ["more data", "a wider target (width='wide')", "training (clafusion.distill)"]
    if not isinstance(config.calibration, LeastSquares):
        remedies.insert(0, "calibration='least_squares'")
    warn(
        f"{assessment.verdict}. Try {', '.join(remedies[:-1])} or {remedies[-1]}", AssessmentWarning
    )
