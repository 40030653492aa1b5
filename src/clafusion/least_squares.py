r"""Calibration by least squares: regress every fused layer onto the parents' aligned outputs.

The fused network is walked in order, on its own activations. Each linear or convolution layer,
together with the BatchNorm behind it, is an affine map of its input ``x``; it is replaced by the
one that comes closest to what the parents put out at the same place,

.. math:: \min_{W, b} \sum \lVert W x + b - t \rVert^2 + \lambda \lVert W - W_0 \rVert^2,
          \qquad t = (1-v)\, T_{out}^\top y_A + v\, y_B,

with ``W_0`` the averaged weights. Four things make it work across depths:

- The layer that a residual addition follows aims at the parents' *sums* minus the fused shortcut,
  so that each block corrects the error so far.
- Before a ReLU the goal is the mean of the parents' *activations*: where that is positive the layer
  should put it out, elsewhere anything below 0 will do (solved by majorisation, some rounds).
- A hidden channel that one layer writes and one layer reads needs no partner. Of both networks'
  channels side by side those are kept by which the reading layer's output is best told
  (:mod:`clafusion.hidden_channels`).
- Two networks that solve a task by different features have no good mean of them. So the interior
  may lean towards one parent, ``v`` between the weight ``w`` and 0 or 1, and only the network's
  outputs aim at the weighted mean with ``w`` itself. Where the parents learnt different things it
  should not lean. Which of the two it is shows without labels: how far the fused network's outputs
  are from the weighted mean of the parents'.

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
from typing import Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from clafusion.blending import transport_vector, transported
from clafusion.data import Data, batches
from clafusion.depth import Lifting, axes_of, lifted_state
from clafusion.graph import Site, Slot, State, Walk
from clafusion.hidden_channels import keep_channels
from clafusion.operations import bound_operands, convolution_geometry, op_name

__all__ = ["Lean", "interior_weight", "one_thread", "regress", "regress_leaning"]

Lean = float | Literal["auto"]
LEANS = (0.0, 0.8)
"""What ``"auto"`` tries."""

_ROWS = 100_000  # rows of each regression: many times the columns of common layers
_CHOICE_ROWS = 30_000  # of choosing channels, in float64
_LEAST_ROWS = 4  # for each column, at least
_ENTRIES = 1 << 27  # a regression's inputs at the most: half a gigabyte
_CHUNK = 125  # inputs whose patches are held at once
_ROUNDS = 2  # of the majorisation of a ReLU
_MOST_FEATURES = 4096  # of two networks side by side: beyond, choosing channels takes minutes


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: its float64 sums depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interior_weight(deep_weight: float, lean: float) -> float:
    """Return the deep network's share inside the network, for its share of the outputs.

    ``lean`` in [0, 1] is how far it goes from ``deep_weight`` to the parent that has more: the
    deep network for 0.5.
    """
    return deep_weight + lean * ((1.0 if deep_weight >= 0.5 else 0.0) - deep_weight)


def regress(
    lifting: Lifting,
    plans: Sequence[Tensor | None],
    fused: State,
    data: Data,
    *,
    deep_weight: float,
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
    lifting, plans, fused
        What corresponds, the transport plans and the state averaged with the interior's weight.
    data
        Unlabelled inputs; the first ``samples`` are used. The activations at the current layer
        are held for all of them, three networks at a time: this bounds the memory.
    deep_weight
        The deep network's share ``w`` of the outputs.
    lean
        How far the interior leans towards one parent: see :func:`interior_weight`.
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
    places = _places(lifting, state)
    inputs = list(_limited(data, lifting, target, samples))
    walks = _Walks(lifting, plans, state, inputs, places, ridge)
    inside = interior_weight(deep_weight, lean)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for done, place in enumerate(places):
            is_output = bool((place.site.classes < 0).all())
            walks.solve(place, deep_weight if is_output else inside, generator)
            if progress is not None:
                progress("calibrate", done + 1)
    return state


def regress_leaning(
    lifting: Lifting,
    plans: Sequence[Tensor | None],
    average: Callable[[float], State],
    data: Data,
    *,
    deep_weight: float,
    lean: Lean,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Average and regress with the interior leaning as it should; return the state and the lean.

    ``average`` gives the averaged state for a share of the deep network. ``"auto"`` tries all of
    ``LEANS`` and takes the one whose outputs come nearest to the parents' weighted mean.
    """
    if lean != "auto":
        leans: tuple[float, ...] = (lean,)
    else:
        leans = LEANS if 0.0 < deep_weight < 1.0 else LEANS[:1]
    best: tuple[dict[str, Tensor], float] | None = None
    least = math.inf
    plain = average(deep_weight)
    slots = lifting.deep.slots_by_parameter
    # Channels leave these in no class: the outputs' parameters, which do not lean.
    outputs = {
        name for name in plain if all(slot.direction == "in" for _, slot in slots.get(name, ()))
    }
    for one in leans:
        leaning = average(interior_weight(deep_weight, one))
        state = regress(
            lifting,
            plans,
            {name: plain[name] if name in outputs else leaning[name] for name in plain},
            data,
            deep_weight=deep_weight,
            lean=one,
            seed=seed,
            progress=progress,
        )
        distance = _distance(lifting, state, data, deep_weight) if len(leans) > 1 else 0.0
        if best is None or distance < least:
            best, least = (state, one), distance
    assert best is not None
    return best


