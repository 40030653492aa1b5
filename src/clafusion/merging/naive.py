"""Averaging without matching: what fusion has to beat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from clafusion.correspondence.correspondence import with_state
from clafusion.fusion import FusionResult
from clafusion.matching.head_order import exchanged_model
from clafusion.matching.weight_costs import index_plans
from clafusion.merging.blending import blend
from clafusion.merging.layer_weights import MergeWeights
from clafusion.tracing.heads import group_sources

__all__ = ["naive_average"]


def naive_average(result: FusionResult, deep_weight: float = 0.5) -> nn.Module:
    """Average the lifted network and the deep one of a fusion, channel by channel in order."""
    deep, shallow = result.lifting.deep, result.lifting.shallow
    sources: dict[int, int] = {}
    for index, order in result.head_orders.items():  # heads go back to where they were
        sources |= group_sources(shallow.heads[index], np.argsort(order).tolist())
    lifting = replace(result.lifting, shallow=exchanged_model(shallow, sources))
    state = blend(lifting, index_plans(lifting), MergeWeights(deep_weight))
    return with_state(deep.model, state, deep)
