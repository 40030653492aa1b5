"""Every option of clafusion, once: its name, type, default, choices and one line of help.

Python keywords, ``config=``, the command line's options, manifests, cache keys and the reference
page are all made from here. This module imports no stage. To add an option, add one field.

Options that only make sense together are one value: a solver carries its own regularisation, a
calibration its own settings, a target its own widths. Where a value has variants (a *family*), each
variant is a class; its name is what a string, a manifest or the command line calls it. Subclassing
``Calibration`` or ``Target`` adds a variant, also from outside of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from clafusion.errors import InputError
from clafusion.settings import (
    Choices,
    Module,
    Option,
    Settings,
    choice,
    count,
    flag,
    nested,
    number,
    options_of,
    text,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ALIGNMENT_MODES",
    "ASSESSED_OUTPUTS",
    "CHANNEL_COSTS",
    "COMBINATIONS",
    "GRAPH_ROWS",
    "IMPORTANCES",
    "LAYER_COSTS",
    "LAYER_VALUES",
    "LAYER_WEIGHTS",
    "LEANS",
    "MERGES",
    "NORMALISATIONS",
    "OUTPUTS",
    "REASSEMBLY_COMBINATIONS",
    "WIDTHS",
    "Alignment",
    "Assessment",
    "Assignment",
    "Auto",
    "AutoCalibration",
    "Average",
    "Barycentre",
    "BatchNorm",
    "Calibration",
    "Choices",
    "Dare",
    "Deeper",
    "Exact",
    "FusionConfig",
    "Iterative",
    "LeastSquares",
    "Like",
    "ManyToOne",
    "Matching",
    "MergeConfig",
    "MergeMethod",
    "Merging",
    "NoCalibration",
    "Option",
    "Orthogonal",
    "Profiling",
    "ReassemblyConfig",
    "Repair",
    "Sensitivity",
    "Settings",
    "Shallower",
    "Sinkhorn",
    "Solver",
    "Strategy",
    "Target",
    "TaskArithmetic",
    "Ties",
    "Unbalanced",
    "Wider",
    "Zip",
    "choice",
    "count",
    "flag",
    "nested",
    "number",
    "options_of",
    "text",
]

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
LAYER_WEIGHTS = Choices(
    uniform="every layer has the parents' weights",
    sensitivity="each layer has its own, by how sensitive each parent's outputs are to it",
)
LAYER_VALUES = Choices(
    output="the layers' outputs",
    preactivation="their values before the nonlinearity",
)
WIDTHS = ("own", "narrow", "wide")
"""The words that a target's ``width`` can be; else it is a parent's name or position."""
NORMALISATIONS = Choices(
    two="one for what leaves a layer and one for what enters it",
    single="the published one, which shrinks where widths differ",
)
ASSESSED_OUTPUTS = Choices(
    auto="as classes where there are two or three axes and two or more entries, else as values",
    classes="by which class is the largest, and by the Kullback-Leibler divergence",
    values="by the relative squared error",
    none="not at all, and nothing is kept out of the fusion",
)
LEANS = Choices(
    auto="as 'largest'; with anchor 'auto' also one parent alone, where that comes clearly nearer",
    largest="the parent with the largest weight, of equals the one that gives the structure",
    any="whichever parent brings the outputs nearest; with anchor 'auto' 1 is tried, too",
)
REASSEMBLY_COMBINATIONS = Choices(
    auto="probabilities where the outputs are classes, else the mean of the values",
    logits="the mean of their logits; of outputs that are no classes the mean of the values",
    probabilities="the mean of their probabilities",
)
COMBINATIONS = Choices(
    auto="probabilities where the two means are far apart on the inputs, else logits",
    logits="the mean of their logits; of outputs that are no classes the mean of the values",
    probabilities="the mean of their probabilities",
)
OUTPUTS = Choices(
    same="they are the same classes or values, and become one",
    both="they are other classes: one trunk is shared, and each parent's head stays",
)
MERGES = Choices(
    least_squares="they are left out, and least squares makes up for them",
    sum="multiplied into the next: channels count whose sum is positive",
    majority="multiplied into the next: channels count that are mostly positive",
    average="multiplied into the next: channels count by how often they are positive",
)


# --- solvers ------------------------------------------------------------------------------------


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


# --- strategies ---------------------------------------------------------------------------------


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


# --- calibrations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration(Settings, family=True):
    """How what averaging destroys is restored.

    If you are not sure, take "auto". "repair" is faster and less accurate than "least_squares".
    ``needs_moments`` says whether it needs the parents' statistics, as
    :func:`clafusion.calibration.repair.moment_goals` does.
    """

    needs_moments: ClassVar[bool] = False


@dataclass(frozen=True)
class AutoCalibration(Calibration, name="auto"):
    """Least squares; where channels are zipped, which that does not go with, REPAIR."""


@dataclass(frozen=True)
class NoCalibration(Calibration, name="none"):
    """Leave the mean as it is."""


@dataclass(frozen=True)
class BatchNorm(Calibration, name="batchnorm"):
    """Estimate the running statistics of every BatchNorm again."""


@dataclass(frozen=True)
class Repair(Calibration, name="repair"):
    """Give every layer's outputs the parents' mean statistics (REPAIR, arXiv 2211.08403)."""

    needs_moments: ClassVar[bool] = True


@dataclass(frozen=True)
class LeastSquares(Calibration, name="least_squares"):
    """Regress every layer onto what the parents put out; slower and more accurate."""

    anchor: float | str = number(
        "auto",
        "how far the interior leans from the weights towards one parent",
        high=1.0,
        word="auto",
    )
    toward: str = choice("auto", LEANS, "towards which parent the interior leans")
    ridge: float = number(
        1e-3, "penalty on changes, relative to the mean square of a layer's inputs", above_low=True
    )
    samples: int = count(
        2000, "how many inputs are used; fewer where their activations would take more than 4 GB"
    )


# --- targets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target(Settings, family=True):
    """Which structure the result gets. If you are not sure, take "deeper".

    ``reference`` says with which parent the others are aligned: the deepest or the shallowest, of
    equals the first.
    """

    reference: ClassVar[Literal["deepest", "shallowest"]] = "deepest"


_OWN, *_BY_SIZE = WIDTHS
_WIDTH = (
    f"whose widths: {_OWN} (of the parent that gives the depth; of equally deep ones the first), "
    f"{', '.join(_BY_SIZE)}, or a parent's name or position"
)


@dataclass(frozen=True)
class Deeper(Target, name="deeper"):
    """As deep as the deepest parent; where several are the deeper one somewhere, as their union."""

    width: str | int = text(_OWN, _WIDTH, also=int)


@dataclass(frozen=True)
class Shallower(Target, name="shallower"):
    """As deep as the shallowest parent; the others' layers that it lacks go."""

    reference: ClassVar[Literal["deepest", "shallowest"]] = "shallowest"

    width: str | int = text(_OWN, _WIDTH, also=int)
    merge: str = choice("least_squares", MERGES, "how the layers go that the result lacks")


