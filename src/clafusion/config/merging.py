"""The options of merging, and the family of strategies: how the parents are averaged."""

from __future__ import annotations

from dataclasses import dataclass

from clafusion.settings import Choices, Settings, choice, count, nested

__all__ = [
    "LAYER_WEIGHTS",
    "NORMALISATIONS",
    "Barycentre",
    "Iterative",
    "ManyToOne",
    "Merging",
    "Strategy",
]

LAYER_WEIGHTS = Choices(
    uniform="every layer has the parents' weights",
    sensitivity="each layer has its own, by how sensitive each parent's outputs are to it",
)

NORMALISATIONS = Choices(
    two="one for what leaves a layer and one for what enters it",
    single="the published one, which shrinks where widths differ",
)


@dataclass(frozen=True)
class Strategy(Settings, family=True):
    """In which order more than two parents are averaged. Of two, all are the same but barycentre.

    If you are not sure, take "many_to_one".
    """


@dataclass(frozen=True)
class ManyToOne(Strategy, name="many_to_one"):
    """Bring all parents into the target's channels and average them at once."""


@dataclass(frozen=True)
class Iterative(Strategy, name="iterative"):
    """Fuse one after another, each with what the ones before it became."""


@dataclass(frozen=True)
class Barycentre(Strategy, name="barycentre"):
    """Match all parents with their mean, again and again, until no plan changes.

    The plans then agree with each other (Agueh and Carlier, SIAM J. Math. Anal. 2011; for networks
    C2M3, arXiv 2405.17897).
    """

    max_rounds: int = count(10, "after how many rounds the mean is taken as it is")


@dataclass(frozen=True)
class Merging(Settings):
    """How the parents are averaged."""

    strategy: Strategy = nested(Strategy, ManyToOne(), "in which order several are averaged")
    layer_weights: str = choice(
        "uniform", LAYER_WEIGHTS, "whether layers have weights of their own"
    )
    normalisation: str = choice("two", NORMALISATIONS, "how plans are normalised")
