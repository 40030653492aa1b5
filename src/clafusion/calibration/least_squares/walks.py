"""The parents and the fused networks that come of them, followed layer by layer together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clafusion.calibration.least_squares.choice import (
    ROWS_AT_ONCE,
    choose_channels,
    hidden_features,
    hidden_inverse,
    hidden_positions,
    of_kept,
)
from clafusion.calibration.least_squares.equations import Equations, equations_for, squares
from clafusion.calibration.least_squares.hidden import Hidden, Kept, Part, reads_partner
from clafusion.calibration.least_squares.places import Place
from clafusion.calibration.least_squares.rows import (
    Positions,
    by_position,
    channels_last,
    chosen_positions,
    chosen_rows,
    features,
    incoming_node,
    rows_for,
)
from clafusion.calibration.least_squares.storing import is_stored, stacked, store_solution
from clafusion.correspondence.moving import move_parameter
from clafusion.correspondence.structure import structured_state
from clafusion.execution.call import State
from clafusion.execution.walk import Walk
from clafusion.merging.mean import counted, weighted_mean
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.masks import counted_inputs, counting_values, kept_positions, zeroed
from clafusion.threads import one_thread
from clafusion.transport.plan import TransportPlan

__all__ = ["Candidate", "Rows", "Walks"]


def _counting(values: Tensor, chosen: Tensor, kept: Tensor | None) -> Tensor:
    """Return the chosen rows of values, without those at padding."""
    rows = chosen_rows(values, chosen)
    return rows if kept is None else rows[kept]


@dataclass(frozen=True)
class Rows:
    """How many rows a regression takes: for each column, and at the least; and which.

    The seed chooses positions.
    """

    a_column: int = 64
    least: int = 40_000
    seed: int = 0

    def number(self, num_columns: int) -> int:
        """Return how many rows a regression with so many columns takes at the most."""
        return rows_for(num_columns, self.a_column, self.least)

    def fewer(self) -> Rows:
        """Return so few as tell which of several candidates is the best."""
        return Rows(self.a_column // 4, self.least // 16, self.seed)


@dataclass
class Candidate:
    """A fused network on its way: one of several ways to weigh the parents.

    Attributes
    ----------
    state
        Its weights; each layer's are replaced in turn.
    weights
        The parents' weights at each layer, by the name of its node.
    keeps_interior
        Whether only the layers that put out the outputs are regressed.
    walks
        Its runs, one for each batch.
    choices
        The hidden channels that are kept of each parent, by the layer that writes them.
    readouts
        How the layers start that read them, which is needed once, by the layer that writes them.
    """

    state: MutableMapping[str, Tensor]
    weights: Mapping[str, Sequence[float]]
    keeps_interior: bool = False
    walks: list[Walk] = field(default_factory=list)
    choices: dict[str, tuple[Kept, ...]] = field(default_factory=dict)
    readouts: dict[str, Tensor] = field(default_factory=dict)

    def solves(self, place: Place) -> bool:
        """Say whether a layer of it is regressed."""
        return place.is_output or not self.keeps_interior


class Walks:
    """All parents and all candidates, followed layer by layer on the same batches.

    Whatever the candidates, each parent runs once.
    """

    def __init__(
        self,
        problem: FusionProblem,
        candidates: Sequence[Candidate],
        inputs: Sequence[tuple[Tensor, ...]],
        places: Sequence[Place],
        hidden: Mapping[str, Hidden],
        states: Sequence[State],
        rows: Rows,
        owners: Sequence[int] = (),
    ) -> None:
        self.problem = problem
        self.owners = owners
        self.parents = problem.parents
        self.candidates = candidates
        self.hidden = hidden
        self.states = states
        self.rows = rows
        self.of_target = problem.target.state()
        self.structured = [structured_state(one.correspondence) for one in problem.parents]
        self.places = places
        self.writers = {one.reader.affine.name: name for name, one in hidden.items()}
        self.uses = Counter(key for place in places for key in self._reached(place))
        models = [one.traced for one in problem.parents]
        kept = [{name for i, name in self.uses if i == one} for one in range(len(models))]
        for candidate in candidates:
            candidate.walks = [Walk(problem.target, one, candidate.state, set()) for one in inputs]
        self.walks = [  # batch, parent
            [
                Walk(model, one, of, set(names))
                for model, of, names in zip(models, states, kept, strict=True)
            ]
            for one in inputs
        ]
        self.batch_sizes = [one[0].size(0) for one in inputs]
        # How many inputs share the rows of a value: in a graph network each row stands alone.
        is_graph = problem.target.graph is not None
        self.shared = [0] * len(inputs) if is_graph else self.batch_sizes
        self.masks = [kept_positions(problem.target, one) for one in inputs]
        # Of the positions of the regressions, and of those by which channels are chosen.
        self.of_rows, self.of_choices = (torch.Generator().manual_seed(rows.seed) for _ in range(2))

    @property
    def solved(self) -> frozenset[str]:
        """The names of the parameters that are solved for or chosen."""
        names = {name for place in self.places for name in place.parameters}
        carried = {axis.use.parameter for one in self.hidden.values() for axis in one.carried}
        return frozenset(names | carried)

    def _reached(self, place: Place) -> Iterator[tuple[int, str]]:
        """Yield the parents' values that a regression asks for: parent, node."""
        for i, view in enumerate(place.views):
            if view is not None:
                yield i, view.node
        if place.affine.name in self.hidden:
            for part in self.hidden[place.affine.name].parts:
                yield part.parent, incoming_node(part.reader)

    def solve(self, place: Place, ridge: float) -> None:
        """Regress one layer of every candidate and put its new weights into the state."""
        candidates = [one for one in self.candidates if one.solves(place)]
        if candidates:
            self._solve(place, candidates, ridge)
        for key in self._reached(place):
            self._release(key)

    def _solve(self, place: Place, candidates: Sequence[Candidate], ridge: float) -> None:
        """Regress one layer of the candidates that solve it, all by the same rows."""
        hidden = self.hidden.get(place.affine.name)
        if hidden is not None:
            self._choose(place, hidden, candidates)
            for one in candidates:
                self._carry(one.state, hidden, one.choices[place.affine.name])
        drawn: Positions | None = None
        starts = [self._start(place, hidden, one) for one in candidates]
        equations: list[Equations] = []
        size, channels = starts[0].shape
        first, view = next((i, one) for i, one in enumerate(place.views) if one is not None)
        for batch, (walks, count) in enumerate(zip(self.walks, self.shared, strict=True)):

            def positions(value: Tensor, count: int = count) -> Tensor:
                return by_position(value, place.kernel_size, count)

            values = [
                None if view is None else positions(channels_last(walk, view.node, view.point))
                for walk, view in zip(walks, place.views, strict=True)
            ]
            if drawn is None:
                every = next(one.size(1) for one in values if one is not None)
                num_rows = self.rows.number(size)
                counted = self._counted(first, view.node)
                drawn = chosen_positions(every, num_rows, counted, self.of_rows)
                num_rows = drawn.count * self._rows_in_all(values)
                equations = [equations_for(start, num_rows) for start in starts]
            chosen = drawn.of(batch)
            kept = self._kept(batch, first, view.node, view.point.axis, place.kernel_size, chosen)
            rows = [None if one is None else _counting(one, chosen, kept) for one in values]
            values.clear()
            self._drop_outputs(place, walks)
            moved = self._moved(place, rows) if hidden is None else []
            for one, sums in zip(candidates, equations, strict=True):
                if hidden is None:
                    weights = self._weights(batch, one.weights[place.affine.name])
                    goal, active = self._goal(place, moved, weights)
                else:
                    goal, active = self._hidden_goal(place, hidden, one, rows)
                walk = one.walks[batch]
                shortcut: Tensor | None = None
                if place.shortcut is not None:
                    beside = walk.reach(place.shortcut).movedim(place.point.axis, -1)
                    shortcut = _counting(positions(beside), chosen, kept)
                sides = features(
                    place.affine,
                    walk.reach_for(place.incoming, place.affine.name),
                    place.kernel_size,
                    chosen,
                    count,
                    has_bias=place.point.bias is not None,
                    room=channels,
                )
                sums.add(sides if kept is None else sides[:, kept], goal, active, shortcut)
        with one_thread():
            for one, sums in zip(candidates, equations, strict=True):
                solved = sums.solved(ridge)
                if not is_stored(place, one.state, solved):
                    store_solution(place, one.state, solved, sums)

    def _rows_in_all(self, values: Sequence[Tensor | None]) -> int:
        """Return how many rows a position has in all batches, about, given the first one's."""
        of_first = next(len(one) for one in values if one is not None)
        return math.ceil(of_first * sum(self.batch_sizes) / self.batch_sizes[0])

    def _drop_outputs(self, place: Place, walks: Sequence[Walk]) -> None:
        """Drop outputs with many numbers, once their rows are taken, where nobody compares them."""
        if len(self.candidates) > 1:
            return
        for walk, parent, view in zip(walks, self.parents, place.views, strict=True):
            thinning = parent.traced.thinning
            if view is not None and thinning is not None and view.node == thinning.node:
                walk.forget(view.node)

    def distances(self) -> list[float]:
        """Return how far each candidate's outputs are from the parents' weighted mean, squared."""
        weights = [one.weights.overall for one in self.parents]
        found = [0.0] * len(self.candidates)
        for batch, (walks, mask) in enumerate(zip(self.walks, self.masks, strict=True)):
            wanted = [walk.finish() for walk in walks]
            for i, one in enumerate(self.candidates):
                outputs = zip(one.walks[batch].finish(), *wanted, strict=True)
                tensors = [of for of in outputs if isinstance(of[0], Tensor)]
                names = self.problem.target.output_names
                for name, (output, *goals) in zip(names, tensors, strict=True):
                    if output.is_floating_point():
                        goal = weighted_mean([of.double() for of in goals], weights)
                        counting = counting_values(self.problem.target, name, output, mask)
                        found[i] += float(zeroed(output.double() - goal, counting).square().sum())
        return found

    def _counted(self, parent: int, node: str) -> int:
        """Return how many inputs without padding would have as many rows of a parent's node."""
        is_padded = any(one is not None for one in self.masks)
        if is_padded and node in self.parents[parent].traced.padded_axes:
            return counted_inputs(self.masks, self.batch_sizes)
        return sum(self.batch_sizes)

    def _kept(
        self, batch: int, parent: int, node: str, axis: int, kernel: Sequence[int], chosen: Tensor
    ) -> Tensor | None:
        """Return which rows count, where rows are a node's values at ``chosen`` positions.

        None for all. ``axis`` is that of the node's channels.
        """
        value = self.walks[batch][parent].reach(node)
        counting = counting_values(self.parents[parent].traced, node, value, self.masks[batch])
        if counting is None:
            return None
        shape = value.movedim(axis, -1).shape[:-1]
        last = counting.movedim(axis, -1).expand(*shape, 1)
        by_input = by_position(last, kernel, self.shared[batch])
        if len(chosen) > by_input.size(1):  # of a stride
            return None
        rows = chosen_rows(by_input, chosen)[:, 0]
        return None if bool(rows.all()) else rows.nonzero().squeeze(1)

    def _choose(self, place: Place, hidden: Hidden, candidates: Sequence[Candidate]) -> None:
        """Choose the hidden channels that a layer of some candidates writes."""
        gram: Tensor | None = None
        drawn: Positions | None = None
        kernel, first = hidden.reader.kernel_size, hidden.parts[0]
        node = incoming_node(first.reader)
        for batch, (walks, count) in enumerate(zip(self.walks, self.shared, strict=True)):
            values = [walks[part.parent].reach(incoming_node(part.reader)) for part in hidden.parts]
            if drawn is None:
                counted = self._counted(first.parent, node)
                drawn = hidden_positions(hidden, values, count, counted, self.of_choices)
            chosen = drawn.of(batch)
            # Copies of a channel differ by roundings, which float32 sums would hide.
            read = hidden_features(hidden, values, chosen, count)
            kept: Tensor | None = None
            if all(size == 1 for size in kernel):  # else a row holds several positions
                kept = self._kept(batch, first.parent, node, 1 if kernel else -1, kernel, chosen)
            for some in (read if kept is None else read[:, kept]).split(ROWS_AT_ONCE, 1):
                products = squares(some.double())
                gram = products if gram is None else gram.add_(products)
        assert gram is not None
        inverse = hidden_inverse(self.problem, hidden, gram)
        del gram, products, read, some  # of wide layers each is larger than the layer's weights
        name, last = place.affine.name, len(candidates) - 1
        for i, one in enumerate(candidates):
            one.choices[name], one.readouts[name] = choose_channels(
                self.problem,
                hidden,
                inverse if i == last else inverse.clone(),
                self.states,
                one.weights[name],
                reader_chooses=hidden.reader.affine.name in self.hidden,
            )

    def _start(self, place: Place, hidden: Hidden | None, candidate: Candidate) -> Tensor:
        """Return the weights from which a layer starts: those that choosing channels gave it."""
        name = place.affine.name
        kept = () if hidden is None else candidate.choices[name]
        readout = candidate.readouts.pop(self.writers[name], None) if name in self.writers else None
        if readout is not None:
            if hidden is None:
                return readout
            sizes = [len(part.channel_of) for part in hidden.parts]
            return of_kept(hidden, kept, readout.split(sizes, 1))
        if hidden is None:
            return stacked(place, candidate.state)
        # A channel whose parent reads something else there has no weights to start from.
        kernel = self.of_target[place.kernel]
        rows = place.num_features(kernel) + (place.point.bias is not None)
        start = kernel.new_zeros(len(place.point.groups), rows, dtype=torch.float64).T
        for part, one in zip(hidden.parts, kept, strict=True):
            if reads_partner(self.parents[part.parent].correspondence, place.kernel):
                into = hidden.channel_of[one.own]
                start[:, into] = stacked(place, self._aligned(place, hidden, part, one))[:, into]
        return start

    def _carry(
        self, fused: MutableMapping[str, Tensor], hidden: Hidden, given: Sequence[Kept]
    ) -> None:
        """Give every channel its row of those parameters that are between its two layers."""
        for i, axis in enumerate(hidden.carried):
            rows = fused[axis.use.parameter].clone()
            for part, one in zip(hidden.parts, given, strict=True):
                theirs = part.carried[i]
                source = self.states[part.parent][theirs.use.parameter]
                into, taken = axis.positions[one.own, 0], theirs.positions[one.taken, 0]
                rows[into.to(rows.device)] = source[taken.to(source.device)].to(rows)
            fused[axis.use.parameter] = rows

    def _aligned(self, place: Place, hidden: Hidden, part: Part, kept: Kept) -> dict[str, Tensor]:
        """Return a layer's parameters from a parent, with the channels that are kept of it."""
        parent, state = self.parents[part.parent], self.structured[part.parent]
        # Each channel copies one: those of other parents, which nobody reads, the first.
        taken = torch.zeros(len(hidden.columns), dtype=torch.int64)
        taken[kept.own.cpu()] = kept.taken.cpu()
        plans = list(parent.plans)
        plans[part.group] = TransportPlan.from_rows(taken, len(part.columns))
        return {
            name: move_parameter(
                parent.correspondence, plans, name, state[name], self.of_target[name]
            )
            for name in place.parameters
        }

    def _moved(
        self, place: Place, rows: Sequence[Tensor | None]
    ) -> list[tuple[Tensor, Tensor | None] | None]:
        """Bring all parents' rows, and what a ReLU makes of them, into the target's channels."""
        found: list[tuple[Tensor, Tensor | None] | None] = []
        for parent, view, own in zip(self.parents, place.views, rows, strict=True):
            if view is None or own is None:
                found.append(None)
                continue
            node = place.point.node
            active = parent.moved(own.relu(), node, view.point) if place.rectified else None
            found.append((parent.moved(own, node, view.point), active))
        return found

    def _weights(self, batch: int, weights: Sequence[float]) -> Sequence[float]:
        """Return the parents' weights on a batch: where it has an owner, that one counts alone."""
        if not self.owners:
            return weights
        return [float(i == self.owners[batch]) for i in range(len(self.parents))]

    def _goal(
        self,
        place: Place,
        moved: Sequence[tuple[Tensor, Tensor | None] | None],
        weights: Sequence[float],
    ) -> tuple[Tensor, Tensor | None]:
        """Return the goal of a layer and, before a ReLU, of what leaves that, channels last.

        Inside a block that some parents lack only the others count; what the block adds to its
        stream is zero for those. Of a channel only the parents count that have it.
        """
        node, parameter = place.point.node, place.point.weight
        having = [
            (one, weight, parent.covers(node))
            for parent, one, weight in zip(self.parents, moved, weights, strict=True)
            if one is not None
        ]
        values = [value for (value, _), _, _ in having]
        actives = [active for (_, active), _, _ in having if active is not None]
        given = [weight for _, weight, _ in having]
        masks = [mask for _, _, mask in having]
        active = weighted_mean(actives, counted(given, masks)) if actives else None
        for parent, one, weight in zip(self.parents, moved, weights, strict=True):
            if one is None and parent.correspondence.origins[parameter] == "zero_residual":
                values.append(torch.zeros_like(values[0]))
                given.append(weight)
                masks.append(parent.covers(node))
        return weighted_mean(values, counted(given, masks)), active

    def _hidden_goal(
        self, place: Place, hidden: Hidden, candidate: Candidate, rows: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Return what :meth:`_goal` does, of a layer whose channels are chosen of all parents."""
        shown = [own for part in hidden.parts if (own := rows[part.parent]) is not None]
        goal = of_kept(hidden, candidate.choices[place.affine.name], shown)
        return goal, goal.relu() if place.rectified else None

    def _release(self, key: tuple[int, str]) -> None:
        self.uses[key] -= 1
        if self.uses[key] == 0:
            index, name = key
            for walks in self.walks:
                walks[index].release(name)
