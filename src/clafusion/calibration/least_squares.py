r"""Calibration by least squares: regress every fused layer onto the parents' aligned outputs.

The fused network is walked in order, on its own activations. Each linear or convolution layer,
together with the BatchNorm behind it, is an affine map of its input ``x``; it is replaced by the
one that comes closest to what the parents put out at the same place,

.. math:: \min_{W, b} \sum \lVert W x + b - t \rVert^2 + \lambda \lVert W - W_0 \rVert^2,
          \qquad t = \sum_p v_p\, T_{out,p}^\top y_p,

with ``W_0`` the averaged weights and ``v_p`` the share of parent ``p``, of two or more. Four things
make it work across depths:

- The layer that a residual addition follows aims at the parents' *sums* minus the fused shortcut,
  so that each block corrects the error so far.
- Before a ReLU the goal is the mean of the parents' *activations*: where that is positive the layer
  should put it out, elsewhere anything below 0 will do (solved by majorisation, some rounds).
- A hidden channel that one layer writes and one layer reads needs no partner. Of all parents'
  channels side by side those are kept by which the reading layer's output is best told
  (:mod:`clafusion.calibration.channel_selection`).
- Networks that solve a task by different features have no good mean of them. So the interior may
  lean towards one parent, ``v`` between the shares ``w`` and that parent alone, and only the
  network's outputs aim at the weighted mean with ``w`` itself. Where the parents learnt different
  things it should not lean. Which of the two it is shows without labels: how far the fused
  network's outputs are from the weighted mean of the parents'.

The normal equations are in closed form: no labels and no gradient steps. Layer-wise regression onto
the parents' features is the idea of RegMean (arXiv 2212.09849) and PLeaS (arXiv 2407.02447); here
it crosses widths and depths, and layers see the fused network's own inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from clafusion.calibration.channel_selection import keep_channels
from clafusion.correspondence.correspondence import (
    Correspondence,
    axes_of,
    lifted_state,
    onto_itself,
)
from clafusion.execution.call import State
from clafusion.execution.walk import Walk
from clafusion.merging.blending import transport_vector, transported
from clafusion.merging.layer_weights import MergeWeights
from clafusion.profiling.batches import Data, batches
from clafusion.tracing.model import CalibrationPoint, GroupAxis, Layer, TracedModel
from clafusion.tracing.operations import bound_operands, convolution_geometry, op_name

__all__ = [
    "Lean",
    "Parent",
    "frame_as_parent",
    "interior_shares",
    "one_thread",
    "regress",
    "regress_leaning",
    "weighted_mean",
]

Lean = float | Literal["auto"]
LEANS = (0.0, 0.8)
"""What ``"auto"`` tries."""

_ROWS = 100_000  # rows of each regression: many times the columns of common layers
_CHOICE_ROWS = 30_000  # of choosing channels, in float64
_LEAST_ROWS = 4  # for each column, at least
_ENTRIES = 1 << 27  # a regression's inputs at the most: half a gigabyte
_CHUNK = 125  # inputs whose patches are held at once
_ROUNDS = 2  # of the majorisation of a ReLU
_MOST_FEATURES = 4096  # of all parents side by side: beyond, choosing channels takes minutes


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: its float64 sums depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Parent:
    """A network that is fused, and how it looks in the frame: the fused network's structure.

    Attributes
    ----------
    lifting
        What corresponds; ``lifting.deep`` is the frame, ``lifting.shallow`` this network.
    plans
        For each channel group of the frame ``(num_source, num_target)``, or None.
    shares
        Its share of each layer, and of the outputs.
    """

    lifting: Correspondence
    plans: Sequence[Tensor | None]
    shares: MergeWeights

    @property
    def is_frame(self) -> bool:
        """Whether this is the very network whose structure and channels are the frame."""
        return self.lifting.shallow is self.lifting.deep

    def moved(self, value: Tensor, point: CalibrationPoint, other: CalibrationPoint) -> Tensor:
        """Bring a value, channels last, from this network's ``other`` to the frame's ``calibration point``."""
        if self.is_frame:
            return value
        return transport_vector(
            value,
            self.plans,
            (point.groups, point.members),
            (other.groups, other.members),
            self.lifting.groups,
        )


def frame_as_parent(frame: TracedModel, shares: MergeWeights) -> Parent:
    """Return the network that gives the frame as one of those that are fused."""
    plans = [torch.eye(one.size, dtype=torch.float64) for one in frame.groups]
    return Parent(onto_itself(frame), plans, shares)


def interior_shares(shares: Sequence[MergeWeights], lean: float) -> list[MergeWeights]:
    """Return the parents' shares inside the network.

    ``lean`` in [0, 1] is how far they go from ``shares`` to the parent that has most of the
    outputs; of equals it is the last. Those of each layer add up to 1.
    """
    most = max(range(len(shares)), key=lambda i: (shares[i].overall, i))

    def leaning(given: Sequence[float]) -> tuple[float, ...]:
        found = [share + lean * (float(i == most) - share) for i, share in enumerate(given)]
        return (max(1.0 - sum(found[1:]), 0.0), *found[1:])

    overall = leaning([one.overall for one in shares])
    names = dict.fromkeys(name for one in shares for name in one.own)
    own = {name: leaning([one.of(name) for one in shares]) for name in names}
    return [
        MergeWeights(share, {name: of_layer[i] for name, of_layer in own.items()})
        for i, share in enumerate(overall)
    ]


def weighted_mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the mean of tensors by their shares of all; the last one where no share is above 0."""
    mean, total = values[0], shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total += share
        mean = torch.lerp(mean, value, share / total if total > 0 else 1.0)
    return mean


