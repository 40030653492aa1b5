"""Averaging without matching: what fusion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clafusion.blending import blend
from clafusion.depth import with_state
from clafusion.pipeline import FusionResult

__all__ = ["index_plan", "naive_average"]


def index_plan(num_source: int, num_target: int) -> Tensor:
    """Return the plan ``(num_source, num_target)`` that keeps the channels' order.

    Each channel is an interval of [0, 1]; the mass between two is how far they overlap. For equal
    numbers that is the identity.
    """
    source = torch.arange(num_source + 1, dtype=torch.float64) / num_source
    target = torch.arange(num_target + 1, dtype=torch.float64) / num_target
    upper = torch.minimum(source[1:, None], target[None, 1:])
    lower = torch.maximum(source[:-1, None], target[None, :-1])
    return (upper - lower).clamp(min=0)


def naive_average(result: FusionResult, deep_weight: float = 0.5) -> nn.Module:
    """Average the lifted network and the deep one of a fusion, channel by channel in order."""
    deep, shallow = result.lifting.deep, result.lifting.shallow
    plans = [
        None if other < 0 else index_plan(shallow.classes[other].size, one.size)
        for one, other in zip(deep.classes, result.lifting.classes, strict=True)
    ]
    return with_state(deep.model, blend(result.lifting, plans, deep_weight), deep)
