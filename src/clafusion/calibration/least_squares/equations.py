"""The regression of one layer: its rows, its normal equations, and how a solution is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from clafusion.calibration.least_squares.places import Place
from clafusion.execution.call import State
from clafusion.execution.walk import Walk
from clafusion.profiling.profile import gram_matrix
from clafusion.threads import one_thread
from clafusion.tracing.model import CalibrationPoint
from clafusion.tracing.operations import bound_operands, convolution_geometry

__all__ = [
    "NormalEquations",
    "channels_last",
    "chosen_positions",
    "chosen_rows",
    "incoming_node",
    "patches",
    "stacked",
    "store_solution",
    "with_ones",
]

_ROUNDS = 2  # of the majorisation of a ReLU
_LEAST_ROWS = 4  # for each column, at least
_ENTRIES = 1 << 27  # a regression's inputs at the most: half a gigabyte
_RUN, _RUNS = 256, 16  # rows that are summed in float32, and how many such runs at once


class NormalEquations:
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
        # Sums of products in half precision are too coarse to be positive definite.
        wide = torch.promote_types(x.dtype, torch.float32)
        x, goal = x.to(wide), goal.to(wide)
        self.inputs += _squares(x)
        self.residuals += _products(x, goal - x @ self.start.to(x))
        self.rows += len(x)
        if active is not None:
            self._kept.append((x, active.to(wide)))

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
                residuals += _products(x, goal - found)
            weights = weights + torch.cholesky_solve(residuals, factor)
        return weights


def _squares(x: Tensor) -> Tensor:
    """Return ``X^T X`` in float64, the same bytes for any number of threads."""
    if x.dtype == torch.float64:  # which the package's kernel would round
        with one_thread():
            return x.T @ x
    return gram_matrix(x.T)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return ``X^T Y`` in float64, the same bytes for any number of threads.

    PyTorch shares long sums among its threads, and adds up their parts in float32. So the sums are
    made in short runs of rows, and the runs added up here.
    """
    total = torch.zeros(x.size(1), y.size(1), dtype=torch.float64, device=x.device)
    if x.dtype == torch.float64:
        with one_thread():
            return total + x.T @ y
    whole = len(x) // _RUN * _RUN
    for of_x, of_y in zip(
        x[:whole].split(_RUNS * _RUN), y[:whole].split(_RUNS * _RUN), strict=True
    ):
        runs = [one.unflatten(0, (-1, _RUN)) for one in (of_x, of_y)]
        total += (runs[0].mT @ runs[1]).double().sum(0)
    with one_thread():
        return total + x[whole:].T @ y[whole:]


def channels_last(walk: Walk, node: str, point: CalibrationPoint) -> Tensor:
    """Return a layer's output, channels last."""
    value: Tensor = walk.reach(node)
    return value.movedim(point.axis, -1)


def incoming_node(affine: fx.Node) -> str:
    """Return the name of the node that feeds a layer."""
    return str(bound_operands(affine)["input"].name)


def chosen_positions(
    value: Tensor, num_columns: int, most: int, num_inputs: int, generator: torch.Generator
) -> Tensor:
    """Choose the positions of a value, channels last, of which rows are made."""
    positions = value[0, ..., 0].numel()
    rows = min(most, max(_ENTRIES // num_columns, _LEAST_ROWS * num_columns))
    count = min(positions, max(1, -(-rows // num_inputs)))
    chosen = torch.randperm(positions, generator=generator)[:count].sort().values
    return chosen.to(value.device)


def chosen_rows(value: Tensor, chosen: Tensor) -> Tensor:
    """Return ``(num_rows, num_channels)``: a value, channels last, at some of its positions."""
    return value.flatten(1, -2)[:, chosen].flatten(0, 1) if value.dim() > 2 else value


def with_ones(place: Place, inputs: Tensor) -> Tensor:
    """Return rows of inputs, with a 1 behind each where the layer has a bias."""
    rows = inputs.flatten(0, 1)
    if place.point.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def patches(affine: fx.Node, x: Tensor, kernel: Sequence[int]) -> Tensor:
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


def stacked(place: Place, state: State) -> Tensor:
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


def store_solution(
    place: Place, state: dict[str, Tensor], solved: Tensor, equations: NormalEquations
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