def _distance(
    lifting: Lifting, state: State, data: Data, deep_weight: float, samples: int = 2000
) -> float:
    """Return the squared distance of a network's outputs from the parents' weighted mean."""
    device = next(iter(state.values())).device
    of_deep, of_shallow = lifting.deep.state(), lifting.shallow.state()
    total = 0.0
    with torch.no_grad():
        for inputs in _limited(data, lifting, device, samples):
            found = lifting.deep.run(inputs, state=state)
            deep = lifting.deep.run(inputs, state=of_deep)
            shallow = lifting.shallow.run(inputs, state=of_shallow)
            for one, two, three in zip(found, deep, shallow, strict=True):
                if isinstance(one, Tensor) and one.is_floating_point():
                    goal = torch.lerp(three.double(), two.double(), deep_weight)
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
class _Place:
    """A layer of the deep structure, and the nodes of all networks that it is regressed by."""

    site: Site
    layer: fx.Node
    incoming: str
    kernel: str
    kernel_bias: str | None
    kernel_size: tuple[int, ...]
    norm: Mapping[str, str] | None
    epsilon: float
    deep: str
    shallow: Site | None
    shallow_node: str | None
    shortcut: str | None
    rectified: bool

    @property
    def parameters(self) -> list[str]:
        """The names of the layer's parameters and of its BatchNorm's."""
        names = [self.kernel, self.kernel_bias, *(self.norm or {}).values()]
        return [name for name in names if name is not None]


@dataclass(frozen=True)
class _Hidden:
    """Channels that one layer writes and one layer reads, in both networks.

    Attributes
    ----------
    index
        Their class in the deep network.
    reader
        The layer that reads them.
    shallow_layer
        The shallow network's reading layer.
    columns, shallow_columns
        ``(num_channels, num_columns)``: where each channel stands among the layer's inputs.
    channel_of, shallow_channel_of
        For each member of the class the writing layer's channel.
    """

    index: int
    reader: _Place
    shallow_layer: fx.Node
    columns: Tensor
    shallow_columns: Tensor
    channel_of: Tensor
    shallow_channel_of: Tensor


