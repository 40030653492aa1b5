"""The regression of one layer: its rows, its normal equations, and how a solution is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from clafusion.calibration.least_squares.places import Place
from clafusion.execution.call import State
from clafusion.execution.walk import Walk
from clafusion.profiling.gram import gram_matrix
from clafusion.threads import one_thread
from clafusion.tracing.layer import CalibrationPoint
from clafusion.tracing.operations import affine_operands, convolution_geometry

__all__ = [
    "NormalEquations",
    "by_position",
    "channels_last",
    "chosen_positions",
    "chosen_rows",
    "features",
    "incoming_node",
    "is_stored",
    "num_positions",
    "rows_for",
    "squares",
    "stacked",
    "store_solution",
]

_ROUNDS = 2  # of the majorisation of a ReLU
_ENTRIES = 1 << 27  # a regression's inputs at the most: half a gigabyte
_LEAST_ROWS = 4  # for each column, however large that makes them
_SCARCE = 100  # how much more the penalty is where there is one row for each column
_RUN, _RUNS = 256, 16  # rows that are summed in float32, and how many such runs at once
_BLOCK = 192  # rows of a product that are computed at once


class NormalEquations:
    """A regression: sums over rows, and the rows themselves where a ReLU needs them again.

    It is solved for the change of the weights, so that where the parents agree nothing is left and
    the weights stay exactly as they are. So they do where no more is left than comes of the
    roundings of the parents' values: in half precision a regression would take these for an error.
    """

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.rows = 0
        size = sum(start.shape)
        self._sums = start.new_zeros(size, size)  # of inputs and residuals side by side
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._precision = 0.0  # of the parents' values
        self._shortcuts = start.new_zeros(start.size(1))  # sums of squares

    @property
    def inputs(self) -> Tensor:
        """The inner products of the inputs, ``(num_features (+ 1), num_features (+ 1))``."""
        return self._sums[: len(self.start), : len(self.start)]

    def add(
        self,
        sides: Tensor,
        goal: Tensor,
        active: Tensor | None,
        shortcut: Tensor | None = None,
    ) -> None:
        """Add rows.

        Parameters
        ----------
        sides
            ``(num_features (+ 1) + num_channels, num_rows)``: the inputs, see :func:`features`,
            and room for what the weights leave of the goal.
        goal, active
            ``(num_rows, num_channels)``: what the inputs should become, and what that should be
            after the ReLU.
        shortcut
            ``(num_rows, num_channels)``: what is added to what the inputs become; ``goal`` is the
            sum.
        """
        self._precision = max(self._precision, torch.finfo(goal.dtype).eps)
        if shortcut is not None:
            with one_thread():
                self._shortcuts += shortcut.double().square().sum(0)
            goal = goal - shortcut
        x, residual = sides.tensor_split([len(self.start)])
        torch.mm(self.start.T.to(x), x, out=residual)
        torch.sub(goal.T.to(x), residual, out=residual)
        self._sums += squares(sides)
        self.rows += len(goal)
        if active is not None:
            self._kept.append((x, active.T.to(x)))

    def solved(self, ridge: float) -> Tensor:
        """Return the weights ``(num_features (+ 1), num_channels)``."""
        inputs, residuals = self.inputs, self._sums[: len(self.start), len(self.start) :]
        # The fewer rows there are for each column, the less the sums say.
        ridge *= 1 + _SCARCE * len(inputs) / max(self.rows, 1)
        penalty = ridge * inputs.diagonal().mean().clamp(min=1e-30)
        identity = torch.eye(len(inputs), dtype=torch.float64, device=inputs.device)
        factor = torch.linalg.cholesky(inputs + penalty * identity)
        weights = self.start + torch.cholesky_solve(residuals, factor)
        for _ in range(_ROUNDS if self._kept else 0):
            residuals = torch.zeros_like(weights)
            for x, active in self._kept:
                residuals += _products(x, _left_of(active, weights, x))
            weights = weights + torch.cholesky_solve(residuals, factor)
        return torch.where(self._is_settled(), self.start, weights)

    def _is_settled(self) -> Tensor:
        """Say of which channels the start leaves no more than roundings.

        A unit in the last place is allowed to each term of a product, to the product, and to the
        sum of it and the shortcut.
        """
        size = len(self.start)
        left = self._sums.diagonal()[size:]
        terms = self.inputs.diagonal() @ self.start.square()
        # Products would take long: their squares are at most ``size`` times those of their terms.
        most = self._precision**2 * (size * terms + terms + self._shortcuts)
        if not bool((left <= most).any()):
            return torch.zeros_like(left, dtype=torch.bool)
        products = (self.start * (self.inputs @ self.start)).sum(0)
        allowed = self._precision**2 * (products + terms + self._shortcuts)
        settled = left <= allowed
        if self._kept and bool(settled.any()):  # what should leave the ReLU may be something else
            lefts = (_left_of(active, self.start, x) for x, active in self._kept)
            settled &= sum(one.double().square().sum(1) for one in lefts) <= allowed
        return settled


def _left_of(active: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Return what weights leave of what should be there after a ReLU, of some rows."""
    found = weights.T.to(x) @ x
    # Below 0 anything will do where nothing should leave the ReLU.
    idle = (found <= 0) & (active <= 0)
    return (active - found).masked_fill_(idle, 0.0)


