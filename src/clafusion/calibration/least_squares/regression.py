"""Regress all layers of a fused network, anchored where the parents' features differ."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.calibration.least_squares.anchors import (
    FULL,
    Lean,
    Trial,
    anchored_weights,
    leans,
    nearest,
    output_distances,
)
from clafusion.calibration.least_squares.hidden import hidden_channels
from clafusion.calibration.least_squares.places import Place, regressed_places
from clafusion.calibration.least_squares.walks import Candidate, Rows, Walks
from clafusion.calibration.outputs import is_exact
from clafusion.config import LeastSquares
from clafusion.errors import FusionWarning, warn
from clafusion.merging.copies import without_copies
from clafusion.merging.mean import average
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data, Progress, batches, in_chunks

__all__ = ["Regression", "regress_anchored"]

_CHUNK = 125  # inputs whose patches are held at once
_MOST_OUTPUTS = 1 << 25  # numbers in the outputs of a chunk
_MOST_THINNED = 1 << 23  # the same where the outputs are those of a language model
_FEW = 8  # inputs in a chunk at the least
_WANTED = 100  # inputs; of fewer a warning speaks
_HELD = 1 << 32  # bytes of activations that all networks together may hold
_VALUES = 3  # of a network that are alive at a time: what a layer reads and writes, and a goal


@dataclass(frozen=True)
class Regression:
    """A fused state whose layers were regressed.

    Attributes
    ----------
    state
        Its parameters and buffers.
    anchor
        How far its interior leans towards one parent.
    toward
        The name of that parent.
    solved
        The names of those that were solved for, or taken from one parent as they are.
    """

    state: MutableMapping[str, Tensor]
    anchor: float
    toward: str
    solved: frozenset[str]


@torch.no_grad()
def regress_anchored(
    problem: FusionProblem,
    data: Data,
    settings: LeastSquares,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Regression:
    """Average and regress, the interior anchored as it should be.

    Of several ways to lean (see :func:`leans`) that one is taken whose outputs come nearest to the
    parents' weighted mean: regressed on a part of the inputs and compared on another, or where
    inputs are few, all of them regressed and compared on all inputs. Of one parent's interior alone
    the trial regresses the outputs only, for the rest is that parent's already.
    """
    if problem.merged is None:  # else models of tasks of their own may be equal
        problem = without_copies(problem)
    tried = leans(problem, settings)
    plain = average(problem)
    if not problem.frozen and any(
        one.is_identity and one.weights.overall >= 1.0 and not one.weights.own
        for one in problem.parents
    ):
        return _regression(problem, plain, tried[0], frozenset(plain))  # that parent: as it is
    if is_exact(problem, plain, data):
        return _regression(problem, plain, tried[0], frozenset(plain))
    averages = _Averages(problem, plain)
    del plain
    in_parts = not problem.target.takes_whole_batches
    # A trial holds a part of the inputs only, however many are tried.
    inputs, owners = _inputs(
        problem, data, settings, min(len(tried), 2 if in_parts else len(tried))
    )
    rows = Rows(seed=seed)
    if len(tried) > 1 and in_parts:
        trial = Trial.of(inputs, min(math.prod(shape[:-1]) for shape, _ in problem.target.outputs))
        if trial is not None:
            report, progress = _shares(problem, progress, inputs, trial, len(tried))
            far = _tried(problem, averages, tried, trial, settings.ridge, rows.fewer(), report)
            tried = (nearest(problem, settings.toward, tried, far),)
        elif settings.toward == "auto":  # to so few any parent's features fit
            tried = tuple(one for one in tried if one.anchor < FULL)
    walks = _regressed(problem, averages, tried, inputs, settings.ridge, rows, progress, owners)
    taken = tried[0]
    if len(tried) > 1:
        taken = nearest(problem, settings.toward, tried, walks.distances())
    return _regression(problem, walks.candidates[tried.index(taken)].state, taken, walks.solved)


class _Averages:
    """The parents' averages by lean, each made when it is asked for: they are large."""

    def __init__(self, problem: FusionProblem, plain: MutableMapping[str, Tensor]) -> None:
        axes = problem.target.axes_by_parameter
        self.problem = problem
        self.plain: MutableMapping[str, Tensor] | None = plain
        # Channels leave these in no group: the outputs' parameters, which are not anchored.
        self.of_outputs = {
            name: plain[name]
            for name in plain
            if all(one.direction == "in" for _, one in axes.get(name, ()))
        }

    def take(self, lean: Lean) -> MutableMapping[str, Tensor]:
        """Return an average of its own, with the interior anchored."""
        if lean.anchor == 0.0:
            plain, self.plain = self.plain, None
            return average(self.problem) if plain is None else plain
        self.plain = None
        made = average(self.problem, anchored_weights(self.problem, lean))
        for name, tensor in self.of_outputs.items():
            made[name] = tensor
        return made


def _tried(
    problem: FusionProblem,
    averages: _Averages,
    tried: Sequence[Lean],
    trial: Trial,
    ridge: float,
    rows: Rows,
    progress: Progress | None,
) -> list[float]:
    """Return how far the outputs are off with each lean, squared, given a part of the inputs.

    One parent's interior alone stays as it is, so that only the outputs are regressed. These leans
    are tried after the others: no more of the states are held at a time.
    """
    found: dict[Lean, float] = {}
    whole = _count(trial.regressed)
    for keeps_interior in (False, True):
        group = [one for one in tried if (one.anchor == FULL) == keeps_interior]
        if not group:
            continue
        first, last = (
            whole * count // len(tried) for count in (len(found), len(found) + len(group))
        )
        walks = _regressed(
            problem,
            averages,
            group,
            trial.regressed,
            ridge,
            rows,
            _part_of(progress, whole, first, last),
            keeps_interior=keeps_interior,
        )
        states = [one.state for one in walks.candidates]
        far = output_distances(problem, states, trial.compared)
        found |= zip(group, far, strict=True)
    return [found[one] for one in tried]