@dataclass(frozen=True)
class Wider(Target, name="wider"):
    """As "deeper", with room for channels that only one of two networks has: average to ensemble.

    Channels that agree share a place, the others keep places of their own. Which share is one
    partial transport over all layers. At factor 2 nothing has to be shared: the result puts out the
    mean of both networks' outputs, where no norm spans channels.
    """

    factor: float = number(
        1.25, "from 1, as wide as the wider of both, to 2, both side by side", low=1.0, high=2.0
    )

    def __post_init__(self) -> None:
        factor = self.factor
        if isinstance(factor, Real) and not isinstance(factor, bool):
            if factor < 1:
                raise InputError(
                    f"factor must be in [1, 2]; got {factor!r}: below 1 the wider network's "
                    "channels have no place. For fewer channels give target=Deeper(width='narrow') "
                    "or target=Like(module)"
                )
            if factor > 2:
                raise InputError(
                    f"factor must be in [1, 2]; got {factor!r}: at 2 both networks stand side by "
                    "side, and channels beyond that would have nothing to do"
                )
        super().__post_init__()


@dataclass(frozen=True)
class Like(Target, name="like"):
    """Like a module of yours that can hold the parents' layers; its weights do not matter."""

    template: nn.Module | str = text(
        "", "the module (on the command line and in manifests what makes it)", also=Module
    )
    own_places: bool = flag(
        False,
        "of two networks: channels beyond the wider one's are for what only one has, not copies",
    )


# --- stages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profiling(Settings):
    """What is recorded of every parent on the data."""

    alignment_samples: int = count(
        400, "inputs over which layers are compared; held in memory at once", least=2
    )
    matching_rows: int = count(
        8192, "pairs of input and position over which channels are compared", least=2
    )
    layer_values: str = choice("output", LAYER_VALUES, "by what layers are compared")
    inputs: int | None = count(None, "profile on this many inputs only; default all", least=2)


