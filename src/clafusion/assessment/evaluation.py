r"""How good networks are where there are labels: accuracy and loss, also of the parents together.

Of classes the loss is the mean cross-entropy in nats, :math:`-\operatorname{mean}_x \log p_{y(x)}`,
of values the mean squared error. Labels of -100 do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clafusion.assessment.nearness import Kind
from clafusion.errors import ClafusionError, InputError
from clafusion.execution.call import call_model, device_of, in_eval_mode
from clafusion.merging.combination import are_probabilities
from clafusion.profiling.batches import (
    Data,
    keeps_order,
    labels_in,
    num_graphs,
    num_rows,
)
from clafusion.table import Table
from clafusion.weights.messages import one_line

__all__ = [
    "MEANS",
    "Evaluation",
    "Network",
    "Score",
    "checked_labels",
    "evaluated",
    "labelled",
    "network_of",
]

Network: TypeAlias = Callable[[tuple[Tensor, ...]], Tensor]
"""Inputs, in a batch -> the output that counts."""

MEANS = ("mean of outputs", "mean of probabilities")
"""The networks together, as an ensemble."""
_IGNORED = -100


@dataclass(frozen=True)
class Score:
    """How good a network is.

    Attributes
    ----------
    loss
        The mean cross-entropy in nats, or the mean squared error; inf where it is not finite.
    accuracy
        Of classes: the share of the labels that are chosen, from 0 to 1. Else None.
    """

    loss: float
    accuracy: float | None = None

    def __str__(self) -> str:
        right = "" if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %, "
        return f"{right}loss {self.loss:.3g}"


@dataclass(frozen=True)
class Evaluation:
    """How good networks are on inputs with labels.

    Attributes
    ----------
    kind
        ``"classes"`` or ``"values"``.
    scores
        The score of each network by name; of several also of their mean: of ``"mean of outputs"``,
        and of classes of ``"mean of probabilities"``.
    num_inputs
        How many inputs there were.
    """

    kind: Kind
    scores: Mapping[str, Score]
    num_inputs: int

    def __repr__(self) -> str:
        shown = [
            f"{name} loss {one.loss:.3g}"
            if one.accuracy is None
            else f"{name} {100 * one.accuracy:.1f} %"
            for name, one in self.scores.items()
        ]
        return f"<Evaluation on {self.num_inputs} inputs: {', '.join(shown)}>"

    @property
    def table(self) -> Table:
        """One row for each network."""
        rows = [(name, one.accuracy, one.loss) for name, one in self.scores.items()]
        return Table.of(("network", "accuracy", "loss"), rows)

    def to_frame(self) -> Any:
        """Return :attr:`table` as a ``pandas.DataFrame``; errors are those of ``Table``."""
        return self.table.to_frame()

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain data for JSON; None for infinity."""
        return {
            "kind": self.kind,
            "scores": {
                name: {
                    "accuracy": one.accuracy,
                    "loss": one.loss if math.isfinite(one.loss) else None,
                }
                for name, one in self.scores.items()
            },
            "num_inputs": self.num_inputs,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation of which :meth:`to_dict` gave the facts."""
        scores = {
            name: Score(math.inf if one["loss"] is None else one["loss"], one["accuracy"])
            for name, one in facts["scores"].items()
        }
        return cls(facts["kind"], scores, facts["num_inputs"])


def labelled(inputs: Data, labels: Any) -> tuple[Data, Tensor]:
    """Return inputs and their labels: those given, or where there are none those in the inputs.

    Parameters
    ----------
    inputs
        As for :func:`clafusion.evaluate`.
    labels
        What was given for them, or None.

    Raises
    ------
    InputError
        As for :func:`checked_labels`; or none were given, and the inputs have none.
    """
    if labels is None:
        if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], Tensor):
            inputs, labels = inputs
        else:
            labels = labels_in(inputs)
    return inputs, checked_labels(labels, inputs)


def checked_labels(labels: Any, inputs: Data) -> Tensor:
    """Return labels as a tensor; refuse those that cannot be the inputs'.

    Raises
    ------
    InputError
        There are more or fewer than inputs, they are of another kind, or the inputs come in another
        order each time.
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels must be numbers; got {type(labels).__name__}") from error
    if found.dtype == torch.bool or found.is_complex():
        raise InputError(f"labels must be whole or real numbers; got {found.dtype}")
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        count = int((~torch.isfinite(found)).sum())
        raise InputError(f"labels hold {count} NaN or infinite values: leave those inputs out")
    counts = {num_rows(inputs): "input"}
    if graphs := num_graphs(inputs):
        counts = {num_rows(inputs): "node", graphs: "graph"}
    if found.dim() == 0 or len(found) not in counts:
        size = "a single number" if found.dim() == 0 else f"{len(found)} entries"
        shown = " or ".join(f"{what}, {count}" for count, what in counts.items())
        raise InputError(f"labels must have one entry for each {shown}; got {size}")
    if not keeps_order(inputs):
        raise InputError(
            "labels need inputs in one order, and this data comes in another each time: read it "
            "with shuffle=False"
        )
    return found if found.is_floating_point() else found.long()


def network_of(
    model: nn.Module,
    keywords: tuple[str, ...] = (),
    output: int = 0,
    who: str = "the network",
) -> Network:
    """Return a module as :func:`evaluated` takes it: in eval mode, on its own device.

    Parameters
    ----------
    model
        The module.
    keywords
        The names of its inputs, or none.
    output
        Which of its outputs counts.
    who
        How errors call it.

    Returns
    -------
    Network
        It raises InputError where the module does not run on the inputs, or puts out no tensor.
    """

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        device = device_of(model)
        given = tuple(one if device is None else one.to(device) for one in inputs)
        with in_eval_mode(model):
            try:
                outputs = call_model(model, given, keywords)
            except (ClafusionError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                shown = "; ".join(f"{one.dtype} of shape {tuple(one.shape)}" for one in given)
                raise InputError(
                    f"{who} does not run on a batch of data ({shown}): {one_line(error)}"
                ) from error
        if output >= len(outputs):
            raise InputError(
                f"{who} puts out {len(outputs)} tensors, and the one at position {output} counts"
            )
        return outputs[output]

    return run


@torch.no_grad()
def evaluated(
    networks: Mapping[str, Network],
    weights: Sequence[float],
    inputs: Iterable[tuple[Tensor, ...]],
    labels: Tensor,
    *,
    axis: int = -1,
    apart: Sequence[str] = (),
) -> Evaluation:
    """Do what ``clafusion.evaluate`` does, with inputs in batches of tensors.

    Parameters
    ----------
    networks
        The networks by name.
    weights
        Of those that are not ``apart``, in order.
    inputs, labels
        The inputs in batches, and all their labels.
    axis
        The axis of the classes.
    apart
        The names of those networks that have no part in the mean.
    """
    sums: dict[str, _Sum] = {}
    is_classes = not labels.is_floating_point()
    seen = 0
    for batch in inputs:
        outputs = {name: run(batch).double().cpu() for name, run in networks.items()}
        rows = next(iter(outputs.values()))  # of graphs, where others have one for each input
        for name, one in outputs.items():
            if one.shape != rows.shape:
                raise InputError(
                    f"models put out other shapes: {next(iter(outputs))!r} {tuple(rows.shape)} and "
                    f"{name!r} {tuple(one.shape)} in a batch. Only networks of the same outputs "
                    "can be compared by the same labels: evaluate them one by one"
                )
        size = len(rows) if rows.dim() else len(batch[0])
        wanted = labels[seen : seen + size]
        seen += size
        parts = [value for name, value in outputs.items() if name not in apart]
        if is_classes:
            found = dict(_class_scores(outputs, parts, weights, wanted, axis))
        else:
            found = dict(_value_scores(outputs, parts, weights, wanted))
        for name, (loss, right, count) in found.items():
            sums.setdefault(name, _Sum()).add(loss, right, count)
    if not seen or any(one.count == 0 for one in sums.values()):
        raise InputError("labels has no entry that counts")
    return Evaluation(
        "classes" if is_classes else "values",
        {name: one.score(is_classes=is_classes) for name, one in sums.items()},
        seen,
    )


class _Sum:
    def __init__(self) -> None:
        self.loss, self.right, self.count = 0.0, 0, 0

    def add(self, loss: float, right: int, count: int) -> None:
        self.loss, self.right, self.count = self.loss + loss, self.right + right, self.count + count

    def score(self, *, is_classes: bool) -> Score:
        loss = self.loss / self.count
        return Score(
            loss if math.isfinite(loss) else math.inf,
            self.right / self.count if is_classes else None,
        )


def _class_scores(
    outputs: Mapping[str, Tensor],
    parts: Sequence[Tensor],
    weights: Sequence[float],
    labels: Tensor,
    axis: int,
) -> Iterator[tuple[str, tuple[float, int, int]]]:
    _check_axis(axis, next(iter(outputs.values())))
    moved = {name: one.movedim(axis, -1) for name, one in outputs.items()}
    parts = [one.movedim(axis, -1) for one in parts]
    shape = next(iter(moved.values())).shape
    if labels.shape != shape[:-1]:
        raise InputError(
            f"labels have the shape {tuple(labels.shape)} in a batch, and the outputs, of classes, "
            f"{tuple(shape)}: give one label for each of {tuple(shape[:-1])}, or real numbers for "
            "values"
        )
    counts = labels != _IGNORED
    wrong = counts & ((labels < 0) | (labels >= shape[-1]))
    if bool(wrong.any()):
        raise InputError(
            f"labels has the class {int(labels[wrong][0])}, and the networks put out {shape[-1]} "
            "classes, from 0 on"
        )
    logs = {name: _logs(one) for name, one in moved.items()}
    if len(parts) > 1:
        shares = list(zip(parts, weights, strict=True))
        if not all(map(are_probabilities, parts)):
            logs[MEANS[0]] = _logs(torch.stack([w * one for one, w in shares]).sum(0))
        mean = torch.stack([w * _logs(one).exp() for one, w in shares]).sum(0)
        logs[MEANS[1]] = mean.clamp(min=1e-300).log()
    chosen = labels.clamp(min=0)
    for name, log in logs.items():
        losses = -log.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        # What is not a number chooses nothing; argmax would say that it chooses the first class.
        right = (log.argmax(-1) == labels) & counts & ~log.isnan().any(-1)
        yield name, (float(losses[counts].sum()), int(right.sum()), int(counts.sum()))


def _check_axis(axis: int, outputs: Tensor) -> None:
    dims = outputs.dim()
    if isinstance(axis, bool) or not isinstance(axis, int) or not -dims <= axis < dims:
        raise InputError(
            f"axis, that of the classes, must be a whole number from {-dims} to {dims - 1} for "
            f"outputs of shape {tuple(outputs.shape)}; got {axis!r}"
        )


def _logs(outputs: Tensor) -> Tensor:
    if are_probabilities(outputs):
        return outputs.clamp(min=1e-300).log()
    return outputs.log_softmax(-1)


def _value_scores(
    outputs: Mapping[str, Tensor],
    parts: Sequence[Tensor],
    weights: Sequence[float],
    labels: Tensor,
) -> Iterator[tuple[str, tuple[float, int, int]]]:
    every = dict(outputs)
    if len(parts) > 1:
        shares = zip(parts, weights, strict=True)
        every[MEANS[0]] = torch.stack([w * one for one, w in shares]).sum(0)
    for name, one in every.items():
        if one.shape != labels.shape and one.numel() != labels.numel():
            raise InputError(
                f"labels have the shape {tuple(labels.shape)} in a batch, and the outputs "
                f"{tuple(one.shape)}: values need labels of the outputs' shape, and "
                "classes labels of whole numbers"
            )
        gaps = (one - labels.reshape(one.shape).double()).square()
        yield name, (float(gaps.sum()), 0, gaps.numel())