def _regression(
    problem: FusionProblem, state: MutableMapping[str, Tensor], lean: Lean, solved: frozenset[str]
) -> Regression:
    return Regression(state, lean.anchor, problem.names[lean.toward], solved)


def _shares(
    problem: FusionProblem,
    progress: Progress | None,
    inputs: Sequence[tuple[Tensor, ...]],
    trial: Trial,
    candidates: int,
) -> tuple[Progress | None, Progress | None]:
    """Share the progress between the trial of all candidates and the regression of the best one.

    An input takes the trial a pass of all parents and of each candidate. Both report inputs of the
    whole calibration.
    """
    parents = len(problem.parents)
    whole, tried = _count(inputs), _count(trial.regressed)
    of_trial, of_rest = tried * (parents + candidates), whole * (parents + 1)
    first = whole * of_trial // (of_trial + of_rest)
    return _part_of(progress, tried, 0, first), _part_of(progress, whole, first, whole)


def _part_of(progress: Progress | None, count: int, first: int, last: int) -> Progress | None:
    """Return what reports ``count`` inputs of a part as those from ``first`` to ``last`` of all."""
    if progress is None:
        return None
    told = progress

    def report(stage: str, done: int) -> None:
        told(stage, first + (last - first) * done // count)

    return report


def _count(inputs: Sequence[tuple[Tensor, ...]]) -> int:
    return sum(one[0].size(0) for one in inputs)


def _inputs(
    problem: FusionProblem, data: Data, settings: LeastSquares, num_candidates: int
) -> tuple[list[tuple[Tensor, ...]], list[int]]:
    """Return the inputs to regress on, in batches that are held at once, and the owners of each."""
    samples = min(settings.samples, _most_inputs(problem, num_candidates))
    numbers = sum(math.prod(shape) for shape, _ in problem.target.outputs)
    most = _MOST_OUTPUTS if problem.target.thinning is None else _MOST_THINNED
    chunk = min(_CHUNK, max(most // max(numbers, 1), _FEW))
    where = problem.target.device
    inputs: list[tuple[Tensor, ...]] = []
    owners: list[int] = []
    if problem.owners:
        of_data = batches(data, problem.target.example_inputs, problem.target.keywords)
        for batch, owner in zip(of_data, problem.owners, strict=True):
            left = samples - _count(inputs)
            if left > 0:
                inputs += in_chunks([batch], problem.target, left, chunk, device=where)
                owners += [owner] * (len(inputs) - len(owners))
    else:
        inputs += in_chunks(data, problem.target, samples, chunk, device=where)
    num_inputs = _count(inputs)
    if num_inputs < _WANTED:
        warn(
            f"least squares has {num_inputs} inputs to learn from; with fewer than {_WANTED} it "
            "may fit these and no others, which figures on the same inputs do not show: give more, "
            'or take calibration="repair"',
            FusionWarning,
        )
    return inputs, owners


def _regressed(
    problem: FusionProblem,
    averages: _Averages,
    tried: Sequence[Lean],
    inputs: Sequence[tuple[Tensor, ...]],
    ridge: float,
    rows: Rows,
    progress: Progress | None = None,
    owners: Sequence[int] = (),
    *,
    keeps_interior: bool = False,
) -> Walks:
    """Regress the averages of several leans side by side."""
    fused = [averages.take(one) for one in tried]
    places = regressed_places(problem, fused[0])
    states = [one.traced.state() for one in problem.parents]
    hidden = {}
    if problem.merged is None:
        hidden = hidden_channels(problem, places, states, problem.target.state())
    candidates = [
        Candidate(_contiguous(state), _weights(problem, places, lean), keeps_interior)
        for lean, state in zip(tried, fused, strict=True)
    ]
    del fused
    walks = Walks(problem, candidates, inputs, places, hidden, states, rows, owners)
    num_inputs = sum(walks.batch_sizes)
    for done, place in enumerate(places):
        walks.solve(place, ridge)
        if progress is not None:
            progress("calibrate", (done + 1) * num_inputs // len(places))
    return walks


def _contiguous(state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
    """Lay out a state's tensors as in a file, in place."""
    for name in state:
        tensor = state[name]
        if not tensor.is_contiguous():
            state[name] = tensor.contiguous()
    return state


def _most_inputs(problem: FusionProblem, num_candidates: int) -> int:
    """Return for how many inputs all activations at one layer can be held."""
    networks = [one.traced for one in problem.parents] + [problem.target] * num_candidates
    sizes = [
        max(
            (
                math.prod(point.positions) * len(point.groups)
                for layer in network.layers
                for point in layer.hook_points
            ),
            default=1,
        )
        for network in networks
    ]
    item = next(iter(problem.target.state().values())).element_size()
    return max(_HELD // (_VALUES * item * sum(sizes)), 1)


def _weights(problem: FusionProblem, places: Sequence[Place], lean: Lean) -> dict[str, list[float]]:
    """Return the parents' weights at each layer, by its node."""
    own = [one.weights for one in problem.parents]
    inside = anchored_weights(problem, lean)
    found = {}
    for place in places:
        given = own if place.is_output else inside
        # The sums on a stream are the work of all its layers: no layer's own weight is theirs.
        is_sum = place.shortcut is not None
        found[place.affine.name] = [
            one.overall if is_sum else one.of(place.point.weight) for one in given
        ]
    return found
