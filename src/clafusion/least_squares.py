r"""Calibration by least squares: regress every fused layer onto the parents' aligned outputs.

The fused network is walked in order, on its own activations. Each linear or convolution layer,
together with the BatchNorm behind it, is an affine map of its input ``x``; it is replaced by the
one that comes closest to what the parents put out at the same place,

.. math:: \min_{W, b} \sum \lVert W x + b - t \rVert^2 + \lambda \lVert W - W_0 \rVert^2,
          \qquad t = (1-w)\, T_{out}^\top y_A + w\, y_B,

with ``W_0`` the averaged weights. The layer that a residual addition follows aims at the parents'
*sums* minus the fused shortcut, so that each block corrects the error so far. The normal equations
are in closed form: no labels and no gradient steps. Layer-wise regression onto the parents'
features is the idea of RegMean (arXiv 2212.09849); here it crosses widths and depths, and layers
see the fused network's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from clafusion.blending import transport_vector
from clafusion.data import Data, batches
from clafusion.depth import Lifting
from clafusion.graph import Site, State, Walk
from clafusion.operations import bound_operands, convolution_geometry, op_name

__all__ = ["regress"]

_ROWS = 200_000  # rows of each regression: many times the columns of common layers
_CHUNK = 125  # inputs whose patches are held at once


@dataclass
class _NormalEquations:
    """Sums over rows: inputs with inputs, inputs with what is left to be explained."""

    inputs: Tensor
    residuals: Tensor
    rows: int = 0

    def add(self, x: Tensor, residual: Tensor) -> None:
        self.inputs += (x.T @ x).double()
        self.residuals += (x.T @ residual).double()
        self.rows += len(x)


def regress(
    lifting: Lifting,
    plans: Sequence[Tensor | None],
    fused: State,
    data: Data,
    *,
    deep_weight: float,
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
        What corresponds, the transport plans and the averaged state.
    data
        Unlabelled inputs; the first ``samples`` are used. The activations at the current layer
        are held for all of them, three networks at a time: this bounds the memory.
    deep_weight
        The deep network's share ``w``.
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
    walks = _Walks(lifting, state, list(_limited(data, lifting, target, samples)), places)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for done, place in enumerate(places):
            walks.solve(place, plans, deep_weight, ridge, generator)
            if progress is not None:
                progress("calibrate", done + 1)
    return state


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
                )
            )
    return sorted(places, key=lambda place: order[place.layer.name])


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
        state: dict[str, Tensor],
        inputs: Sequence[tuple[Tensor, ...]],
        places: Sequence[_Place],
    ) -> None:
        self.lifting = lifting
        self.state = state
        self.uses = _counted(places)
        deep, shallow = lifting.deep, lifting.shallow
        of_deep, of_shallow = deep.state(), shallow.state()
        kept_deep = {place.deep for place in places}
        kept_shallow = {place.shallow_node for place in places if place.shallow_node}
        self.fused = [Walk(deep, one, state, set()) for one in inputs]
        self.deep = [Walk(deep, one, of_deep, set(kept_deep)) for one in inputs]
        self.shallow = [Walk(shallow, one, of_shallow, set(kept_shallow)) for one in inputs]
        self.num_inputs = sum(one[0].size(0) for one in inputs)

    def solve(
        self,
        place: _Place,
        plans: Sequence[Tensor | None],
        deep_weight: float,
        ridge: float,
        generator: torch.Generator,
    ) -> None:
        """Regress one layer and put its new weights into the state."""
        weight, bias = _effective(place, self.state)
        start = weight.T
        if has_bias := place.site.bias is not None:
            start = torch.cat([start, bias[None]])
        equations: _NormalEquations | None = None
        chosen: Tensor | None = None
        for fused, deep, shallow in zip(self.fused, self.deep, self.shallow, strict=True):
            x = fused.reach(place.incoming)
            goal = self._goal(place, deep, shallow, plans, deep_weight)
            if place.shortcut is not None:
                goal = goal - fused.reach(place.shortcut)
            goal = goal.movedim(place.site.axis, -1)
            positions = goal[0, ..., 0].numel()
            if chosen is None:
                count = min(positions, max(1, -(-_ROWS // self.num_inputs)))
                chosen = torch.randperm(positions, generator=generator)[:count].sort().values
                chosen = chosen.to(goal.device)
            rows = _patches(place.layer, x, place.kernel_size)[:, chosen].flatten(0, 1)
            goals = goal.flatten(1, -2)[:, chosen].flatten(0, 1) if goal.dim() > 2 else goal
            if has_bias:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            if equations is None:
                size = rows.size(1)
                equations = _NormalEquations(
                    torch.zeros(size, size, dtype=torch.float64, device=rows.device),
                    torch.zeros(size, goals.size(1), dtype=torch.float64, device=rows.device),
                )
            # Where the parents agree nothing is left, and the weights stay exactly as they are.
            equations.add(rows, goals - rows @ start.to(rows))
        assert equations is not None
        _store(place, self.state, start + _solve(equations, ridge), equations)
        self._release(place)

    def _goal(
        self,
        place: _Place,
        deep: Walk,
        shallow: Walk,
        plans: Sequence[Tensor | None],
        deep_weight: float,
    ) -> Tensor:
        value: Tensor = deep.reach(place.deep)
        if place.shallow is None or place.shallow_node is None:
            return value
        site, other = place.site, place.shallow
        moved = transport_vector(
            shallow.reach(place.shallow_node).movedim(other.axis, -1),
            plans,
            (site.classes, site.members),
            (other.classes, other.members),
            self.lifting.classes,
        ).movedim(-1, site.axis)
        return torch.lerp(moved, value, deep_weight)

    def _release(self, place: _Place) -> None:
        for name, walks in ((place.deep, self.deep), (place.shallow_node, self.shallow)):
            key = (name, walks is self.deep)
            self.uses[key] = self.uses.get(key, 0) - 1
            if name is not None and self.uses[key] == 0:
                for walk in walks:
                    walk.release(name)


def _counted(places: Sequence[_Place]) -> dict[tuple[str | None, bool], int]:
    """Count how many layers are regressed onto each node of the deep and the shallow network."""
    counts: dict[tuple[str | None, bool], int] = {}
    for place in places:
        for key in ((place.deep, True), (place.shallow_node, False)):
            counts[key] = counts.get(key, 0) + 1
    return counts


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


def _effective(place: _Place, state: State) -> tuple[Tensor, Tensor]:
    """Return weight ``(num_channels, num_features)`` and bias of a layer with its BatchNorm."""
    weight = state[place.kernel].double().flatten(1)
    bias = weight.new_zeros(len(weight))
    if place.kernel_bias is not None:
        bias = state[place.kernel_bias].double()
    if place.norm is not None:
        norm = {role: state[name].double() for role, name in place.norm.items()}
        factor = norm["weight"] / (norm["running_var"] + place.epsilon).sqrt()
        weight = weight * factor[:, None]
        bias = (bias - norm["running_mean"]) * factor + norm["bias"]
    return weight, bias


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


def _solve(equations: _NormalEquations, ridge: float) -> Tensor:
    """Return the change of the weights ``(num_features, num_channels)``."""
    penalty = ridge * equations.inputs.diagonal().mean()
    size = len(equations.inputs)
    identity = torch.eye(size, dtype=torch.float64, device=equations.inputs.device)
    change: Tensor = torch.linalg.solve(equations.inputs + penalty * identity, equations.residuals)
    return change
