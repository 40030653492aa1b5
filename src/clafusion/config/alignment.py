"""The options of alignment: which layers of two networks belong together."""

from __future__ import annotations

from dataclasses import dataclass

from clafusion.settings import Choices, Settings, choice, flag

__all__ = ["ALIGNMENT_MODES", "LAYER_COSTS", "Alignment"]

LAYER_COSTS = Choices(
    cka="one minus linear CKA of the layers' outputs",
    cka_unbiased="the same with an estimate whose expectation is 0 for independent layers",
    cca="one minus the mean squared canonical correlation",
    wasserstein="the optimal transport between the layers' channels, exact",
    wasserstein_entropic="the same by Sinkhorn's iteration",
    neurons="the relative difference of the numbers of channels",
    index="the distance on the way through the network",
)

ALIGNMENT_MODES = Choices(
    layer="the cheapest alignment, exact",
    chain="a baseline: the earliest alignment that the structures admit",
    random="a baseline: a random alignment that the structures admit",
)


@dataclass(frozen=True)
class Alignment(Settings):
    """Which layers of two networks belong together."""

    cost: str = choice("cka", LAYER_COSTS, "the cost of matching two layers")
    mode: str = choice("layer", ALIGNMENT_MODES, "how the alignment is chosen")
    pin_ends: bool = flag(False, "match the first layers with each other, and the last ones")