@dataclass(frozen=True)
class Alignment(Settings):
    """Which layers of two networks belong together."""

    cost: str = choice("cka", LAYER_COSTS, "the cost of matching two layers")
    mode: str = choice("layer", ALIGNMENT_MODES, "how the alignment is chosen")
    pin_ends: bool = flag(False, "match the first layers with each other, and the last ones")


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
            _check_needed(
                "solver 'zip'",
                self,
                ("cost", "correlation", "groups are made by correlation"),
                ("importance", "uniform", "it moves no masses"),
                ("outputs", False, "outputs are not merged"),
            )


@dataclass(frozen=True)
class Merging(Settings):
    """How the parents are averaged."""

    strategy: Strategy = nested(Strategy, ManyToOne(), "in which order several are averaged")
    layer_weights: str = choice(
        "uniform", LAYER_WEIGHTS, "whether layers have weights of their own"
    )
    normalisation: str = choice("two", NORMALISATIONS, "how plans are normalised")


@dataclass(frozen=True)
class Assessment(Settings):
    """How the result is assessed, without labels: see :class:`clafusion.FusionAssessment`.

    The first floating output that inputs and weights enter counts. By default it is taken as
    classes where it has the shape ``(batch, classes)`` or ``(batch, positions, classes)`` with at
    least 2 classes, or where you give the axis. It is taken as values where it has more axes, as an
    image, or one number for each input. Say ``outputs="values"`` for a regression with several
    numbers.
    """

    outputs: str = choice("auto", ASSESSED_OUTPUTS, "how the first floating output is compared")
    axis: int = count(-1, "the axis of the classes; the batch has axis 0", least=-8)
    held_out: float = number(
        0.1, "the share of the inputs that is kept out of the fusion for it", high=0.9
    )


