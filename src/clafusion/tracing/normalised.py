"""Weights that a model divides by a norm of their own: what they are, and how to average them.

Weight norm holds a direction and a length for each channel, spectral norm a weight and two vectors
that estimate its largest singular value, scaled weight standardisation (arXiv 2101.08692) a weight
and a gain for each channel, ``scale * gain * (w - mean(w)) / sqrt(var(w) + eps)``. Of all, many
values make one weight: a direction may have any length, and the vectors any sign. So parents are
brought to those values at which the parameter is the weight itself. Only then can the parameters be
averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clafusion.execution.call import State

__all__ = ["NormalisedWeight"]

_ALIKE = 0.05  # of the largest singular value: what two vectors must show of it to be kept
_STEPS = 20  # of the power iteration that finds others


@dataclass(frozen=True)
class NormalisedWeight:
    """A weight that is computed from a parameter and a norm of it.

    Attributes
    ----------
    kind
        ``"length"`` for weight norm, ``"spectral"`` for spectral norm, ``"standard"`` for scaled
        weight standardisation.
    parameter
        The parameter that the model divides.
    others
        The lengths; or the left and the right vector; or the gains.
    axis
        The weight's axis of the lengths (-1 for a single length), of the left vector, or of the
        gains.
    eps, scale
        What is added to the variance, and what multiplies the gains, of a standardised weight.
    """

    kind: Literal["length", "spectral", "standard"]
    parameter: str
    others: tuple[str, ...]
    axis: int
    eps: float = 0.0
    scale: float = 1.0

    def gauged(self, state: State) -> dict[str, Tensor]:
        """Return values of the same weight at which the parameter is the weight itself."""
        value = state[self.parameter]
        if self.kind == "length":
            (name,) = self.others
            weight = torch._weight_norm(value, state[name], self.axis)
            return {self.parameter: weight, **self.completed({self.parameter: weight}, state)}
        if self.kind == "standard":
            mean, deviation = self._moments(value)
            gain = self.scale * state[self.others[0]].reshape(deviation.shape)
            weight = gain * (value - mean) / deviation
            return {self.parameter: weight, **self.completed({self.parameter: weight}, state)}
        left, right = (state[one] for one in self.others)
        return {self.parameter: value / self._singular(value, left, right)}

    def completed(self, found: Mapping[str, Tensor], like: State) -> dict[str, Tensor]:
        """Return the other values at which a parameter is the weight itself.

        Parameters
        ----------
        found
            The parameter.
        like
            Vectors that belong to a similar weight, and lengths of the right shape.
        """
        weight = found[self.parameter]
        if self.kind == "length":
            (name,) = self.others
            norms = torch.norm_except_dim(weight, 2, self.axis)
            return {name: norms.reshape(like[name].shape)}
        if self.kind == "standard":
            (name,) = self.others
            _, deviation = self._moments(weight)
            return {name: (deviation / self.scale).reshape(like[name].shape)}
        left, right = (like[one].to(weight) for one in self.others)
        matrix = weight.movedim(self.axis, 0).flatten(1).double()
        shown = float(self._singular(weight, left, right))
        largest = float(torch.linalg.matrix_norm(matrix, 2))
        if shown < _ALIKE * largest * float(left.norm() * right.norm()):
            vector = right.double()
            for _ in range(_STEPS):
                vector = torch.nn.functional.normalize(matrix.mT @ (matrix @ vector), dim=0)
            right = vector.to(weight)
            left = torch.nn.functional.normalize(matrix @ vector, dim=0).to(weight)
            shown = float(self._singular(weight, left, right))
        return {self.others[0]: left / (shown or 1.0), self.others[1]: right}

    def _moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of each row, and the root of its variance plus ``eps``."""
        axes = [axis for axis in range(weight.dim()) if axis != self.axis]
        variance, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
        return mean, (variance + self.eps).sqrt()

    def _singular(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return what the vectors show of the weight's largest singular value."""
        return left @ (weight.movedim(self.axis, 0).flatten(1) @ right)