def _places(lifting: Lifting, state: State) -> list[_Place]:
    nodes = {node.name: node for node in lifting.deep.module.graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    places = []
    for unit in lifting.deep.units:
        for site in unit.sites:
            if site.layer is None:
                continue
            layer = nodes[site.layer]
            names = lifting.deep.operand_names(layer)
            if "weight" not in names:
                continue
            kernel_size = tuple(state[names["weight"]].shape[2:])
            if not _is_solvable(layer, kernel_size):
                continue
            other = lifting.sites.get(site.node)
            shallow_node = None if other is None else other.node
            deep, shortcut = site.node, None
            stream = lifting.streams.get(unit.index)
            if site.join is not None and (stream is not None or (other and other.join)):
                deep, shortcut = site.join, site.shortcut
                if stream is not None:
                    other, shallow_node = stream, stream.node
                elif other is not None:
                    shallow_node = other.join
            norm, epsilon = None, 0.0
            if site.node != site.layer:
                norm = lifting.deep.operand_names(nodes[site.node])
                epsilon = float(bound_operands(nodes[site.node])["eps"])
                if set(norm) != {"weight", "bias", "running_mean", "running_var"}:
                    continue
            places.append(
                _Place(
                    site,
                    layer,
                    bound_operands(layer)["input"].name,
                    names["weight"],
                    names.get("bias"),
                    kernel_size,
                    norm,
                    epsilon,
                    deep,
                    other,
                    shallow_node,
                    shortcut,
                    deep == site.node and _is_rectified(nodes[site.node]),
                )
            )
    shared = Counter(place.kernel for place in places)  # by several layers: no one solution
    places = [place for place in places if shared[place.kernel] == 1]
    return sorted(places, key=lambda place: order[place.layer.name])


def _is_rectified(node: fx.Node) -> bool:
    return bool(node.users) and all(op_name(user) == "relu" for user in node.users)


def _hidden(
    lifting: Lifting, places: Sequence[_Place], of_deep: State, of_shallow: State
) -> dict[str, _Hidden]:
    """Find the hidden channels that can be chosen freely: writing layer -> channels."""
    deep, shallow = lifting.deep, lifting.shallow
    by_kernel = {place.kernel: place for place in places}
    shallow_nodes = {node.name: node for node in shallow.module.graph.nodes}
    found = {}
    for place in places:
        other = place.shallow
        one = int(place.site.classes[0])
        if one < 0 or place.shortcut is not None or other is None or other.layer is None:
            continue
        channel_class = deep.classes[one]
        readers = [slot for slot in channel_class.slots if slot.direction == "in"]
        writers = {slot.use.parameter for slot in channel_class.slots if slot.direction == "out"}
        if not (
            len(readers) == 1
            and writers <= set(place.parameters)
            and len(place.site.classes) == channel_class.size
            and bool((place.site.classes == one).all())
        ):
            continue
        (slot,) = readers
        reader = by_kernel.get(slot.use.parameter)
        if reader is None or reader is place or reader.kernel not in lifting.names:
            continue
        if reader.incoming == place.deep:  # changed in place, under the same name
            continue
        reading = lifting.sites[reader.site.node].layer
        shallow_class = shallow.classes[lifting.classes[one]]
        partners = [
            each
            for each in shallow_class.slots
            if each.direction == "in" and each.use.parameter == lifting.names[reader.kernel]
        ]
        if reading is None or len(partners) != 1:
            continue
        columns, others = (_columns(each, reader) for each in (slot, partners[0]))
        features = [
            state[each.use.parameter][0].numel()
            for state, each in ((of_deep, slot), (of_shallow, partners[0]))
        ]
        if [columns.numel(), others.numel()] != features or sum(features) > _MOST_FEATURES:
            continue  # other channels are read along with them, or there are too many
        found[place.layer.name] = _Hidden(
            one,
            reader,
            shallow_nodes[reading],
            columns,
            others,
            place.site.members.argsort(),
            other.members.argsort(),
        )
    return found


def _columns(slot: Slot, reader: _Place) -> Tensor:
    """Return ``(num_channels, num_columns)``: each channel's features of a reading layer."""
    kernel = math.prod(reader.kernel_size)
    features = slot.positions[:, :, None] * kernel + torch.arange(kernel)
    return features.flatten(1)


def _is_solvable(layer: fx.Node, kernel: Sequence[int]) -> bool:
    name = op_name(layer)
    if name == "linear":
        return True
    bound = bound_operands(layer)
    uneven = bound["padding"] == "same" and any(size % 2 == 0 for size in kernel)
    return name in ("conv1d", "conv2d") and bound["groups"] == 1 and not uneven


def _limited(
    data: Data, lifting: Lifting, device: torch.device, samples: int
) -> Iterator[tuple[Tensor, ...]]:
    left = samples
    for inputs in batches(data, lifting.deep.example_inputs, lifting.deep.keywords, device=device):
        taken = tuple(one[:left] for one in inputs)
        left -= taken[0].size(0)
        yield from zip(*(one.split(_CHUNK) for one in taken), strict=True)
        if left <= 0:
            return


class _Walks:
    """Three networks, followed layer by layer on the same batches."""

    def __init__(
        self,
        lifting: Lifting,
        plans: Sequence[Tensor | None],
        state: dict[str, Tensor],
        inputs: Sequence[tuple[Tensor, ...]],
        places: Sequence[_Place],
        ridge: float,
    ) -> None:
        self.lifting = lifting
        self.plans = plans
        self.state = state
        self.ridge = ridge
        self.starts: dict[str, Tensor] = {}  # weights that choosing channels has given to readers
        deep, shallow = lifting.deep, lifting.shallow
        self.of_deep, self.of_shallow = deep.state(), shallow.state()
        self.hidden = _hidden(lifting, places, self.of_deep, self.of_shallow)
        self.lifted = lifted_state(lifting)
        self.uses: dict[tuple[bool, str], int] = {}
        for place in places:
            for key in self._reached(place):
                self.uses[key] = self.uses.get(key, 0) + 1
        kept = [{name for is_deep, name in self.uses if is_deep is side} for side in (True, False)]
        self.fused = [Walk(deep, one, state, set()) for one in inputs]
        self.deep = [Walk(deep, one, self.of_deep, set(kept[0])) for one in inputs]
        self.shallow = [Walk(shallow, one, self.of_shallow, set(kept[1])) for one in inputs]
        self.num_inputs = sum(one[0].size(0) for one in inputs)

    def _reached(self, place: _Place) -> Iterator[tuple[bool, str]]:
        """Yield the parents' values that a regression asks for: of the deep one?, node."""
        yield True, place.deep
        if place.shallow_node is not None:
            yield False, place.shallow_node
        if hidden := self.hidden.get(place.layer.name):
            yield True, hidden.reader.incoming
            yield False, _incoming(hidden.shallow_layer)

    def solve(self, place: _Place, deep_weight: float, generator: torch.Generator) -> None:
        """Regress one layer and put its new weights into the state."""
        hidden = self.hidden.get(place.layer.name)
        if hidden is not None:
            own, taken, start = self._choose(place, hidden, deep_weight, generator)
        elif place.layer.name in self.starts:
            start = self.starts.pop(place.layer.name)
        else:
            start = _stacked(place, self.state)
        equations = _NormalEquations(start)
        chosen: Tensor | None = None
        for fused, deep, shallow in zip(self.fused, self.deep, self.shallow, strict=True):
            if hidden is not None and place.shallow is not None:
                goal = _value(deep, place.deep, place.site).clone()
                theirs = _value(shallow, place.shallow.node, place.shallow)
                into, out_of = hidden.channel_of[own], hidden.shallow_channel_of[taken]
                goal[..., into] = theirs[..., out_of]
                active = goal.relu() if place.rectified else None
            else:
                goal, active = self._goal(place, deep, shallow, deep_weight)
            if place.shortcut is not None:
                goal = goal - fused.reach(place.shortcut).movedim(place.site.axis, -1)
            if chosen is None:
                chosen = self._choice(goal, len(start), _ROWS, generator)
            x = fused.reach(place.incoming)
            equations.add(
                _with_one(place, _patches(place.layer, x, place.kernel_size)[:, chosen]),
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
        self, place: _Place, hidden: _Hidden, deep_weight: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the channels that a layer writes.

        Returns which members of the class become the shallow network's, which of its members
        these are, and the weights from which to start. Those of the reading layer are kept for
        its turn.
        """
        readout, importance = self._readouts(hidden, deep_weight)
        reader, columns, others = hidden.reader, hidden.columns, hidden.shallow_columns
        gram = torch.zeros(len(readout), len(readout), dtype=torch.float64, device=readout.device)
        chosen: Tensor | None = None
        for deep, shallow in zip(self.deep, self.shallow, strict=True):
            sides = [
                _patches(layer, walk.reach(_incoming(layer)), reader.kernel_size)
                for layer, walk in ((hidden.shallow_layer, shallow), (reader.layer, deep))
            ]
            if chosen is None:
                chosen = self._choice(sides[0], len(readout), _CHOICE_ROWS, generator)
            x = _with_one(reader, torch.cat(sides, 2)[:, chosen]).double()
            with one_thread():
                gram += x.T @ x
        both = torch.cat([others, others.numel() + columns])
        with one_thread():
            kept, readout = keep_channels(
                gram,
                readout,
                both,
                len(columns),
                importance=importance,
                kinship=self._kinship(hidden),
            )
        taken, stays = kept[kept < len(others)], kept[kept >= len(others)] - len(others)
        free = torch.ones(len(columns), dtype=torch.bool, device=kept.device)
        free[stays] = False
        own = torch.nonzero(free).squeeze(1)
        reader_start = readout[others.numel() :].clone()
        reader_start[columns[own].flatten()] = readout[others[taken].flatten()]

        into, out_of = hidden.channel_of[own], hidden.shallow_channel_of[taken]
        start = self.starts.pop(place.layer.name, None)
        if start is None:
            start = _stacked(place, self.of_deep)
            if _reads_partner(self.lifting, place.kernel):
                plan = torch.zeros(len(others), len(columns), dtype=torch.float64)
                plan[taken, own] = 1.0
                aligned = self._aligned(place, hidden.index, plan)
                start[:, into] = _stacked(place, aligned)[:, into]
        else:  # this layer reads chosen channels itself
            shallow_start, start = start.tensor_split([len(hidden.shallow_channel_of)], 1)
            start = start.clone()
            start[:, into] = shallow_start[:, out_of]
        self.starts[reader.layer.name] = reader_start
        return own, taken, start

    def _kinship(self, hidden: _Hidden) -> Tensor:
        """Return how alike both networks' channels, side by side, are by the transport plan.

        Its eigenvalues are not negative: those of the plan, normalised by rows and columns, are
        at most 1.
        """
        plan = self.plans[hidden.index]
        assert plan is not None, "a matched layer writes a class without a partner"
        scale = (plan.sum(1, keepdim=True) * plan.sum(0)).sqrt()
        alike = plan / torch.where(scale > 0, scale, 1.0)
        return torch.cat(
            [
                torch.cat([torch.eye(len(plan)).to(alike), alike], 1),
                torch.cat([alike.T, torch.eye(plan.size(1)).to(alike)], 1),
            ]
        )

    def _readouts(self, hidden: _Hidden, deep_weight: float) -> tuple[Tensor, Tensor]:
        """Return how a layer reads both networks' channels side by side, the shallow one's first.

        ``(num_features, num_outputs)`` and the outputs' importance. The outputs are the weighted
        mean, or where the reading layer's own outputs are to be chosen the two networks' apart.
        """
        reader, lifting = hidden.reader, self.lifting
        site = lifting.sites[reader.site.node]
        partners = {name: self.of_shallow[lifting.names[name]] for name in reader.parameters}
        deep, shallow = _stacked(reader, self.of_deep), _stacked(reader, partners)
        if reader.layer.name in self.hidden:
            first = F.pad(shallow, (0, deep.size(1)))
            second = F.pad(deep, (shallow.size(1), 0))
            importance = deep.new_tensor(
                [1 - deep_weight] * shallow.size(1) + [deep_weight] * deep.size(1)
            )
        else:
            moved = transport_vector(
                shallow,
                self.plans,
                (reader.site.classes, reader.site.members),
                (site.classes, site.members),
                lifting.classes,
            )
            first, second = (1 - deep_weight) * moved, deep_weight * deep
            importance = deep.new_ones(deep.size(1))
        if reader.site.bias is None:
            return torch.cat([first, second]), importance
        return torch.cat([first[:-1], second[:-1], first[-1:] + second[-1:]]), importance

    def _aligned(self, place: _Place, index: int, plan: Tensor) -> dict[str, Tensor]:
        """Return a layer's parameters from the shallow network, with a plan of its own."""
        plans = list(self.plans)
        plans[index] = plan
        return {
            name: transported(self.lifting, plans, name, self.lifted[name], self.of_deep[name])
            for name in place.parameters
        }

    def _goal(
        self, place: _Place, deep: Walk, shallow: Walk, deep_weight: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the goal of a layer and, before a ReLU, of what leaves that, channels last."""
        value = _value(deep, place.deep, place.site)
        active = value.relu() if place.rectified else None
        if place.shallow is None or place.shallow_node is None:
            if self.lifting.origins[place.site.weight] == "silent":
                value = deep_weight * value  # the shallow network's part is zero
            return value, active
        if self.lifting.origins[place.site.weight] == "taken":
            deep_weight = 0.0
        site, other = place.site, place.shallow
        theirs = _value(shallow, place.shallow_node, other)

        def mean(one: Tensor, two: Tensor) -> Tensor:
            moved = transport_vector(
                two,
                self.plans,
                (site.classes, site.members),
                (other.classes, other.members),
                self.lifting.classes,
            )
            return torch.lerp(moved, one, deep_weight)

        return mean(value, theirs), None if active is None else mean(active, theirs.relu())

    def _release(self, key: tuple[bool, str]) -> None:
        self.uses[key] -= 1
        if self.uses[key] == 0:
            is_deep, name = key
            for walk in self.deep if is_deep else self.shallow:
                walk.release(name)


def _reads_partner(lifting: Lifting, parameter: str) -> bool:
    """Say whether what a matched layer reads is matched, too.

    It is not where units were left out before it.
    """
    other_axes = axes_of(lifting.shallow, lifting.names[parameter])
    return all(
        lifting.classes[one.index] == other.index
        for key, pairs in axes_of(lifting.deep, parameter).items()
        for (one, slot), (other, _) in zip(pairs, other_axes[key], strict=True)
        if slot.direction == "in"
    )


def _value(walk: Walk, node: str, site: Site) -> Tensor:
    """Return a layer's output, channels last."""
    value: Tensor = walk.reach(node)
    return value.movedim(site.axis, -1)


def _incoming(layer: fx.Node) -> str:
    return str(bound_operands(layer)["input"].name)


def _rows(value: Tensor, chosen: Tensor) -> Tensor:
    """Return ``(num_rows, num_channels)``: a value, channels last, at some of its positions."""
    return value.flatten(1, -2)[:, chosen].flatten(0, 1) if value.dim() > 2 else value


def _with_one(place: _Place, inputs: Tensor) -> Tensor:
    """Return rows of inputs, with a 1 behind each where the layer has a bias."""
    rows = inputs.flatten(0, 1)
    if place.site.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _patches(layer: fx.Node, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return a layer's inputs ``(num_inputs, num_positions, num_features)``."""
    if not kernel:
        return x.reshape(x.size(0), -1, x.size(-1))
    stride, padding, dilation = convolution_geometry(layer, kernel)
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
    return weight.T if place.site.bias is None else torch.cat([weight.T, bias[None]])


def _store(
    place: _Place, state: dict[str, Tensor], solved: Tensor, equations: _NormalEquations
) -> None:
    """Put a solution ``(num_features (+ 1), num_channels)`` into the parameters."""
    has_bias = place.site.bias is not None
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
