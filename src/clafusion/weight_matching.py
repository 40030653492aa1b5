r"""Match channels by their weights, class after class, until nothing improves.

How alike two channels' weights are depends on how the channels on the weights' other side are
matched. So each class is matched in turn while the plans of the others stand still (Git Re-Basin,
Ainsworth et al., arXiv 2209.04836, algorithm 1: block coordinate descent). With the activations'
costs added, both spaces decide (MuDSC, Xu et al., arXiv 2403.01753).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from clafusion.blending import along
from clafusion.depth import Lifting, axes_of
from clafusion.errors import ConvergenceWarning
from clafusion.graph import ChannelClass, State
from clafusion.transport import Solver, solve_transport
from clafusion.united_blocks import BlockPairs, plan_blocks

__all__ = ["index_plan", "index_plans", "match_by_weights"]

_AT_REST = 1e-5  # of the mass: what Sinkhorn's float32 leaves


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


def index_plans(lifting: Lifting) -> list[Tensor | None]:
    """Return for each channel class of the deep network the plan that keeps the channels' order.

    Of blocks of which the networks have different numbers that is the order of the blocks, and of
    the channels within them.
    """
    plans: list[Tensor | None] = [
        None if other < 0 else index_plan(lifting.shallow.classes[other].size, one.size)
        for one, other in zip(lifting.deep.classes, lifting.classes, strict=True)
    ]
    for to, of in zip(lifting.deep.united, lifting.shallow.united, strict=True):
        for index in to.classes:
            source = lifting.shallow.classes[lifting.classes[index]].size // of.count
            target = lifting.deep.classes[index].size // to.count
            blocks = index_plan(of.count, to.count)
            plans[index] = torch.kron(blocks, index_plan(source, target))
    return plans


def match_by_weights(
    lifting: Lifting,
    *,
    activation_costs: Sequence[Tensor | None] | None = None,
    masses: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    known: Mapping[int, Tensor] | None = None,
    block_pairs: Sequence[BlockPairs | None] = (),
    solver: Solver = "auto",
    epsilon: float = 0.05,
    max_sweeps: int = 100,
) -> list[Tensor | None]:
    r"""Return a plan for each channel class of the deep network.

    With ``a`` and ``b`` all weights of two channels, the shallow network's in the deep one's frame
    by the other classes' plans, the cost is :math:`\lVert a - b \rVert^2`; with
    ``activation_costs`` it is the mean of :math:`1 - \cos(a, b)` and those.

    Parameters
    ----------
    lifting
        What corresponds.
    activation_costs
        For each class ``(num_source, num_target)``, in [0, 2], or None: see
        :func:`clafusion.neuron_costs.neuron_costs` with ``"correlation"``.
    masses
        For each class those of its source and target channels; default equal ones. See
        :func:`clafusion.importance.marginals`.
    known
        Plans that are known already, by class.
    block_pairs
        For each of ``lifting.deep.united`` which blocks go together, where that is known; see
        :func:`clafusion.united_blocks.block_plans`.
    solver, epsilon
        As for :func:`clafusion.transport.solve_transport`.
    max_sweeps
        How often at most all classes are matched.

    Returns
    -------
    list
        ``(num_source, num_target)``, or None where the shallow network has no such channels.

    Warns
    -----
    ConvergenceWarning
        The plans still changed in the last sweep. (By an exact solver and for equal widths they
        come to rest, for then every step lessens one sum of squares.)
    """
    known = known or {}
    states = lifting.deep.state(), lifting.shallow.state()
    plans = index_plans(lifting)
    for index, plan in known.items():
        plans[index] = plan

    def cost_of(index: int) -> Tensor:
        one = lifting.deep.classes[index]
        cost = _weight_costs(lifting, plans, one, states, activation_costs is not None)
        if activation_costs is None:
            return cost
        of_activations = activation_costs[index]
        assert of_activations is not None
        return (cost + of_activations.to(cost)) / 2

    def single(index: int) -> list[Tensor]:
        pair = None if masses is None else masses[index]
        weights = (None, None) if pair is None else ([pair[0]], [pair[1]])
        solved = solve_transport([cost_of(index)], *weights, solver=solver, epsilon=epsilon)
        return [one.plan for one in solved]

    def united(place: int, left: Sequence[int]) -> list[Tensor]:
        counts = lifting.shallow.united[place].count, lifting.deep.united[place].count
        pairs = block_pairs[place] if block_pairs else None
        costs = [cost_of(index) for index in left]
        return plan_blocks(costs, counts, pairs, solver=solver, epsilon=epsilon)[0]

    # What is matched at once: a class, or all united ones of the same blocks.
    steps: list[tuple[Sequence[int], Callable[[], list[Tensor]]]] = []
    in_blocks = {index for one in lifting.deep.united for index in one.classes}
    for place, one in enumerate(lifting.deep.united):
        left = [index for index in one.classes if index not in known]
        if left:
            steps.append((left, partial(united, place, left)))
    for index, plan_of in enumerate(plans):
        if plan_of is not None and index not in known and index not in in_blocks:
            steps.append(([index], partial(single, index)))
    steps.sort(key=lambda step: step[0][0])
    for _ in range(max_sweeps):
        changed = False
        for indices, match in steps:
            for index, plan in zip(indices, match(), strict=True):
                before = plans[index]
                assert before is not None, "classes without a partner are left out"
                moved = float((plan.to(before) - before).abs().sum() / before.sum()) / 2
                changed |= moved > _AT_REST
                plans[index] = plan.to(before)
        if not changed:
            return plans
    warnings.warn(
        f"matching by weights still changed after {max_sweeps} sweeps; its last plans are taken",
        ConvergenceWarning,
        stacklevel=2,
    )
    return plans


def _weight_costs(
    lifting: Lifting,
    plans: Sequence[Tensor | None],
    channel_class: ChannelClass,
    states: tuple[State, State],
    normalised: bool,
) -> Tensor:
    source_size = lifting.shallow.classes[lifting.classes[channel_class.index]].size
    device = next(iter(states[0].values())).device
    shape = (source_size, channel_class.size)
    cross = torch.zeros(shape, dtype=torch.float64, device=device)
    of_source, of_target = cross.new_zeros(source_size, 1), cross.new_zeros(channel_class.size)
    statistics = dict(lifting.deep.model.named_buffers())  # of activations: no weights
    for slot in channel_class.slots:
        name = slot.use.parameter
        if name not in lifting.names or name in statistics:
            continue
        other_name = lifting.names[name]
        place = [use.index for use in lifting.deep.uses_by_parameter[name]].index(slot.use.index)
        other_use = lifting.shallow.uses_by_parameter[other_name][place]
        axes, other_axes = axes_of(lifting.deep, name), axes_of(lifting.shallow, other_name)
        target = slot.use.view(states[0][name]).double()
        source = other_use.view(states[1][other_name]).double()
        for (where, axis), pairs in axes.items():
            if where == place and axis != slot.axis:
                length = slot.use.size[axis]
                source = along(plans, source, axis, length, pairs, other_axes[where, axis], name)
        on_axis = zip(axes[place, slot.axis], other_axes[place, slot.axis], strict=True)
        partner = next(other for (_, one), (_, other) in on_axis if one is slot)
        a = source.movedim(slot.axis, 0)[partner.positions.reshape(-1)].reshape(source_size, -1)
        b = target.movedim(slot.axis, 0)[slot.positions.reshape(-1)]
        b = b.reshape(channel_class.size, -1)
        cross += a @ b.T
        of_source += a.square().sum(1, keepdim=True)
        of_target += b.square().sum(1)
    if normalised:
        return 1 - cross / (of_source * of_target).sqrt().clamp(min=1e-30)
    return (of_source + of_target - 2 * cross).clamp(min=0)
