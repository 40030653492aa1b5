"""How a layer's parameters stand for the matrix that is solved for, and take a solution."""

from __future__ import annotations

import torch
from torch import Tensor

from clafusion.calibration.least_squares.equations import Equations
from clafusion.calibration.least_squares.places import Place
from clafusion.execution.call import State

__all__ = ["is_stored", "stacked", "store_solution"]


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
    place: Place, state: dict[str, Tensor], solved: Tensor, equations: Equations
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
    mean, mean_square = equations.output_moments(weight)
    variance = (mean_square - mean.square()).clamp(min=0)
    if place.kernel_bias is not None:
        put(place.kernel_bias, torch.zeros_like(mean))
    put(place.norm["running_mean"], mean)
    put(place.norm["running_var"], variance)
    put(place.norm["weight"], (variance + place.epsilon).sqrt())
    put(place.norm["bias"], bias + mean)
