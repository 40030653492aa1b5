"""Averaging without matching: what fusion has to beat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from clafusion.blending import blend
from clafusion.block_matching import exchanged_graph
from clafusion.blocks import class_sources
from clafusion.depth import with_state
from clafusion.layer_weights import LayerShares
from clafusion.pipeline import FusionResult
from clafusion.weight_matching import index_plans

__all__ = ["naive_average"]


def naive_average(result: FusionResult, deep_weight: float = 0.5) -> nn.Module:
    """Average the lifted network and the deep one of a fusion, channel by channel in order."""
    deep, shallow = result.lifting.deep, result.lifting.shallow
    sources: dict[int, int] = {}
    for index, order in result.block_orders.items():  # heads go back to where they were
        sources |= class_sources(shallow.blocks[index], np.argsort(order).tolist())
    lifting = replace(result.lifting, shallow=exchanged_graph(shallow, sources))
    state = blend(lifting, index_plans(lifting), LayerShares(deep_weight))
    return with_state(deep.model, state, deep)