def squares(x: Tensor) -> Tensor:
    """Return ``X X^T`` of features in float64, the same bytes for any number of threads."""
    if x.dtype != torch.float64:
        return gram_matrix(x)
    # The package's kernel would round. Of a symmetric product half is enough.
    total = x.new_empty(len(x), len(x))
    with one_thread():
        for first in range(0, len(x), _BLOCK):
            last = first + _BLOCK
            torch.mm(x[first:last], x[:last].T, out=total[first:last, :last])
    return total.tril_() + total.tril(-1).T


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return ``X Y^T`` in float64, the same bytes for any number of threads.

    PyTorch shares long sums among its threads, and adds up their parts in float32. So the sums are
    made in short runs of rows, and the runs added up here.
    """
    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    if x.dtype == torch.float64:
        with one_thread():
            return total + x @ y.T
    whole = y.size(1) // _RUN * _RUN
    for first in range(0, whole, _RUNS * _RUN):
        last = min(first + _RUNS * _RUN, whole)
        left, right = (one[:, first:last].unflatten(1, (-1, _RUN)) for one in (x, y))
        total += (left.transpose(0, 1) @ right.permute(1, 2, 0)).double().sum(0)
    with one_thread():
        return total + x[:, whole:] @ y[:, whole:].T


def channels_last(walk: Walk, node: str, point: CalibrationPoint) -> Tensor:
    """Return a layer's output, or a sum that it is part of, channels last."""
    value: Tensor = walk.reach(node)
    return value.movedim(point.axis, -1)


def incoming_node(affine: fx.Node) -> str:
    """Return the name of the node that feeds a layer."""
    return str(affine_operands(affine)["input"].name)


