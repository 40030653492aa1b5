"""How a layer's parameters stand for the matrix that is solved for, and take a solution."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from clafusion.calibration.least_squares.equations import Equations
from clafusion.calibration.least_squares.places import Place
from clafusion.execution.call import State

__all__ = ["is_stored", "stacked", "store_solution"]

_AT_ONCE = 64  # channels that are compared


def stacked(place: Place, state: State, channels: slice = slice(None)) -> Tensor:
    """Return a layer with its BatchNorm as ``(num_features (+ 1), num_channels)``, in float64.

    The last row is the bias, where there is one. ``channels`` are the layer's outputs; default all.
    The matrix lies in memory as the kernel does.
    """
    kernel = state[place.kernel]
    weight = kernel[:, channels] if place.is_transposed else kernel.flatten(1).T[:, channels]
    size, count = weight.shape
    has_bias = place.point.bias is not None
    order = (0, 1) if place.is_transposed else (1, 0)
    found = torch.empty_permuted(
        (size + has_bias, count), order, dtype=torch.float64, device=weight.device
    )
    bias = found.new_zeros(count)
    if place.kernel_bias is not None:
        bias = state[place.kernel_bias][channels].double()
    if place.norm is None:
        found[:size] = weight
    else:
        norm = {role: state[name][channels].double() for role, name in place.norm.items()}
        factor = norm["weight"] / (norm["running_var"] + place.epsilon).sqrt()
        torch.mul(weight, factor, out=found[:size])
        bias = (bias - norm["running_mean"]) * factor + norm["bias"]
    if has_bias:
        found[size] = bias
    return found


def is_stored(place: Place, state: State, solved: Tensor) -> bool:
    """Say whether the parameters hold a solution already, up to their own roundings.

    Storing it anew would split it otherwise between a layer and its BatchNorm, and round it again.
    """
    kernel = state[place.kernel]
    size, unit = place.num_features(kernel), torch.finfo(kernel.dtype).eps / 2
    for first in range(0, solved.size(1), _AT_ONCE):  # mostly the first are off
        channels = slice(first, first + _AT_ONCE)
        stored = stacked(place, state, channels)
        change = solved[:, channels] - stored
        scale = stored[:size].norm(dim=0)
        is_off = change[:size].norm(dim=0) > unit * scale
        is_shifted = change[size:].abs() > unit * (scale + stored[size:].abs())
        if bool(is_off.any() or is_shifted.any()):
            return False
    return True


def store_solution(
    place: Place,
    state: MutableMapping[str, Tensor],
    solved: Tensor,
    equations: Equations | None = None,
) -> None:
    """Put a solution ``(num_features (+ 1), num_channels)`` into the parameters.

    A layer with a BatchNorm needs the equations that were solved.
    """
    has_bias = place.point.bias is not None
    weight = (solved[:-1] if has_bias else solved).T
    bias = solved[-1] if has_bias else None

    def put(name: str, value: Tensor) -> None:
        # Laid out as in a file: products of other layouts are rounded otherwise.
        state[name] = value.to(state[name]).reshape(state[name].shape).contiguous()

    put(place.kernel, weight.T if place.is_transposed else weight)
    if place.norm is None:
        if place.kernel_bias is not None and bias is not None:
            put(place.kernel_bias, bias)
        return
    # The BatchNorm takes away what the layer's output has and puts back what the solution wants,
    # so that it is an honest norm of these data and can be trained on.
    assert bias is not None
    assert equations is not None
    mean, mean_square = equations.output_moments(weight)
    variance = (mean_square - mean.square()).clamp(min=0)
    if place.kernel_bias is not None:
        put(place.kernel_bias, torch.zeros_like(mean))
    put(place.norm["running_mean"], mean)
    put(place.norm["running_var"], variance)
    put(place.norm["weight"], (variance + place.epsilon).sqrt())
    put(place.norm["bias"], bias + mean)
