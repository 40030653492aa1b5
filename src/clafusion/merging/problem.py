"""One target, any number of parents: all that averaging and calibration need to know.

The network that gives the target its structure is a parent as all others, with the identity
correspondence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.moving import move_state, move_values
from clafusion.execution.call import State
from clafusion.execution.lazy import LazyState
from clafusion.matching.weight_costs import is_at_rest
from clafusion.merging.combination import Combination
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.layer import CalibrationPoint
from clafusion.tracing.model import TracedModel
from clafusion.transport.plan import TransportPlan
from clafusion.weights.storage import InMemory, Storage

__all__ = ["FusionProblem", "MergeWeights", "Parent", "plans_are_at_rest"]

_AT_REST = 1e-4  # mean square by which a rotation moves a channel of length 1


@dataclass(frozen=True)
class MergeWeights:
    """A parent's weight in each layer of the target.

    Attributes
    ----------
    overall
        Its weight in the outputs, and in every layer that has no weight of its own.
    own
        Parameter (or buffer) of the target -> the parent's weight.
    """

    overall: float
    own: Mapping[str, float] = field(default_factory=dict)

    def of(self, parameter: str) -> float:
        """Return the parent's weight in a parameter, and in the layer that it belongs to."""
        return self.own.get(parameter, self.overall)

    def of_layers(self, target: TracedModel) -> tuple[float, ...]:
        """Return the parent's weight in each layer of the target."""
        return tuple(
            next((self.own[name] for name in layer.parameters if name in self.own), self.overall)
            for layer in target.layers
        )


@dataclass(frozen=True)
class Parent:
    """A network that is fused, and how it maps to the target.

    Attributes
    ----------
    name
        What the caller calls it.
    profile
        What it does on the data. ``profile.traced`` is ``correspondence.source``.
    correspondence
        How it maps to the target.
    plans
        For each channel group of ``correspondence.target`` its transport plan, or None where the
        source has no such channels; ``plan.dense()`` is the matrix.
    weights
        Its merge weights.
    output_plan
        A plan for the outputs, which are otherwise never moved.
    head_orders
        Where attention heads or convolution groups had to change places to match the target's:
        index in ``correspondence.source.heads`` -> for every place the one that came there.
        ``correspondence.source`` is of a copy with that order.
    rotations
        Where residual streams were rotated into the target's (:class:`clafusion.Orthogonal`):
        channel group of the target -> the orthogonal matrix. ``correspondence.source`` is of a
        copy that is rotated so, and the group's plan is the identity.
    """

    name: str
    profile: ModelProfile
    correspondence: Correspondence
    plans: tuple[TransportPlan | None, ...]
    weights: MergeWeights
    output_plan: TransportPlan | None = None
    head_orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    rotations: Mapping[int, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Parent {self.name}: {self.traced!r}, weight {self.weights.overall:.3g}>"

    @property
    def traced(self) -> TracedModel:
        """The parent's own traced model."""
        return self.correspondence.source

    @cached_property
    def is_identity(self) -> bool:
        """Whether the parent is the target itself, and none of its channels moves."""
        return self.correspondence.source is self.correspondence.target and all(
            plan is not None and plan.is_identity for plan in self.plans
        )

    @cached_property
    def covered(self) -> tuple[Tensor | None, ...]:
        """For each group of the target into which of its channels some mass moves; None for all."""
        every = (None if plan is None else plan.covered for plan in self.plans)
        return tuple(None if one is None or bool(one.all()) else one for one in every)

    def state(self, normalisation: str = "two") -> State:
        """Return the parent's parameters in the target's structure, channels and widths."""
        if self.is_identity and self.output_plan is None:
            own = self.traced.state()
            return {name: one for name, one in own.items() if one.is_floating_point()}
        state = move_state(self.correspondence, self.plans, normalisation)
        if self.output_plan is None:
            return state
        point = self.correspondence.target.layers[-1].calibration_points[-1]
        axes = {point.weight: point.weight_axis, point.bias: 0}
        plan = self.output_plan

        def make(name: str) -> Tensor:
            value = state[name]
            return plan.outgoing(value, axes[name]) if name in axes else value

        return LazyState(state, make)

    def moved(self, values: Tensor, node: str, source: CalibrationPoint) -> Tensor:
        """Bring values, channels last, from a point of the parent to the target's at ``node``."""
        if self.is_identity:
            return values
        target = self.correspondence.target_points[node]
        return move_values(values, self.correspondence, self.plans, target, source)

    def covers(self, node: str) -> Tensor | None:
        """Return into which channels of the target's point some mass moves; None for all."""
        if all(one is None for one in self.covered):
            return None
        point = self.correspondence.target_points[node]
        mask = torch.ones(len(point.groups), dtype=torch.bool)
        for one in point.groups[point.groups >= 0].unique().tolist():
            covered = self.covered[one]
            if covered is not None:
                places = torch.nonzero(point.groups == one).squeeze(1)
                mask[places] = covered[point.members[places]]
        return mask


@dataclass(frozen=True)
class FusionProblem:
    """One target and its parents.

    Attributes
    ----------
    target
        The structure of the result. Its module's weights are those of the parents that fix
        the order and the number of each group's channels.
    parents
        At least one, with weights that add up to 1 in every layer that all have.
    reference
        Position of the parent that fixes most of the target's channels; of equal parents the
        interior leans towards it.
    normalisation
        How plans are normalised: ``"two"`` or ``"single"``.
    storage
        Where the averaged and calibrated weights are kept.
    merged
        The parents' parameters in one, where another rule than the mean has made them so. A
        calibration starts from them, and chooses no channels anew.
    owners
        Where each parent has a task of its own: for each batch of the data the parent whose task it
        is of, which alone is to be met there. Empty where all parents count on all batches.
    combination
        What the parents put out together, where outputs are classes.
    is_beginning
        Whether the target is the beginning of a network: what it puts out are channels, which the
        plans move, and not what the parents put out together.
    frozen
        Parameters and buffers that a calibration leaves as they are.
    """

    target: TracedModel
    parents: tuple[Parent, ...]
    reference: int = 0
    normalisation: str = "two"
    storage: Storage = field(default_factory=InMemory, compare=False)
    merged: State | None = field(default=None, compare=False)
    owners: tuple[int, ...] = ()
    combination: Combination = field(default_factory=Combination)
    is_beginning: bool = False
    frozen: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<FusionProblem of {', '.join(self.names)} into {self.target!r}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The parents' names."""
        return tuple(one.name for one in self.parents)

    @property
    def largest(self) -> int:
        """The position of the parent with the largest weight; of equals ``reference``."""
        own = [one.weights.overall for one in self.parents]
        return max(range(len(own)), key=lambda i: (own[i], i == self.reference))


def plans_are_at_rest(before: FusionProblem, after: FusionProblem) -> bool:
    """Say whether nothing moves any channel otherwise: no plan, order of heads or rotation."""
    return all(
        left.head_orders == right.head_orders
        and _are_near(left.rotations, right.rotations)
        and all(
            one is other
            or (one is not None and other is not None and is_at_rest(one, other, averages=True))
            for one, other in zip(left.plans, right.plans, strict=True)
        )
        for left, right in zip(before.parents, after.parents, strict=True)
    )


def _are_near(left: Mapping[int, Tensor], right: Mapping[int, Tensor]) -> bool:
    """Say whether the same groups are rotated, and hardly otherwise."""
    return left.keys() == right.keys() and all(
        float((one - right[index]).square().sum(1).mean()) < _AT_REST for index, one in left.items()
    )
