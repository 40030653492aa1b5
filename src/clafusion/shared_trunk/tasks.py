r"""How good a network of several tasks is: over the classes of all, and on each task alone.

The outputs of the tasks stand one behind the other, so that the largest of all is a choice among
all classes. There are two ways to compare outputs of heads that never saw each other's classes:

.. math:: \arg\max_{p, c}\; z_{p,c} \qquad\text{or}\qquad
          \arg\max_{p, c}\; \operatorname{softmax}(z_p)_c

of the logits :math:`z_p` themselves, or of each task's probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from clafusion.assessment.comparison import Comparison
from clafusion.assessment.evaluation import Evaluation, Network, Score
from clafusion.assessment.nearness import Nearness
from clafusion.errors import InputError
from clafusion.merging.combination import are_probabilities
from clafusion.results import RESULT
from clafusion.tracing.model import TracedModel

__all__ = ["BY_PROBABILITIES", "SIDE_BY_SIDE", "check_classes", "nearness", "task_scores"]

SIDE_BY_SIDE = "side by side"
"""What tables call the parents with their outputs one behind the other: the ensemble."""
BY_PROBABILITIES = ", by probabilities"
_IGNORED = -100


def check_classes(models: Mapping[str, TracedModel]) -> tuple[int, ...]:
    """Return how many classes each network has.

    Raises
    ------
    InputError
        A network puts out something else than one score for each of two classes or more, or is a
        graph network.
    """
    sizes = []
    for called, model in models.items():
        if model.graph is not None:
            raise InputError(
                f"outputs='both' is not for graph networks, as {called} is one: edges pass beside "
                "every layer, so that no trunk ends anywhere. Give them the same classes and fuse "
                "them, or train one network on all classes (clafusion.distill)"
            )
        if model.num_classes is None:
            raise InputError(
                "outputs='both' is for classifiers, which put out (batch, classes) scores and "
                f"nothing else; {called} puts out {model.outputs_text}"
            )
        sizes.append(model.num_classes)
    return tuple(sizes)


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    ends = list(accumulate(sizes))
    yield from (slice(end - size, end) for end, size in zip(ends, sizes, strict=True))


@torch.no_grad()
def nearness(
    result: Network,
    parents: Mapping[str, Network],
    sizes: Sequence[int],
    inputs: Iterable[tuple[Tensor, ...]],
    most: int,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Nearness, dict[str, Nearness], int]:
    """Return how near a network is to its parents; no labels are needed.

    First over the classes of all, to the parents side by side; then by name to each parent, on its
    own classes; and on how many inputs, at most ``most``.
    """
    sums = {name: Comparison("classes", -1, (1.0,)) for name in (RESULT, *parents)}
    seen = 0
    for batch in inputs:
        batch = tuple(one[: most - seen] for one in batch)
        own = result(batch)
        found = {name: run(batch) for name, run in parents.items()}
        sums[RESULT].add([torch.cat(list(found.values()), -1)], own)
        for (name, other), part in zip(found.items(), _parts(sizes), strict=True):
            sums[name].add([other], own[:, part])
        seen += len(own)
        progress(seen)
        if seen >= most:
            break
    near = {name: one.assessment(("",), False).result for name, one in sums.items()}
    return near.pop(RESULT), near, seen


@torch.no_grad()
def task_scores(
    result: Network,
    parents: Mapping[str, Network],
    sizes: Sequence[int],
    inputs: Iterable[tuple[Tensor, ...]],
    labels: Tensor,
) -> Evaluation:
    """Return accuracies and losses over the classes of all, and of each task on its own inputs.

    Parameters
    ----------
    result, parents
        The network, and its parents.
    sizes
        How many classes each parent has.
    inputs
        In batches.
    labels
        One for each input: its class among those of all tasks, one behind the other; -100 for none.

    Raises
    ------
    InputError
        The labels are no such classes.
    """
    sums: dict[str, list[float]] = {}
    seen = 0
    for batch in inputs:
        own = result(batch).double().cpu()
        wanted = labels[seen : seen + len(own)]
        _check(wanted, own, sizes)
        seen += len(own)
        of_parents = {name: run(batch).double().cpu() for name, run in parents.items()}
        for name, logs, classes in _logs(own, of_parents, sizes, wanted):
            counts = classes != _IGNORED
            chosen = logs.gather(1, classes.clamp(min=0).unsqueeze(1)).squeeze(1)
            right = (logs.argmax(1) == classes) & counts
            entry = sums.setdefault(name, [0.0, 0, 0])
            entry[0] -= float(chosen[counts].sum())
            entry[1] += int(right.sum())
            entry[2] += int(counts.sum())
    if not any(one[2] for one in sums.values()):
        raise InputError("labels has no entry that counts")
    scores = {
        name: Score(loss / count if math.isfinite(loss) else math.inf, right / count)
        for name, (loss, right, count) in sums.items()
        if count
    }
    return Evaluation("classes", scores, seen)


def _check(labels: Tensor, outputs: Tensor, sizes: Sequence[int]) -> None:
    total = sum(sizes)
    of_tasks = " + ".join(map(str, sizes))
    wanted = f"classes from 0 to {total - 1}, of {of_tasks} one task behind the other"
    if labels.is_floating_point() or labels.shape != outputs.shape[:1]:
        raise InputError(
            f"labels must be one whole number for each input, {wanted}; got {labels.dtype} of the "
            f"shape {tuple(labels.shape)} in a batch"
        )
    wrong = (labels != _IGNORED) & ((labels < 0) | (labels >= total))
    if bool(wrong.any()):
        raise InputError(
            f"labels must be {wanted}; got {int(labels[wrong][0])}. Those of a later task begin "
            "where those of the one before end"
        )


def _logs(
    own: Tensor, parents: Mapping[str, Tensor], sizes: Sequence[int], labels: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each row's name, logarithms of probabilities ``(num_inputs, classes)``, and labels."""
    for name, parts in (
        (RESULT, list(own.split(list(sizes), 1))),
        (SIDE_BY_SIDE, list(parents.values())),
    ):
        by_task = [_log(one) for one in parts]
        whole = torch.cat(by_task, 1) - math.log(len(parts))
        are_soft = all(map(are_probabilities, parts))
        yield name, whole if are_soft else torch.cat(parts, 1).log_softmax(1), labels
        if not are_soft:
            yield name + BY_PROBABILITIES, whole, labels
    for (name, other), part, one in zip(
        parents.items(), _parts(sizes), own.split(list(sizes), 1), strict=True
    ):
        inside = (labels >= part.start) & (labels < part.stop)
        classes = torch.where(inside, labels - part.start, _IGNORED)
        yield f"{RESULT} on {name}'s classes", _log(one), classes
        yield name, _log(other), classes


def _log(outputs: Tensor) -> Tensor:
    if are_probabilities(outputs):
        return outputs.clamp(min=1e-300).log()
    return outputs.log_softmax(1)