def regress(
    parents: Sequence[Parent],
    fused: State,
    data: Data,
    *,
    lean: float = 0.0,
    ridge: float = 1e-3,
    samples: int = 2000,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the fused state with every layer regressed onto the parents.

    Parameters
    ----------
    parents
        The networks, in one frame, with shares that add up to 1. Of equals the interior leans
        towards the last one: put the frame's own network there. Sums on a residual stream aim at
        the mean by the overall shares, inner layers at that by the shares of their own.
    fused
        The state averaged with the interior's shares.
    data
        Unlabelled inputs; the first ``samples`` are used. The activations at the current layer
        are held for all of them, of all parents and the fused network: this bounds the memory.
    lean
        How far the interior leans towards one parent: see :func:`interior_shares`.
    ridge
        The penalty on changes, relative to the mean square of the layer's inputs.
    samples
        How many inputs to use.
    seed
        Seed of the choice of positions.
    device
        Where to compute; default where the state is.
    progress
        Called with a text and the number of layers done.
    """
    state = {name: tensor.clone() for name, tensor in fused.items()}
    target = device or next(iter(state.values())).device
    places = _places(parents, state)
    inputs = list(_limited(data, parents[0].lifting.deep, target, samples))
    walks = _Walks(parents, state, inputs, places, ridge)
    shares = [one.shares for one in parents]
    inside = interior_shares(shares, lean)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for done, place in enumerate(places):
            is_output = bool((place.point.groups < 0).all())
            given = shares if is_output else inside
            # The sums on a stream are the work of all its layers: no layer's own share is theirs.
            is_sum = place.shortcut is not None
            of_layer = [one.overall if is_sum else one.of(place.point.weight) for one in given]
            walks.solve(place, of_layer, generator)
            if progress is not None:
                progress("calibrate", done + 1)
    return state


def regress_leaning(
    parents: Sequence[Parent],
    average: Callable[[Sequence[MergeWeights]], State],
    data: Data,
    *,
    lean: Lean,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Average and regress with the interior leaning as it should; return the state and the lean.

    ``average`` gives the averaged state for shares of the parents. ``"auto"`` tries all of
    ``LEANS`` and takes the one whose outputs come nearest to the parents' weighted mean.
    """
    shares = [one.shares for one in parents]
    if lean != "auto":
        leans: tuple[float, ...] = (lean,)
    else:
        leans = LEANS if max(one.overall for one in shares) < 1.0 else LEANS[:1]
    best: tuple[dict[str, Tensor], float] | None = None
    least = math.inf
    plain = average(shares)
    group_axes = parents[0].lifting.deep.axes_by_parameter
    # Channels leave these in no group: the outputs' parameters, which do not lean.
    outputs = {
        name
        for name in plain
        if all(group_axis.direction == "in" for _, group_axis in group_axes.get(name, ()))
    }
    for one in leans:
        leaning = average(interior_shares(shares, one))
        state = regress(
            parents,
            {name: plain[name] if name in outputs else leaning[name] for name in plain},
            data,
            lean=one,
            seed=seed,
            progress=progress,
        )
        distance = _distance(parents, state, data) if len(leans) > 1 else 0.0
        if best is None or distance < least:
            best, least = (state, one), distance
    assert best is not None
    return best


def _distance(parents: Sequence[Parent], state: State, data: Data, samples: int = 2000) -> float:
    """Return the squared distance of a network's outputs from the parents' weighted mean."""
    frame, graphs = parents[0].lifting.deep, [one.lifting.shallow for one in parents]
    device = next(iter(state.values())).device
    states = [one.state() for one in graphs]
    total = 0.0
    with torch.no_grad():
        for inputs in _limited(data, frame, device, samples):
            found = frame.run(inputs, state=state)
            wanted = [graph.run(inputs, state=of) for graph, of in zip(graphs, states, strict=True)]
            for one, *goals in zip(found, *wanted, strict=True):
                if isinstance(one, Tensor) and one.is_floating_point():
                    goal = weighted_mean(
                        [each.double() for each in goals], [p.shares.overall for p in parents]
                    )
                    total += float((one.double() - goal).square().sum())
    return total


class _NormalEquations:
    """A regression: sums over rows, and the rows themselves where a ReLU needs them again.

    It is solved for the change of the weights, so that where the parents agree nothing is left and
    the weights stay exactly as they are.
    """

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.inputs = start.new_zeros(len(start), len(start))
        self.residuals = torch.zeros_like(start)
        self.rows = 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, goal: Tensor, active: Tensor | None) -> None:
        """Add rows: inputs, what they should become, and what that should be after the ReLU."""
        self.inputs += (x.T @ x).double()
        self.residuals += (x.T @ (goal - x @ self.start.to(x))).double()
        self.rows += len(x)
        if active is not None:
            self._kept.append((x, active))

    def solved(self, ridge: float) -> Tensor:
        """Return the weights ``(num_features (+ 1), num_channels)``."""
        penalty = ridge * self.inputs.diagonal().mean().clamp(min=1e-30)
        identity = torch.eye(len(self.inputs), dtype=torch.float64, device=self.inputs.device)
        factor = torch.linalg.cholesky(self.inputs + penalty * identity)
        weights = self.start + torch.cholesky_solve(self.residuals, factor)
        for _ in range(_ROUNDS if self._kept else 0):
            residuals = torch.zeros_like(weights)
            for x, active in self._kept:
                found = x @ weights.to(x)
                goal = torch.where(active > 0, active, found.clamp(max=0))
                residuals += (x.T @ (goal - found)).double()
            weights = weights + torch.cholesky_solve(residuals, factor)
        return weights


