"""The fused network and all parents, followed layer by layer on the same batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from clafusion.calibration.least_squares.choice import Choice
from clafusion.calibration.least_squares.equations import (
    NormalEquations,
    channels_last,
    chosen_positions,
    chosen_rows,
    features,
    stacked,
    store_solution,
)
from clafusion.calibration.least_squares.hidden import (
    Hidden,
    Kept,
    Part,
    reads_partner,
)
from clafusion.calibration.least_squares.places import Place
from clafusion.correspondence.moving import move_parameter
from clafusion.correspondence.structure import structured_state
from clafusion.execution.call import State
from clafusion.execution.walk import Walk
from clafusion.merging.mean import weighted_mean
from clafusion.merging.problem import FusionProblem
from clafusion.threads import one_thread

__all__ = ["Walks"]

_ROWS = 100_000  # rows of each regression: many times the columns of common layers


class Walks:
    """The fused network and all parents, followed layer by layer on the same batches."""

    def __init__(
        self,
        problem: FusionProblem,
        state: dict[str, Tensor],
        inputs: Sequence[tuple[Tensor, ...]],
        places: Sequence[Place],
        ridge: float,
        states: Sequence[State],
        hidden: Mapping[str, Hidden],
        choices: Mapping[str, Choice],
    ) -> None:
        self.parents = problem.parents
        self.state = state
        self.ridge = ridge
        self.hidden = hidden
        self.choices = choices
        self.starts = {  # weights that choosing channels has given to their readers
            hidden[name].reader.affine.name: one.readout for name, one in choices.items()
        }
        target, models = problem.target, [one.traced for one in problem.parents]
        self.of_target = target.state()
        self.states = states
        self.structured = [structured_state(one.correspondence) for one in problem.parents]
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

    def solve(self, place: Place, weights: Sequence[float], generator: torch.Generator) -> None:
        """Regress one layer and put its new weights into the state."""
        hidden = self.hidden.get(place.affine.name)
        kept = () if hidden is None else self.choices[place.affine.name].kept
        if hidden is not None:
            self._carry(hidden, kept)
        start = self._start(place, hidden, kept)
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
                positions = goal[0, ..., 0].numel()
                chosen = chosen_positions(positions, len(start), _ROWS, self.num_inputs, generator)
            x = fused.reach(place.incoming)
            has_bias = place.point.bias is not None
            equations.add(
                features(place.affine, x, place.kernel_size, chosen, has_bias=has_bias),
                chosen_rows(goal, chosen),
                None if active is None else chosen_rows(active, chosen),
            )
        with one_thread():
            store_solution(place, self.state, equations.solved(self.ridge), equations)
        for key in self._reached(place):
            self._release(key)

    def _start(self, place: Place, hidden: Hidden | None, kept: Sequence[Kept]) -> Tensor:
        """Return the weights from which a layer starts: those that choosing channels gave it."""
        if place.affine.name in self.starts:
            return self.starts[place.affine.name]
        if hidden is None:
            return stacked(place, self.state)
        start = stacked(place, self.of_target)
        for part, one in zip(hidden.parts, kept, strict=True):
            if reads_partner(self.parents[part.parent].correspondence, place.kernel):
                into = hidden.channel_of[one.own]
                start[:, into] = stacked(place, self._aligned(place, hidden, part, one))[:, into]
        return start

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
