"""The options of matching, and the family of solvers: which channels belong together."""

from __future__ import annotations

from dataclasses import dataclass

from clafusion.config.needs import check_needed
from clafusion.errors import InputError
from clafusion.settings import Choices, Settings, choice, flag, nested, number

__all__ = [
    "CHANNEL_COSTS",
    "GRAPH_ROWS",
    "IMPORTANCES",
    "Assignment",
    "Auto",
    "Exact",
    "Matching",
    "Orthogonal",
    "Sinkhorn",
    "Solver",
    "Unbalanced",
    "Zip",
]

CHANNEL_COSTS = Choices(
    correlation="one minus the correlation of the channels' pre-activations",
    euclidean="the Euclidean distance of the channels' pre-activations",
    weights="the distance of the channels' weights, as the other channels are matched",
    both="the mean of the costs by correlation and by weights",
    energy="of graph networks: how far the channels' changes along the graph's edges are apart",
    fused_gromov_wasserstein="of graph networks: how far channels are apart as signals on a graph "
    "whose nodes may move; slow",
)

GRAPH_ROWS = {"energy": "edges", "fused_gromov_wasserstein": "structure"}
"""What the rows of a profile are, for costs of channels that look at the structure of a graph."""

IMPORTANCES = Choices(
    uniform="all channels have the same mass",
    norm="by the norm of the weights that make the channel",
    activation="by the channel's mean absolute activation",
    sensitivity="by how sensitive the outputs are to the channel's weights",
)


@dataclass(frozen=True)
class Solver(Settings, family=True):
    """How channels are matched, given the cost of every two. If you are not sure, take "auto"."""


@dataclass(frozen=True)
class Auto(Solver, name="auto"):
    """An assignment where both sides have equal masses and sizes, else exact transport."""


@dataclass(frozen=True)
class Assignment(Solver, name="assignment"):
    """The best permutation, exact; it needs as many channels on both sides."""


@dataclass(frozen=True)
class Exact(Solver, name="exact"):
    """Exact optimal transport (network simplex)."""


@dataclass(frozen=True)
class Sinkhorn(Solver, name="sinkhorn"):
    """Entropic optimal transport by Sinkhorn's iteration."""

    epsilon: float = number(
        0.05, "entropic regularisation, relative to the largest cost", above_low=True
    )


@dataclass(frozen=True)
class Unbalanced(Solver, name="unbalanced"):
    """Sinkhorn's iteration with soft marginals: a channel may move less, or more, than its mass."""

    epsilon: float = number(
        0.05, "entropic regularisation, relative to the largest cost", above_low=True
    )
    marginal_relaxation: float = number(
        1.0, "cost of a marginal's deviation, relative to the largest cost", above_low=True
    )


@dataclass(frozen=True)
class Zip(Solver, name="zip"):
    """Unite similar channels across networks and within each (ZipIt, arXiv 2305.03053).

    For networks that learnt different things.
    """

    budget: float = number(
        0.1, "share of a layer's channels that may be merged within one network", high=1.0
    )


@dataclass(frozen=True)
class Orthogonal(Solver, name="orthogonal"):
    """Rotate residual streams that norms alone read, by the data; match all else as "auto" does.

    For pre-norm transformers. The result's norms are folded into the layers that read them.
    """


@dataclass(frozen=True)
class Matching(Settings):
    """Which channels belong together."""

    cost: str = choice("correlation", CHANNEL_COSTS, "the cost of matching two channels")
    solver: Solver = nested(Solver, Auto(), "how channels are matched")
    importance: str = choice("uniform", IMPORTANCES, "the mass that each channel has")
    outputs: bool = flag(False, "match the outputs, too, as if they were not labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance != "uniform" and isinstance(self.solver, Assignment):
            raise InputError(
                "importance must be 'uniform' with solver 'assignment', which moves equal masses; "
                f"got {self.importance!r}: use solver='auto' or 'exact'"
            )
        if isinstance(self.solver, Zip):
            check_needed(
                "solver 'zip'",
                self,
                ("cost", "correlation", "groups are made by correlation"),
                ("importance", "uniform", "it moves no masses"),
                ("outputs", False, "outputs are not merged"),
            )