@dataclass(frozen=True)
class _View:
    """Where a parent shows what a layer of the frame puts out: the channels and the node."""

    point: CalibrationPoint
    node: str


@dataclass(frozen=True)
class _Place:
    """A layer of the frame, and the nodes of all networks that it is regressed by.

    ``shortcut`` is what a residual addition adds to the layer's output, where the layer aims at
    the parents' sums. ``views`` has an entry for each parent, None where that has no such layer.
    """

    point: CalibrationPoint
    affine: fx.Node
    incoming: str
    kernel: str
    kernel_bias: str | None
    kernel_size: tuple[int, ...]
    norm: Mapping[str, str] | None
    epsilon: float
    shortcut: str | None
    rectified: bool
    views: tuple[_View | None, ...]

    @property
    def parameters(self) -> list[str]:
        """The names of the layer's parameters and of its BatchNorm's."""
        names = [self.kernel, self.kernel_bias, *(self.norm or {}).values()]
        return [name for name in names if name is not None]


@dataclass(frozen=True)
class _Part:
    """What one parent has of hidden channels.

    Attributes
    ----------
    parent
        Which parent.
    reader
        Its layer that reads them.
    columns
        ``(num_channels, num_columns)``: where each channel stands among the layer's inputs.
    channel_of
        For each member of the class the writing layer's channel.
    """

    parent: int
    reader: fx.Node
    columns: Tensor
    channel_of: Tensor