def chosen_positions(
    positions: int, num_rows: int, num_inputs: int, generator: torch.Generator
) -> Tensor:
    """Choose the positions of a layer's output from which rows are made."""
    count = min(positions, max(1, -(-num_rows // num_inputs)))
    return torch.randperm(positions, generator=generator)[:count].sort().values


def rows_for(num_columns: int, a_column: int, least: int) -> int:
    """Return how many rows a regression with so many columns takes."""
    most = max(_ENTRIES // num_columns, _LEAST_ROWS * num_columns)
    return min(max(a_column * num_columns, least), most)


def by_position(value: Tensor, kernel: Sequence[int], num_inputs: int) -> Tensor:
    """Return ``(num_inputs, num_positions, num_channels)`` of a value, channels last.

    What a layer that is no convolution computes may hold an input's positions as rows of their own.
    """
    is_folded = not kernel and value.size(0) % num_inputs == 0
    return value.reshape(num_inputs if is_folded else value.size(0), -1, value.size(-1))


def chosen_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """Return ``(num_rows, num_channels)``: see :func:`by_position`; position by position."""
    return values.transpose(0, 1)[chosen.to(values.device)].flatten(0, 1)


def num_positions(affine: fx.Node, x: Tensor, kernel: Sequence[int], num_inputs: int) -> int:
    """Return at how many positions a layer computes its outputs."""
    if not kernel:
        return by_position(x, kernel, num_inputs).size(1)
    return math.prod(_geometry(affine, x, kernel).outputs)


def features(
    affine: fx.Node,
    x: Tensor,
    kernel: Sequence[int],
    chosen: Tensor,
    num_inputs: int,
    *,
    has_bias: bool,
    room: int = 0,
) -> Tensor:
    """Return what a layer multiplies at some positions, ``(num_features (+ 1), num_rows)``.

    Of a convolution these are its patches, of which no others are made. The last feature is 1,
    where the layer has a bias. Rows come input by input within a position. ``room`` rows of the
    matrix are left to be filled. ``num_inputs`` is the size of the batch.
    """
    # Sums of products in half precision are too coarse to be positive definite.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count, every = len(x), len(chosen)
    if not kernel:
        values = by_position(x, kernel, num_inputs)
        count = len(values)
        if every < values.size(1):
            values = values[:, chosen.to(x.device)]
        size = x.size(-1)
        made = x.new_empty(size + has_bias + room, every * count)
        made[:size].view(-1, every, count).copy_(values.permute(2, 1, 0))
    else:
        geometry = _geometry(affine, x, kernel)
        if len(kernel) == 1:  # an image of one row
            x = x.unsqueeze(2)
        height, width = geometry.padding
        x = F.pad(x, (width, width, height, height))
        index = geometry.index(chosen, x.size(3)).to(x.device)
        channels, size = x.size(1), x.size(1) * len(index)
        made = x.new_empty(size + has_bias + room, every * count)
        # What is picked lies in one piece.
        places = x.permute(1, 2, 3, 0).reshape(channels, -1, count)
        picked = made[:size].view(channels, len(index) * every, count)
        torch.index_select(places, 1, index.flatten(), out=picked)
    if has_bias:
        made[size] = 1.0
    return made


@dataclass(frozen=True)
class _Geometry:
    """A convolution over images, as two numbers each: height and width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    outputs: tuple[int, int]

    def index(self, chosen: Tensor, width: int) -> Tensor:
        """Return ``(kernel's size, num_positions)``: where patches lie in a padded image."""
        row, column = chosen // self.outputs[1], chosen % self.outputs[1]
        first = row * self.stride[0] * width + column * self.stride[1]
        down, right = (
            torch.arange(size) * step for size, step in zip(self.kernel, self.dilation, strict=True)
        )
        return (down[:, None] * width + right).reshape(-1, 1) + first


def _geometry(affine: fx.Node, x: Tensor, kernel: Sequence[int]) -> _Geometry:
    stride, padding, dilation = convolution_geometry(affine, kernel)
    sizes, kernel = tuple(x.shape[2:]), tuple(kernel)
    if len(kernel) == 1:
        sizes, kernel, stride, dilation = (1, *sizes), (1, *kernel), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    outputs = (
        (size + 2 * pad - step * (k - 1) - 1) // by + 1
        for size, pad, step, k, by in zip(sizes, padding, dilation, kernel, stride, strict=True)
    )
    pairs = [(one[0], one[1]) for one in (kernel, stride, padding, dilation, tuple(outputs))]
    return _Geometry(*pairs)


def stacked(place: Place, state: State) -> Tensor:
    """Return a layer with its BatchNorm as ``(num_features (+ 1), num_channels)``, in float64.

    The last row is the bias, where there is one.
    """
    weight = state[place.kernel].double()
    weight = weight.T if place.is_transposed else weight.flatten(1)
    bias = weight.new_zeros(len(weight))
    if place.kernel_bias is not None:
        bias = state[place.kernel_bias].double()
    if place.norm is not None:
        norm = {role: state[name].double() for role, name in place.norm.items()}
        factor = norm["weight"] / (norm["running_var"] + place.epsilon).sqrt()
        weight = weight * factor[:, None]
        bias = (bias - norm["running_mean"]) * factor + norm["bias"]
    return weight.T if place.point.bias is None else torch.cat([weight.T, bias[None]])


def is_stored(place: Place, state: State, solved: Tensor) -> bool:
    """Say whether the parameters hold a solution already, up to their own roundings.

    Storing it anew would split it otherwise between a layer and its BatchNorm, and round it again.
    """
    stored, size = stacked(place, state), place.num_features(state[place.kernel])
    unit = torch.finfo(state[place.kernel].dtype).eps / 2
    scale = stored[:size].norm(dim=0)
    is_off = (solved - stored)[:size].norm(dim=0) > unit * scale
    is_shifted = (solved - stored)[size:].abs() > unit * (scale + stored[size:].abs())
    return not bool(is_off.any() or is_shifted.any())


def store_solution(
    place: Place, state: dict[str, Tensor], solved: Tensor, equations: NormalEquations
) -> None:
    """Put a solution ``(num_features (+ 1), num_channels)`` into the parameters."""
    has_bias = place.point.bias is not None
    weight = (solved[:-1] if has_bias else solved).T
    bias = solved[-1] if has_bias else None

    def put(name: str, value: Tensor) -> None:
        state[name] = value.reshape(state[name].shape).to(state[name])

    put(place.kernel, weight.T if place.is_transposed else weight)
    if place.norm is None:
        if place.kernel_bias is not None and bias is not None:
            put(place.kernel_bias, bias)
        return
    # The BatchNorm takes away what the layer's output has and puts back what the solution wants,
    # so that it is an honest norm of these data and can be trained on.
    assert bias is not None
    moments = equations.inputs / equations.rows
    mean = weight @ moments[:-1, -1]
    mean_square = torch.einsum("cf,fg,cg->c", weight, moments[:-1, :-1], weight)
    variance = (mean_square - mean.square()).clamp(min=0)
    if place.kernel_bias is not None:
        put(place.kernel_bias, torch.zeros_like(mean))
    put(place.norm["running_mean"], mean)
    put(place.norm["running_var"], variance)
    put(place.norm["weight"], (variance + place.epsilon).sqrt())
    put(place.norm["bias"], bias + mean)
