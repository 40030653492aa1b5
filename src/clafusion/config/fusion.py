"""All options of a fusion, and which of them do not go together."""

from __future__ import annotations

from dataclasses import dataclass

from clafusion.config.alignment import Alignment
from clafusion.config.assessment import Assessment
from clafusion.config.calibration import (
    AutoCalibration,
    BatchNorm,
    Calibration,
    LeastSquares,
    NoCalibration,
    Repair,
)
from clafusion.config.matching import Assignment, Auto, Exact, Matching, Orthogonal, Zip
from clafusion.config.merging import Barycentre, ManyToOne, Merging
from clafusion.config.needs import check_needed
from clafusion.config.profiling import Profiling
from clafusion.config.targets import Deeper, Like, Target, Wider
from clafusion.errors import InputError
from clafusion.settings import Choices, Settings, choice, count, flag, nested, text

__all__ = ["COMBINATIONS", "OUTPUTS", "FusionConfig"]

COMBINATIONS = Choices(
    auto="probabilities where the two means are far apart on the inputs, else logits",
    logits="the mean of their logits; of outputs that are no classes the mean of the values",
    probabilities="the mean of their probabilities",
)

OUTPUTS = Choices(
    same="they are the same classes or values, and become one",
    both="they are other classes: one trunk is shared, and each parent's head stays",
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
            check_needed(
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
            check_needed(who, self, ("calibration.toward", "auto", what))
        check_needed(
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
        check_needed(
            who,
            self,
            ("matching.importance", "uniform", "a channel has one place"),
            ("matching.outputs", False, "outputs are not moved"),
            ("merging.layer_weights", "uniform", "own places count in full"),
            ("merging.normalisation", "two", "what leaves and what enters a group differ"),
        )