@dataclass(frozen=True)
class FusionConfig(Settings):
    """How to fuse: every option that there is.

    Each field is also a keyword of :func:`clafusion.fuse`. A string stands for a value with its
    defaults: ``calibration="repair"`` is ``calibration=Repair()``.

    Raises
    ------
    InputError
        An option is out of its range, or two do not go together; the message names it.
    """

    profiling: Profiling = nested(Profiling, Profiling(), "what is recorded of the parents")
    alignment: Alignment = nested(Alignment, Alignment(), "which layers belong together")
    target: Target = nested(Target, Deeper(), "which structure the result gets")
    matching: Matching = nested(Matching, Matching(), "which channels belong together")
    merging: Merging = nested(Merging, Merging(), "how the parents are averaged")
    calibration: Calibration = nested(
        Calibration, AutoCalibration(), "how what is lost is restored"
    )
    assessment: Assessment = nested(Assessment, Assessment(), "how the result is assessed")
    combine: str = choice(
        "auto", COMBINATIONS, "what the parents put out together, where outputs are classes"
    )
    outputs: str = choice("same", OUTPUTS, "what the parents' outputs are to each other")
    shared: float | str = text(
        1.0,
        "of outputs='both' how much of the deeper network is shared: a share of its layers, from 0 "
        "(side by side) to 1 (all but the heads), or the name of the last layer",
        also=float,
    )
    verify: bool = flag(True, "prove the analysis of each parent by permuting a copy")
    seed: int = count(0, "seed of every random choice", least=0, most=2**63 - 1)

    @classmethod
    def paper(cls, *, match_outputs: bool = True) -> FusionConfig:
        """Return the settings of CLAFusion as published (arXiv 2110.15538), step by step.

        Profiles are pre-activations of the first 200 inputs; layers are aligned by linear CKA with
        the first and last pinned; channels are matched exactly by the Euclidean distance of their
        pre-activations; plans are normalised once (OTFusion, arXiv 1910.05653, algorithm 1);
        nothing is calibrated, and no inputs are kept out. The published code matches the
        classifier's outputs too, unless it is told to skip the last layer.
        """
        return cls(
            profiling=Profiling(
                alignment_samples=200,
                matching_rows=1 << 18,  # all positions of 200 images of 32 by 32
                layer_values="preactivation",
                inputs=200,
            ),
            alignment=Alignment(pin_ends=True),
            matching=Matching(cost="euclidean", solver=Exact(), outputs=match_outputs),
            merging=Merging(normalisation="single"),
            calibration=NoCalibration(),
            assessment=Assessment(held_out=0.0),
        )

    @property
    def used_calibration(self) -> Calibration:
        """The calibration, or what "auto" stands for."""
        if not isinstance(self.calibration, AutoCalibration):
            return self.calibration
        return Repair() if isinstance(self.matching.solver, Zip) else LeastSquares()

    @property
    def has_own_places(self) -> bool:
        """Whether channels that only one of two networks has get places of their own."""
        target = self.target
        return isinstance(target, Wider) or (isinstance(target, Like) and target.own_places)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_shared()
        if self.has_own_places:
            self._check_own_places()
        if isinstance(self.matching.solver, Zip):
            _check_needed(
                "matching.solver='zip'",
                self,
                ("merging.layer_weights", "uniform", "each channel has its own weights already"),
                ("merging.normalisation", "two", "what leaves and what enters a group differ"),
            )
            if isinstance(self.calibration, LeastSquares):
                raise InputError(
                    "matching.solver='zip' does not go with calibration='least_squares', which "
                    "chooses from all parents' channels itself: use matching.solver='auto' or "
                    "another calibration"
                )
        if self.matching.outputs and self.profiling.layer_values != "preactivation":
            raise InputError(
                "matching.outputs needs profiling.layer_values='preactivation'; got "
                f"{self.profiling.layer_values!r}"
            )

    def _check_shared(self) -> None:
        shared = self.shared
        if not isinstance(shared, str) and not 0 <= shared <= 1:  # NaN fails it, too
            raise InputError(
                "shared must be a share of the layers in [0, 1], or the name of a layer; got "
                f"{shared!r}"
            )
        if self.outputs == "same":
            if shared != 1.0:
                raise InputError(
                    f"shared={shared!r} needs outputs='both': of the same outputs all is shared"
                )
            return
        who = "outputs='both'"
        if not isinstance(self.merging.strategy, ManyToOne):
            raise InputError(
                f"{who} does not go with merging.strategy={self.merging.strategy.name!r}: use "
                "'many_to_one'"
            )
        if isinstance(self.matching.solver, Orthogonal):
            raise InputError(
                f"{who} does not go with matching.solver='orthogonal', whose rotations the heads "
                "cannot follow: use matching.solver='auto'"
            )
        if isinstance(self.calibration, BatchNorm):
            raise InputError(
                f"{who} does not go with calibration='batchnorm': use calibration='repair', which "
                "estimates the statistics of every layer again"
            )
        if isinstance(self.calibration, LeastSquares) and self.calibration.toward == "any":
            what = "no output tells towards whom a trunk should lean"
            _check_needed(who, self, ("calibration.toward", "auto", what))
        _check_needed(
            who,
            self,
            ("target", Deeper(), "trunk and heads have the parents' own widths"),
            ("matching.outputs", False, "other classes do not match"),
            ("merging.layer_weights", "uniform", "heads count in full"),
            ("merging.normalisation", "two", "what leaves and what enters a group differ"),
            ("combine", "auto", "other classes have no mean"),
        )

    def _check_own_places(self) -> None:
        who = f"target {self.target.name!r}" + (
            "" if isinstance(self.target, Wider) else " with own_places"
        )
        if not isinstance(self.matching.solver, (Auto, Assignment)):
            raise InputError(
                f"{who} does not go with matching.solver={self.matching.solver.name!r}: which "
                "channels share a place is an assignment. Use matching.solver='auto'"
            )
        if self.matching.cost in ("weights", "both"):
            raise InputError(
                f"{who} does not go with matching.cost={self.matching.cost!r}: what shares a place "
                "shows by the activations. Use matching.cost='correlation'"
            )
        if isinstance(self.merging.strategy, Barycentre):
            raise InputError(
                f"{who} does not go with merging.strategy='barycentre', which matches again: use "
                "merging.strategy='many_to_one'"
            )
        _check_needed(
            who,
            self,
            ("matching.importance", "uniform", "a channel has one place"),
            ("matching.outputs", False, "outputs are not moved"),
            ("merging.layer_weights", "uniform", "own places count in full"),
            ("merging.normalisation", "two", "what leaves and what enters a group differ"),
        )


# --- models of one origin -----------------------------------------------------------------------


@dataclass(frozen=True)
class MergeMethod(Settings, family=True):
    """How models that were trained from one base become one. If you are not sure, take "ties".

    A *task vector* is what training has added to the base's weights.
    """


def _scaling(default: float) -> Any:
    return number(default, "by how much the merged task vector is multiplied")


@dataclass(frozen=True)
class Average(MergeMethod, name="average"):
    """The weighted mean of the models; the base does not enter (model soups, arXiv 2203.05482)."""


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod, name="task_arithmetic"):
    """Add the sum of all task vectors to the base (task arithmetic, arXiv 2212.04089)."""

    scaling: float = _scaling(0.4)


