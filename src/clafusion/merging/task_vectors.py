r"""Task vectors: what training has added to a base's weights, and how several become one.

With the base's parameter :math:`\theta_0`, those of the models :math:`\theta_p`, the task vectors
:math:`\tau_p = \theta_p - \theta_0`, weights :math:`w_p` that add up to 1 and a scaling
:math:`\lambda` the merged parameter of ``n`` models is

.. math:: \theta_0 + \lambda\, n \sum_p w_p \tau_p

by task arithmetic (arXiv 2212.04089); with equal weights that is the published sum. TIES (arXiv
2306.01708) keeps of each whole task vector the entries of the largest magnitudes, elects for each
entry the sign of :math:`\sum_p w_p \tau_p`, and takes the weighted mean of those task vectors that
have it. DARE (arXiv 2311.03099) drops each entry with probability ``1 - density`` and divides the
others by ``density``, before either of the two. Merging by sensitivity gives each layer weights of
its own: see :mod:`clafusion.merging.sensitivity`.

Everything is computed in float64, a part of a tensor at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clafusion.config import Average, Dare, MergeMethod, Sensitivity, TaskArithmetic, Ties
from clafusion.errors import InputError
from clafusion.merging.mean import weighted_mean

__all__ = ["PART", "TaskVectors", "magnitude_threshold"]

PART = 1 << 22
"""How many entries of a tensor are computed with at once."""
_HIGH, _LOW = 1 << 16, 1 << 15  # a magnitude in float32 has so many upper and lower halves


@dataclass(frozen=True)
class TaskVectors:
    """How models of one base are merged, parameter by parameter.

    Attributes
    ----------
    method
        The rule.
    weights
        The models' weights; they add up to 1.
    thresholds
        For TIES the magnitude from which on each model's task vector is kept: see
        :func:`magnitude_threshold`.
    seed
        The seed of what is dropped.
    own_weights
        By a parameter's name the models' weights in it, where they are not those of all.
    """

    method: MergeMethod
    weights: tuple[float, ...]
    thresholds: tuple[float, ...] = ()
    seed: int = 0
    own_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def merged(self, name: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
        """Return a merged parameter, in the type and on the device of the base's.

        What is dropped depends on the seed, the position of the model and the parameter's name, and
        not on the number of threads or the device.

        Raises
        ------
        InputError
            The type cannot hold the result.
        """
        made = torch.empty_like(base, memory_format=torch.contiguous_format)
        flat = [one.to(base.device).reshape(-1) for one in (base, *models)]
        drawing = [self._generator(i, name) for i in range(len(models))]
        weights = self.own_weights.get(name, self.weights)
        into = made.view(-1)
        for start in range(0, base.numel(), PART):
            part = slice(start, start + PART)
            first, *others = (one[part].double() for one in flat)
            into[part] = self._merged_part(first, others, drawing, weights)
        if not bool(made.isfinite().all()):
            kind = str(made.dtype).removeprefix("torch.")
            raise InputError(
                f"{name!r} of the result is beyond the numbers that {kind} holds, the type of the "
                "base: take a smaller method.scaling, or convert all models to float32"
            )
        return made

    def _merged_part(
        self,
        base: Tensor,
        models: Sequence[Tensor],
        drawing: Sequence[torch.Generator],
        weights: Sequence[float],
    ) -> Tensor:
        method = self.method
        if isinstance(method, Average):
            return weighted_mean(models, weights)
        vectors = own = [one - base for one in models]
        if isinstance(method, Ties):
            vectors = [
                torch.where(one.abs().float() >= least, one, 0.0)
                for one, least in zip(own, self.thresholds, strict=True)
            ]
        elif isinstance(method, Dare):
            vectors = [
                torch.where(_draw(one, drawn) < method.density, one / method.density, 0.0)
                for one, drawn in zip(own, drawing, strict=True)
            ]
        elif not isinstance(method, (TaskArithmetic, Sensitivity)):
            raise InputError(
                f"method={method.name!r} is unknown: methods of your own are not supported"
            )
        elects = isinstance(method, Ties) or (isinstance(method, Dare) and method.elect)
        added = method.scaling * (_elected if elects else _sum)(vectors, weights)
        merged = base + added
        for model, one in zip(models, own, strict=True):  # which rounding would miss
            merged = torch.where(added == one, model, merged)
        return merged

    def _generator(self, position: int, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {position} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for weight, one in zip(weights, vectors, strict=True):
        total += len(vectors) * weight * one
    return total


def _elected(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the mean of the entries that have the sign of the sum; 0 where that is 0."""
    sign = _sum(vectors, weights).sign()
    agreeing = [
        weight * (one.sign() == sign).double() for weight, one in zip(weights, vectors, strict=True)
    ]
    return torch.where(sign == 0, 0.0, weighted_mean(vectors, agreeing))


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers from [0, 1), made on the CPU, whatever the device is."""
    return torch.rand(len(like), generator=generator, dtype=torch.float64).to(like.device)


def magnitude_threshold(vectors: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Return the magnitude that a share of all numbers reaches.

    With ``k`` the share of them, rounded up, it is the ``k``-th largest magnitude, in float32. It
    is found exactly, by counting the upper and then the lower halves of the magnitudes' bits: two
    passes, in which only one tensor is held.

    Parameters
    ----------
    vectors
        Called for each pass; yields tensors, the same each time.
    density
        The share, in (0, 1].
    """
    if density >= 1.0:
        return 0.0
    upper = _counted(vectors, lambda bits: bits >> 15, _HIGH)
    left = -int(-density * int(upper.sum()) // 1)  # rounded up
    high, above = _bin_of(upper, left)
    lower = _counted(vectors, lambda bits: bits[bits >> 15 == high] & (_LOW - 1), _LOW)
    low, _ = _bin_of(lower, left - above)
    bits = torch.tensor(high << 15 | low, dtype=torch.int32)
    return float(bits.view(torch.float32))


def _counted(
    vectors: Callable[[], Iterable[Tensor]], of: Callable[[Tensor], Tensor], count: int
) -> Tensor:
    """Return how many numbers have each value of what ``of`` makes of their magnitudes' bits."""
    found = torch.zeros(count, dtype=torch.int64)
    for one in vectors():
        for part in one.reshape(-1).split(PART):
            bits = part.abs().float().contiguous().view(torch.int32)
            found += torch.bincount(of(bits), minlength=count).cpu()
    return found


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin in which the ``wanted``-th largest lies, and how many lie above it."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, wanted))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, above