@dataclass(frozen=True)
class _Kept:
    """Channels of one parent that are kept: which members of the frame's class they become."""

    own: Tensor
    taken: Tensor


@dataclass(frozen=True)
class _Hidden:
    """Channels that one layer writes and one layer reads, in all parents that have them.

    ``index`` is their group in the frame, ``reader`` the frame's layer that reads them; ``columns``
    and ``channel_of`` are the frame's, as those of :group:`_Part`.
    """

    index: int
    reader: _Place
    columns: Tensor
    channel_of: Tensor
    parts: tuple[_Part, ...]


def _places(parents: Sequence[Parent], state: State) -> list[_Place]:
    frame = parents[0].lifting.deep
    nodes = {node.name: node for node in frame.module.graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    places = []
    for layer in frame.layers:
        for point in layer.calibration_points:
            if point.affine is None:
                continue
            affine = nodes[point.affine]
            names = frame.operand_names(affine)
            if "weight" not in names:
                continue
            kernel_size = tuple(state[names["weight"]].shape[2:])
            if not _is_solvable(affine, kernel_size):
                continue
            norm, epsilon = None, 0.0
            if point.node != point.affine:
                norm = frame.operand_names(nodes[point.node])
                epsilon = float(bound_operands(nodes[point.node])["eps"])
                if set(norm) != {"weight", "bias", "running_mean", "running_var"}:
                    continue
            liftings = [one.lifting for one in parents]
            if any(
                one.origins[point.weight] == "identity" and point.node not in one.calibration_points
                for one in liftings
            ):
                continue  # what flows past an inserted layer does not show: there is no goal
            is_sum = point.join is not None and all(_has_sum(one, layer, point) for one in liftings)
            places.append(
                _Place(
                    point,
                    affine,
                    bound_operands(affine)["input"].name,
                    names["weight"],
                    names.get("bias"),
                    kernel_size,
                    norm,
                    epsilon,
                    point.shortcut if is_sum else None,
                    not is_sum and _is_rectified(nodes[point.node]),
                    tuple(_view(one, layer, point, is_sum) for one in liftings),
                )
            )
    shared = Counter(place.kernel for place in places)  # by several layers: no one solution
    places = [place for place in places if shared[place.kernel] == 1]
    return sorted(places, key=lambda place: order[place.affine.name])


def _has_sum(lifting: Correspondence, layer: Layer, point: CalibrationPoint) -> bool:
    """Say whether a parent shows the sum of a residual addition, or what flows past it."""
    other = lifting.calibration_points.get(point.node)
    return layer.index in lifting.streams or (other is not None and other.join is not None)


def _view(
    lifting: Correspondence, layer: Layer, point: CalibrationPoint, is_sum: bool
) -> _View | None:
    if is_sum and layer.index in lifting.streams:
        stream = lifting.streams[layer.index]
        return _View(stream, stream.node)
    other = lifting.calibration_points.get(point.node)
    if other is None:
        return None
    return _View(other, other.join if is_sum and other.join is not None else other.node)


def _is_rectified(node: fx.Node) -> bool:
    return bool(node.users) and all(op_name(user) == "relu" for user in node.users)


def _hidden(
    parents: Sequence[Parent], places: Sequence[_Place], states: Sequence[State], of_frame: State
) -> dict[str, _Hidden]:
    """Find the hidden channels that can be chosen freely: writing layer -> channels."""
    frame = parents[0].lifting.deep
    by_kernel = {place.kernel: place for place in places}
    in_heads = {index for one in frame.united_heads for index in one.groups}  # which stay whole
    found = {}
    for place in places:
        one = int(place.point.groups[0])
        if one < 0 or one in in_heads or place.shortcut is not None:
            continue
        group = frame.groups[one]
        readers = [group_axis for group_axis in group.axes if group_axis.direction == "in"]
        writers = {
            group_axis.use.parameter for group_axis in group.axes if group_axis.direction == "out"
        }
        if not (
            len(readers) == 1
            and writers <= set(place.parameters)
            and len(place.point.groups) == group.size
            and bool((place.point.groups == one).all())
        ):
            continue
        (group_axis,) = readers
        reader = by_kernel.get(group_axis.use.parameter)
        if reader is None or reader is place:
            continue
        if reader.incoming == place.point.node:  # changed in place, under the same name
            continue
        columns = _columns(group_axis, reader)
        if columns.numel() != of_frame[reader.kernel][0].numel():
            continue  # other channels are read along with them
        parts = []
        for i, (parent, view) in enumerate(zip(parents, place.views, strict=True)):
            if view is None and reader.kernel not in parent.lifting.names:
                continue  # this parent lacks both layers
            part = _part(i, parent.lifting, view, reader, one, states[i])
            if part is None:
                break
            parts.append(part)
        else:
            features = sum(part.columns.numel() for part in parts)
            if len(parts) > 1 and features <= _MOST_FEATURES:
                members = place.point.members.argsort()
                found[place.affine.name] = _Hidden(one, reader, columns, members, tuple(parts))
    return found


def _part(
    index: int, lifting: Correspondence, view: _View | None, reader: _Place, one: int, state: State
) -> _Part | None:
    """Return what a parent has of hidden channels, None where it has them otherwise."""
    if view is None or view.point.affine is None or reader.kernel not in lifting.names:
        return None
    kernel, reading = (
        lifting.names[reader.kernel],
        lifting.calibration_points[reader.point.node].affine,
    )
    group_axes = [
        group_axis
        for group_axis in lifting.shallow.groups[lifting.groups[one]].axes
        if group_axis.direction == "in" and group_axis.use.parameter == kernel
    ]
    if reading is None or len(group_axes) != 1:
        return None
    columns = _columns(group_axes[0], reader)
    if columns.numel() != state[kernel][0].numel():
        return None
    affine = next(node for node in lifting.shallow.module.graph.nodes if node.name == reading)
    return _Part(index, affine, columns, view.point.members.argsort())


def _columns(group_axis: GroupAxis, reader: _Place) -> Tensor:
    """Return ``(num_channels, num_columns)``: each channel's features of a reading layer."""
    kernel = math.prod(reader.kernel_size)
    features = group_axis.positions[:, :, None] * kernel + torch.arange(kernel)
    return features.flatten(1)


def _is_solvable(affine: fx.Node, kernel: Sequence[int]) -> bool:
    name = op_name(affine)
    if name == "linear":
        return True
    bound = bound_operands(affine)
    uneven = bound["padding"] == "same" and any(size % 2 == 0 for size in kernel)
    return name in ("conv1d", "conv2d") and bound["groups"] == 1 and not uneven


def _limited(
    data: Data, frame: TracedModel, device: torch.device, samples: int
) -> Iterator[tuple[Tensor, ...]]:
    left = samples
    for inputs in batches(data, frame.example_inputs, frame.keywords, device=device):
        taken = tuple(one[:left] for one in inputs)
        left -= taken[0].size(0)
        yield from zip(*(one.split(_CHUNK) for one in taken), strict=True)
        if left <= 0:
            return


class _Walks:
    """The fused network and all parents, followed layer by layer on the same batches."""

    def __init__(
        self,
        parents: Sequence[Parent],
        state: dict[str, Tensor],
        inputs: Sequence[tuple[Tensor, ...]],
        places: Sequence[_Place],
        ridge: float,
    ) -> None:
        self.parents = parents
        self.state = state
        self.ridge = ridge
        self.starts: dict[str, Tensor] = {}  # weights that choosing channels has given to readers
        frame, graphs = parents[0].lifting.deep, [one.lifting.shallow for one in parents]
        self.of_frame = frame.state()
        self.states = [one.state() for one in graphs]
        self.lifted = [lifted_state(one.lifting) for one in parents]
        self.hidden = _hidden(parents, places, self.states, self.of_frame)
        self.uses = Counter(key for place in places for key in self._reached(place))
        kept = [{name for i, name in self.uses if i == one} for one in range(len(parents))]
        self.fused = [Walk(frame, one, state, set()) for one in inputs]
        self.walks = [  # batch, parent
            [
                Walk(graph, one, of, set(names))
                for graph, of, names in zip(graphs, self.states, kept, strict=True)
            ]
            for one in inputs
        ]
        self.num_inputs = sum(one[0].size(0) for one in inputs)

    def _reached(self, place: _Place) -> Iterator[tuple[int, str]]:
        """Yield the parents' values that a regression asks for: parent, node."""
        for i, view in enumerate(place.views):
            if view is not None:
                yield i, view.node
        if hidden := self.hidden.get(place.affine.name):
            for part in hidden.parts:
                yield part.parent, _incoming(part.reader)

    def solve(self, place: _Place, shares: Sequence[float], generator: torch.Generator) -> None:
        """Regress one layer and put its new weights into the state."""
        hidden = self.hidden.get(place.affine.name)
        if hidden is not None:
            kept, start = self._choose(place, hidden, shares, generator)
        elif place.affine.name in self.starts:
            start = self.starts.pop(place.affine.name)
        else:
            start = _stacked(place, self.state)
        equations = _NormalEquations(start)
        chosen: Tensor | None = None
        for fused, walks in zip(self.fused, self.walks, strict=True):
            if hidden is not None:
                goal = _side_by_side(place, hidden, kept, walks)
                active = goal.relu() if place.rectified else None
            else:
                goal, active = self._goal(place, walks, shares)
            if place.shortcut is not None:
                goal = goal - fused.reach(place.shortcut).movedim(place.point.axis, -1)
            if chosen is None:
                chosen = self._choice(goal, len(start), _ROWS, generator)
            x = fused.reach(place.incoming)
            equations.add(
                _with_one(place, _patches(place.affine, x, place.kernel_size)[:, chosen]),
                _rows(goal, chosen),
                None if active is None else _rows(active, chosen),
            )
        with one_thread():
            _store(place, self.state, equations.solved(self.ridge), equations)
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
        self, place: _Place, hidden: _Hidden, shares: Sequence[float], generator: torch.Generator
    ) -> tuple[list[_Kept], Tensor]:
        """Choose the channels that a layer writes.

        Returns for each part what it gives, and the weights from which to start. Those of the
        reading layer are kept for its turn.
        """
        readout, importance = self._readouts(hidden, shares)
        reader, parts = hidden.reader, hidden.parts
        gram = torch.zeros(len(readout), len(readout), dtype=torch.float64, device=readout.device)
        chosen: Tensor | None = None
        for walks in self.walks:
            sides = [
                _patches(
                    part.reader,
                    walks[part.parent].reach(_incoming(part.reader)),
                    reader.kernel_size,
                )
                for part in parts
            ]
            if chosen is None:
                chosen = self._choice(sides[0], len(readout), _CHOICE_ROWS, generator)
            x = _with_one(reader, torch.cat(sides, 2)[:, chosen]).double()
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
        start = _stacked(place, self.of_frame)
        for part, one in zip(parts, given, strict=True):
            if _reads_partner(self.parents[part.parent].lifting, place.kernel):
                into = hidden.channel_of[one.own]
                start[:, into] = _stacked(place, self._aligned(place, hidden, part, one))[:, into]
        return given, start

    def _given(self, hidden: _Hidden, kept: Tensor) -> list[_Kept]:
        """Find a place for every channel that is kept: the frame's own stay where they are."""
        firsts = [0, *accumulate(len(part.columns) for part in hidden.parts)]
        taken = [kept[(kept >= a) & (kept < b)] - a for a, b in pairwise(firsts)]
        own = [self.parents[part.parent].is_frame for part in hidden.parts]
        free = torch.ones(len(hidden.columns), dtype=torch.bool, device=kept.device)
        for stays, channels in zip(own, taken, strict=True):
            if stays:
                free[channels] = False
        places = torch.nonzero(free).squeeze(1)
        given = []
        for stays, channels in zip(own, taken, strict=True):
            if stays:
                given.append(_Kept(channels, channels))
            else:
                into, places = places.tensor_split([len(channels)])
                given.append(_Kept(into, channels))
        return given

    def _kinship(self, hidden: _Hidden) -> Tensor:
        r"""Return how alike all parents' channels, side by side, are by the transport plans.

        With ``U`` a plan normalised by rows and columns, whose singular values are at most 1, two
        parents' channels are alike by :math:`U_p U_q^\top`; no eigenvalue of all is negative.
        """
        normalised = []
        for part in hidden.parts:
            plan = self.parents[part.parent].plans[hidden.index]
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

    def _readouts(self, hidden: _Hidden, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return how a layer reads all parents' channels side by side.

        ``(num_features, num_outputs)`` and the outputs' importance. The outputs are the weighted
        mean, or where the reading layer's own outputs are to be chosen all parents' apart.
        """
        reader = hidden.reader
        readouts, calibration_points = [], []
        for part in hidden.parts:
            lifting, state = self.parents[part.parent].lifting, self.states[part.parent]
            own = {name: state[lifting.names[name]] for name in reader.parameters}
            readouts.append(_stacked(reader, own))
            calibration_points.append(lifting.calibration_points[reader.point.node])
        if reader.affine.name in self.hidden:
            sizes = [one.size(1) for one in readouts]
            before = [0, *accumulate(sizes)]
            importance = torch.cat(
                [
                    one.new_full((size,), shares[part.parent])
                    for part, one, size in zip(hidden.parts, readouts, sizes, strict=True)
                ]
            )
            readouts = [
                F.pad(one, (first, before[-1] - first - one.size(1)))
                for one, first in zip(readouts, before, strict=False)
            ]
        else:
            readouts = [
                shares[part.parent] * self.parents[part.parent].moved(one, reader.point, other)
                for part, one, other in zip(hidden.parts, readouts, calibration_points, strict=True)
            ]
            importance = readouts[0].new_ones(readouts[0].size(1))
        if reader.point.bias is None:
            return torch.cat(readouts), importance
        bias = torch.stack([one[-1] for one in readouts]).sum(0, keepdim=True)
        return torch.cat([*(one[:-1] for one in readouts), bias]), importance

    def _aligned(
        self, place: _Place, hidden: _Hidden, part: _Part, kept: _Kept
    ) -> dict[str, Tensor]:
        """Return a layer's parameters from a parent, with the channels that are kept of it."""
        parent, lifted = self.parents[part.parent], self.lifted[part.parent]
        plan = torch.zeros(len(part.columns), len(hidden.columns), dtype=torch.float64)
        plan[kept.taken, kept.own] = 1.0
        plans = list(parent.plans)
        plans[hidden.index] = plan
        return {
            name: transported(parent.lifting, plans, name, lifted[name], self.of_frame[name])
            for name in place.parameters
        }

    def _goal(
        self, place: _Place, walks: Sequence[Walk], shares: Sequence[float]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the goal of a layer and, before a ReLU, of what leaves that, channels last.

        Inside a block that some parents lack only the others count; what the block adds to its
        stream is zero for those.
        """
        origins = [one.lifting.origins[place.point.weight] for one in self.parents]
        counted, values, actives, silent = [], [], [], 0.0
        for parent, origin, view, walk, share in zip(
            self.parents, origins, place.views, walks, shares, strict=True
        ):
            if view is None:
                silent += share if origin == "silent" else 0.0
            elif not (parent.is_frame and "taken" in origins):
                value = _value(walk, view.node, view.point)
                counted.append(share)
                values.append(parent.moved(value, place.point, view.point))
                if place.rectified:
                    actives.append(parent.moved(value.relu(), place.point, view.point))
        goal = weighted_mean(values, counted)
        if silent > 0:
            goal = sum(counted) / (sum(counted) + silent) * goal
        return goal, weighted_mean(actives, counted) if place.rectified else None

    def _release(self, key: tuple[int, str]) -> None:
        self.uses[key] -= 1
        if self.uses[key] == 0:
            index, name = key
            for walks in self.walks:
                walks[index].release(name)


def _side_by_side(
    place: _Place, hidden: _Hidden, kept: Sequence[_Kept], walks: Sequence[Walk]
) -> Tensor:
    """Return a layer's goal, channels last: of every channel what the parent it is of puts out."""
    goal: Tensor | None = None
    for part, one in zip(hidden.parts, kept, strict=True):
        view = place.views[part.parent]
        assert view is not None
        value = _value(walks[part.parent], view.node, view.point)
        if goal is None:
            goal = value.new_zeros(*value.shape[:-1], len(hidden.channel_of))
        goal[..., hidden.channel_of[one.own]] = value[..., part.channel_of[one.taken]]
    assert goal is not None
    return goal


def _reads_partner(lifting: Correspondence, parameter: str) -> bool:
    """Say whether what a matched layer reads is matched, too.

    It is not where layers were left out before it.
    """
    other_axes = axes_of(lifting.shallow, lifting.names[parameter])
    return all(
        lifting.groups[one.index] == other.index
        for key, pairs in axes_of(lifting.deep, parameter).items()
        for (one, group_axis), (other, _) in zip(pairs, other_axes[key], strict=True)
        if group_axis.direction == "in"
    )


def _value(walk: Walk, node: str, point: CalibrationPoint) -> Tensor:
    """Return a layer's output, channels last."""
    value: Tensor = walk.reach(node)
    return value.movedim(point.axis, -1)


def _incoming(affine: fx.Node) -> str:
    return str(bound_operands(affine)["input"].name)


def _rows(value: Tensor, chosen: Tensor) -> Tensor:
    """Return ``(num_rows, num_channels)``: a value, channels last, at some of its positions."""
    return value.flatten(1, -2)[:, chosen].flatten(0, 1) if value.dim() > 2 else value


def _with_one(place: _Place, inputs: Tensor) -> Tensor:
    """Return rows of inputs, with a 1 behind each where the layer has a bias."""
    rows = inputs.flatten(0, 1)
    if place.point.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _patches(affine: fx.Node, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return a layer's inputs ``(num_inputs, num_positions, num_features)``."""
    if not kernel:
        return x.reshape(x.size(0), -1, x.size(-1))
    stride, padding, dilation = convolution_geometry(affine, kernel)
    sizes = tuple(kernel)
    if len(sizes) == 1:  # an image of one row
        x = x.unsqueeze(2)
        sizes, stride, dilation = (1, *sizes), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    return F.unfold(x, sizes, dilation, padding, stride).mT


def _stacked(place: _Place, state: State) -> Tensor:
    """Return a layer with its BatchNorm as ``(num_features (+ 1), num_channels)``, in float64.

    The last row is the bias, where there is one.
    """
    weight = state[place.kernel].double().flatten(1)
    bias = weight.new_zeros(len(weight))
    if place.kernel_bias is not None:
        bias = state[place.kernel_bias].double()
    if place.norm is not None:
        norm = {role: state[name].double() for role, name in place.norm.items()}
        factor = norm["weight"] / (norm["running_var"] + place.epsilon).sqrt()
        weight = weight * factor[:, None]
        bias = (bias - norm["running_mean"]) * factor + norm["bias"]
    return weight.T if place.point.bias is None else torch.cat([weight.T, bias[None]])


def _store(
    place: _Place, state: dict[str, Tensor], solved: Tensor, equations: _NormalEquations
) -> None:
    """Put a solution ``(num_features (+ 1), num_channels)`` into the parameters."""
    has_bias = place.point.bias is not None
    weight = (solved[:-1] if has_bias else solved).T
    bias = solved[-1] if has_bias else None

    def put(name: str, value: Tensor) -> None:
        state[name] = value.reshape(state[name].shape).to(state[name])

    put(place.kernel, weight)
    if place.norm is None:
        if place.kernel_bias is not None and bias is not None:
            put(place.kernel_bias, bias)
        return
    # The BatchNorm takes away what the layer's output has and puts back what the solution wants,
    # so that it is an honest norm of these data and can be trained on.
    assert bias is not None
    moments = equations.inputs / equations.rows
    mean = weight @ moments[:-1, -1]
    squares = torch.einsum("cf,fg,cg->c", weight, moments[:-1, :-1], weight)
    variance = (squares - mean.square()).clamp(min=0)
    if place.kernel_bias is not None:
        put(place.kernel_bias, torch.zeros_like(mean))
    put(place.norm["running_mean"], mean)
    put(place.norm["running_var"], variance)
    put(place.norm["weight"], (variance + place.epsilon).sqrt())
    put(place.norm["bias"], bias + mean)