@dataclass(frozen=True)
class Ties(MergeMethod, name="ties"):
    """Trim task vectors, elect a sign for each entry, take the mean of those that have it.

    TIES, arXiv 2306.01708.
    """

    scaling: float = _scaling(1.0)
    density: float = number(
        0.2, "share of each task vector's entries that is kept", high=1.0, above_low=True
    )


@dataclass(frozen=True)
class Dare(MergeMethod, name="dare"):
    """Drop random entries of the task vectors and rescale the others (DARE, arXiv 2311.03099)."""

    scaling: float = _scaling(0.4)
    density: float = number(
        0.5, "share of each task vector's entries that is kept", high=1.0, above_low=True
    )
    elect: bool = flag(False, "then elect signs and take the mean, as TIES does, not the sum")


@dataclass(frozen=True)
class Sensitivity(MergeMethod, name="sensitivity"):
    """Add task vectors, each layer's by which model's outputs are the most sensitive to it.

    In the spirit of Sens-Merging, arXiv 2502.12420: see :mod:`clafusion.merging.sensitivity`. It
    needs inputs of each model's own task.
    """

    scaling: float = _scaling(0.4)
    temperature: float = number(
        0.1,
        "temperature of the softmax over the models: the lower, the more one of them counts",
        above_low=True,
    )
    samples: int = count(500, "how many inputs of each task sensitivities are taken on at the most")


@dataclass(frozen=True)
class MergeConfig(Settings):
    """How to merge models of one origin: every option of :func:`clafusion.merge`.

    Raises
    ------
    InputError
        An option is out of its range; the message names it.
    """

    method: MergeMethod = nested(MergeMethod, Ties(), "how the models become one")
    calibration: Calibration = nested(
        Calibration, NoCalibration(), "how what is lost is restored, where there are data"
    )
    assessment: Assessment = nested(Assessment, Assessment(), "how the result is assessed")
    furthest: float = number(
        0.9, "how far a model's weights may be from the base's, relative to their norm"
    )
    verify: bool = flag(True, "prove the analysis of each parent by permuting a copy")
    seed: int = count(0, "seed of every random choice", least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        calibration = self.calibration
        if isinstance(calibration, LeastSquares) and calibration.anchor not in ("auto", 0.0):
            raise InputError(
                f"calibration.anchor={calibration.anchor} is for fusions: a merge leans towards no "
                "model. Leave it out"
            )
        if isinstance(calibration, LeastSquares) and calibration.toward == "any":
            raise InputError(
                f"calibration.toward={calibration.toward!r} is for fusions: a merge leans towards "
                "no model. Leave it out"
            )

    @property
    def fusion(self) -> FusionConfig:
        """The options of the stages that a merge shares with a fusion."""
        return FusionConfig(
            profiling=Profiling(alignment_samples=2, matching_rows=2),  # nothing is matched
            calibration=self.calibration,
            assessment=self.assessment,
            verify=self.verify,
            seed=self.seed,
        )


# --- reassembly ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReassemblyConfig(Settings):
    """How blocks of models become a network: every option of :func:`clafusion.reassemble`.

    Raises
    ------
    InputError
        An option is out of its range; the message names it.
    """

    blocks: int = count(3, "into how many blocks each model is cut", least=2, most=16)
    candidates: int = count(16, "how many networks are stitched, and assessed")
    samples: int = count(1000, "how many inputs stitches are fitted to at the most", least=2)
    ridge: float = number(
        1e-4,
        "penalty on a stitch's map, relative to the mean square of what it reads",
        above_low=True,
    )
    most_parameters: int | None = count(None, "how many parameters the result may have")
    most_operations: int | None = count(
        None, "how many floating-point operations the result may take for an input"
    )
    assessment: Assessment = nested(
        Assessment, Assessment(held_out=0.3), "how networks are assessed, to choose one"
    )
    combine: str = choice(
        "auto",
        REASSEMBLY_COMBINATIONS,
        "what the models put out together, which a network is to meet",
    )
    seed: int = count(0, "seed of every random choice", least=0, most=2**63 - 1)


def _check_needed(who: str, settings: Settings, *needs: tuple[str, Any, str]) -> None:
    for path, needed, reason in needs:
        if attrgetter(path)(settings) != needed:
            raise InputError(f"{who} needs {path}={needed!r}, for {reason}")
