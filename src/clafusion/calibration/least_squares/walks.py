"""The fused network and all parents, followed layer by layer on the same batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from clafusion.calibration.channel_selection import keep_channels
from clafusion.calibration.least_squares.equations import (
    NormalEquations,
    channels_last,
    chosen_rows,
    incoming_node,
    patches,
    stacked,
    store_solution,
    with_ones,
)
from clafusion.calibration.least_squares.hidden import (
    Hidden,
    Kept,
    Part,
    hidden_channels,
    reads_partner,
)
from clafusion.calibration.least_squares.places import Place
from clafusion.correspondence.moving import move_parameter
from clafusion.correspondence.structure import structured_state
from clafusion.execution.walk import Walk
from clafusion.merging.mean import weighted_mean
from clafusion.merging.problem import FusionProblem
from clafusion.threads import one_thread

__all__ = ["Walks"]

_ROWS = 100_000  # rows of each regression: many times the columns of common layers
_CHOICE_ROWS = 30_000  # of choosing channels, in float64
_LEAST_ROWS = 4  # for each column, at least
_ENTRIES = 1 << 27  # a regression's inputs at the most: half a gigabyte


class Walks:
    """The fused network and all parents, followed layer by layer on the same batches."""

    def __init__(
        self,
        problem: FusionProblem,
        state: dict[str, Tensor],
        inputs: Sequence[tuple[Tensor, ...]],
        places: Sequence[Place],
        ridge: float,
    ) -> None:
        self.parents = problem.parents
        self.state = state
        self.ridge = ridge
        self.starts: dict[str, Tensor] = {}  # weights that choosing channels has given to readers
        target, models = problem.target, [one.traced for one in problem.parents]
        self.of_target = target.state()
        self.states = [one.state() for one in models]
        self.structured = [structured_state(one.correspondence) for one in problem.parents]
        self.hidden = hidden_channels(problem, places, self.states, self.of_target)
        self.uses = Counter(key for place in places for key in self._reached(place))
        kept = [{name for i, name in self.uses if i == one} for one in range(len(models))]
        self.fused = [Walk(target, one, state, set()) for one in inputs]
        self.walks = [  # batch, parent
            [
                Walk(model, one, of, set(names))
                for model, of, names in zip(models, self.states, kept, strict=True)
            ]
            for one in inputs
        ]
        self.num_inputs = sum(one[0].size(0) for one in inputs)

    def _reached(self, place: Place) -> Iterator[tuple[int, str]]:
        """Yield the parents' values that a regression asks for: parent, node."""
        for i, view in enumerate(place.views):
            if view is not None:
                yield i, view.node
        if hidden := self.hidden.get(place.affine.name):
            for part in hidden.parts:
                yield part.parent, incoming_node(part.reader)

    def solve(self, place: Place, weights: Sequence[float], generator: torch.Generator) -> None:
        """Regress one layer and put its new weights into the state."""
        hidden = self.hidden.get(place.affine.name)
        if hidden is not None:
            kept, start = self._choose(place, hidden, weights, generator)
        elif place.affine.name in self.starts:
            start = self.starts.pop(place.affine.name)
        else:
            start = stacked(place, self.state)
        equations = NormalEquations(start)
        chosen: Tensor | None = None
        for fused, walks in zip(self.fused, self.walks, strict=True):
            if hidden is not None:
                goal = side_by_side(place, hidden, kept, walks)
                active = goal.relu() if place.rectified else None
            else:
                goal, active = self._goal(place, walks, weights)
            if place.shortcut is not None:
                goal = goal - fused.reach(place.shortcut).movedim(place.point.axis, -1)
            if chosen is None:
                chosen = self._choice(goal, len(start), _ROWS, generator)
            x = fused.reach(place.incoming)
            equations.add(
                with_ones(place, patches(place.affine, x, place.kernel_size)[:, chosen]),
                chosen_rows(goal, chosen),
                None if active is None else chosen_rows(active, chosen),
            )
        with one_thread():
            store_solution(place, self.state, equations.solved(self.ridge), equations)
        for key in self._reached(place):
            self._release(key)

    def _choice(
        self, value: Tensor, num_columns: int, most: int, generator: torch.Generator
    ) -> Tensor:
        """Choose the positions of a value, channels last, of which rows are made."""
        positions = value[0, ..., 0].numel()
        rows = min(most, max(_ENTRIES // num_columns, _LEAST_ROWS * num_columns))
        count = min(positions, max(1, -(-rows // self.num_inputs)))
        chosen = torch.randperm(positions, generator=generator)[:count].sort().values
        return chosen.to(value.device)

    def _choose(
        self, place: Place, hidden: Hidden, weights: Sequence[float], generator: torch.Generator
    ) -> tuple[list[Kept], Tensor]:
        """Choose the channels that a layer writes.

        Returns for each part what it gives, and the weights from which to start. Those of the
        reading layer are kept for its turn.
        """
        readout, importance = self._readouts(hidden, weights)
        reader, parts = hidden.reader, hidden.parts
        gram = torch.zeros(len(readout), len(readout), dtype=torch.float64, device=readout.device)
        chosen: Tensor | None = None
        for walks in self.walks:
            sides = [
                patches(
                    part.reader,
                    walks[part.parent].reach(incoming_node(part.reader)),
                    reader.kernel_size,
                )
                for part in parts
            ]
            if chosen is None:
                chosen = self._choice(sides[0], len(readout), _CHOICE_ROWS, generator)
            x = with_ones(reader, torch.cat(sides, 2)[:, chosen]).double()
            with one_thread():
                gram += x.T @ x
        firsts = [0, *accumulate(part.columns.numel() for part in parts)]
        columns = [part.columns + first for part, first in zip(parts, firsts, strict=False)]
        with one_thread():
            kept, readout = keep_channels(
                gram,
                readout,
                torch.cat(columns),
                len(hidden.columns),
                importance=importance,
                kinship=self._kinship(hidden),
            )
        given = self._given(hidden, kept)
        self._carry(hidden, given)

        reader_start = readout.new_zeros(hidden.columns.numel(), readout.size(1))
        for one, theirs in zip(given, columns, strict=True):
            reader_start[hidden.columns[one.own].flatten()] = readout[theirs[one.taken].flatten()]
        self.starts[reader.affine.name] = torch.cat([reader_start, readout[firsts[-1] :]])

        start = self.starts.pop(place.affine.name, None)
        if start is not None:  # this layer reads chosen channels itself
            outputs = start.split([len(part.channel_of) for part in parts], 1)
            start = start.new_zeros(len(start), len(hidden.channel_of))
            for part, one, theirs in zip(parts, given, outputs, strict=True):
                start[:, hidden.channel_of[one.own]] = theirs[:, part.channel_of[one.taken]]
            return given, start
        start = stacked(place, self.of_target)
        for part, one in zip(parts, given, strict=True):
            if reads_partner(self.parents[part.parent].correspondence, place.kernel):
                into = hidden.channel_of[one.own]
                start[:, into] = stacked(place, self._aligned(place, hidden, part, one))[:, into]
        return given, start

    def _given(self, hidden: Hidden, kept: Tensor) -> list[Kept]:
        """Find a place for every channel that is kept: the target's own stay where they are."""
        firsts = [0, *accumulate(len(part.columns) for part in hidden.parts)]
        taken = [kept[(kept >= a) & (kept < b)] - a for a, b in pairwise(firsts)]
        own = [self.parents[part.parent].is_identity for part in hidden.parts]
        free = torch.ones(len(hidden.columns), dtype=torch.bool, device=kept.device)
        for stays, channels in zip(own, taken, strict=True):
            if stays:
                free[channels] = False
        places = torch.nonzero(free).squeeze(1)
        given = []
        for stays, channels in zip(own, taken, strict=True):
            if stays:
                given.append(Kept(channels, channels))
            else:
                into, places = places.tensor_split([len(channels)])
                given.append(Kept(into, channels))
        return given

    def _carry(self, hidden: Hidden, given: Sequence[Kept]) -> None:
        """Give every channel its row of those parameters that are between its two layers."""
        for i, axis in enumerate(hidden.carried):
            rows = self.state[axis.use.parameter].clone()
            for part, one in zip(hidden.parts, given, strict=True):
                theirs = part.carried[i]
                source = self.states[part.parent][theirs.use.parameter]
                into, taken = axis.positions[one.own, 0], theirs.positions[one.taken, 0]
                rows[into.to(rows.device)] = source[taken.to(source.device)].to(rows)
            self.state[axis.use.parameter] = rows

    def _kinship(self, hidden: Hidden) -> Tensor:
        r"""Return how alike all parents' channels, side by side, are by the transport plans.

        With ``U`` a plan normalised by rows and columns, whose singular values are at most 1, two
        parents' channels are alike by :math:`U_p U_q^\top`; no eigenvalue of all is negative.
        """
        normalised = []
        for part in hidden.parts:
            plan = self.parents[part.parent].plans[part.group]
            assert plan is not None, "a matched layer writes a group without a partner"
            scale = (plan.sum(1, keepdim=True) * plan.sum(0)).sqrt()
            normalised.append(plan / torch.where(scale > 0, scale, 1.0))
        stacked = torch.cat(normalised)
        alike = stacked @ stacked.T
        first = 0
        for one in normalised:  # within one parent each channel is like itself only
            last = first + len(one)
            alike[first:last, first:last] = torch.eye(len(one)).to(alike)
            first = last
        return alike

    def _readouts(self, hidden: Hidden, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return how a layer reads all parents' channels side by side.

        ``(num_features, num_outputs)`` and the outputs' importance. The outputs are the weighted
        mean, or where the reading layer's own outputs are to be chosen all parents' apart.
        """
        reader = hidden.reader
        readouts, calibration_points = [], []
        for part in hidden.parts:
            correspondence, state = (
                self.parents[part.parent].correspondence,
                self.states[part.parent],
            )
            own = {name: state[correspondence.names[name]] for name in reader.parameters}
            readouts.append(stacked(reader, own))
            calibration_points.append(correspondence.points[reader.point.node])
        if reader.affine.name in self.hidden:
            sizes = [one.size(1) for one in readouts]
            before = [0, *accumulate(sizes)]
            importance = torch.cat(
                [
                    one.new_full((size,), weights[part.parent])
                    for part, one, size in zip(hidden.parts, readouts, sizes, strict=True)
                ]
            )
            readouts = [
                F.pad(one, (first, before[-1] - first - one.size(1)))
                for one, first in zip(readouts, before, strict=False)
            ]
        else:
            readouts = [
                weights[part.parent]
                * self.parents[part.parent].moved(one, reader.point.node, other)
                for part, one, other in zip(hidden.parts, readouts, calibration_points, strict=True)
            ]
            importance = readouts[0].new_ones(readouts[0].size(1))
        if reader.point.bias is None:
            return torch.cat(readouts), importance
        bias = torch.stack([one[-1] for one in readouts]).sum(0, keepdim=True)
        return torch.cat([*(one[:-1] for one in readouts), bias]), importance

    def _aligned(self, place: Place, hidden: Hidden, part: Part, kept: Kept) -> dict[str, Tensor]:
        """Return a layer's parameters from a parent, with the channels that are kept of it."""
        parent, state = self.parents[part.parent], self.structured[part.parent]
        plan = torch.zeros(len(part.columns), len(hidden.columns), dtype=torch.float64)
        plan[kept.taken, kept.own] = 1.0
        plans = list(parent.plans)
        plans[part.group] = plan
        return {
            name: move_parameter(
                parent.correspondence, plans, name, state[name], self.of_target[name]
            )
            for name in place.parameters
        }

    def _goal(
        self, place: Place, walks: Sequence[Walk], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the goal of a layer and, before a ReLU, of what leaves that, channels last.

        Inside a block that some parents lack only the others count; what the block adds to its
        stream is zero for those.
        """
        origins = [one.correspondence.origins[place.point.weight] for one in self.parents]
        counted, values, actives, zero = [], [], [], 0.0
        for parent, origin, view, walk, weight in zip(
            self.parents, origins, place.views, walks, weights, strict=True
        ):
            if view is None:
                zero += weight if origin == "zero_residual" else 0.0
            else:
                value = channels_last(walk, view.node, view.point)
                counted.append(weight)
                values.append(parent.moved(value, place.point.node, view.point))
                if place.rectified:
                    actives.append(parent.moved(value.relu(), place.point.node, view.point))
        goal = weighted_mean(values, counted)
        if zero > 0:
            goal = sum(counted) / (sum(counted) + zero) * goal
        return goal, weighted_mean(actives, counted) if place.rectified else None

    def _release(self, key: tuple[int, str]) -> None:
        self.uses[key] -= 1
        if self.uses[key] == 0:
            index, name = key
            for walks in self.walks:
                walks[index].release(name)


def side_by_side(
    place: Place, hidden: Hidden, kept: Sequence[Kept], walks: Sequence[Walk]
) -> Tensor:
    """Return a layer's goal, channels last: of every channel what the parent it is of puts out."""
    goal: Tensor | None = None
    for part, one in zip(hidden.parts, kept, strict=True):
        view = place.views[part.parent]
        assert view is not None
        value = channels_last(walks[part.parent], view.node, view.point)
        if goal is None:
            goal = value.new_zeros(*value.shape[:-1], len(hidden.channel_of))
        goal[..., hidden.channel_of[one.own]] = value[..., part.channel_of[one.taken]]
    assert goal is not None
    return goal
