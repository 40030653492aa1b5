r"""Match networks with different numbers of heads, such as attention heads.

Where both networks have equally many heads, each head has channel groups of its own, and
:mod:`clafusion.matching.head_order` brings them into one order. Where the numbers differ, the groups of
all heads are united into one, whose plan moves heads as wholes,

.. math:: T = \sum_{(i, j)} E_{ij} \otimes T_{ij},

with :math:`T_{ij}` the best plan of the channels of the source's head ``i`` and the target's head
``j``. Each head of the network that has more of them goes with one of the other's, which get
equally many up to one. Where the target has more, several of its heads are copies of one of the
source's, and what is read from that is divided among them: the source's function stays as it is.
Where the target has fewer, each of its heads is a mean of several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.matching.activation_costs import ActivationCost, pair_costs
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.model import ChannelGroup, HeadPartition, TracedModel, UnitedHeads
from clafusion.transport.solve import Solver, solve_transport

__all__ = ["HeadPairs", "head_plans", "plan_heads", "unite_heads", "unite_models"]

HeadPairs: TypeAlias = NDArray[np.float64]
"""``(num_source_blocks, num_target_blocks)``: 1 where two heads go together, else 0."""


def unite_heads(
    target: ModelProfile, source: ModelProfile, partner: Sequence[int]
) -> tuple[ModelProfile, ModelProfile]:
    """Do what :func:`unite_models` does to the graphs of profiles."""
    pairs = list(_unequal(target.traced, source.traced, partner))
    of_target, of_source = zip(*pairs, strict=True) if pairs else ((), ())
    return _united_profile(target, of_target), _united_profile(source, of_source)


def unite_models(
    target: TracedModel, source: TracedModel, partner: Sequence[int]
) -> tuple[TracedModel, TracedModel]:
    """Unite the groups of the heads of which matched layers have different numbers.

    ``partner`` has for each layer of the target that of the source, or -1. Returned are graphs of
    the same models with ``united`` heads, which correspond in order; what was given, where all
    matched layers have the same numbers.
    """
    pairs = list(_unequal(target, source, partner))
    of_target, of_source = zip(*pairs, strict=True) if pairs else ((), ())
    return _united(target, of_target), _united(source, of_source)


def head_plans(
    lifting: Correspondence,
    deep: ModelProfile,
    shallow: ModelProfile,
    *,
    metric: ActivationCost = "correlation",
    solver: Solver = "auto",
    epsilon: float = 0.05,
) -> tuple[dict[int, Tensor], list[HeadPairs | None]]:
    """Match heads by what the data show of their channels.

    Returns
    -------
    (plans, pairs)
        The plans ``(num_source, num_target)`` of the united groups that show, by group; and for
        each of ``lifting.deep.united`` which heads go together, or None where no class shows. The
        others can be matched by weights: see :func:`clafusion.matching.weight_costs.match_by_weights`.
    """
    plans: dict[int, Tensor] = {}
    pairs: list[HeadPairs | None] = []
    for one, other in zip(lifting.deep.united_heads, lifting.shallow.united_heads, strict=True):
        shown = [(c, lifting.groups[c], lifting.points[c]) for c in one.groups]
        costs = pair_costs(lifting, deep, shallow, shown, metric=metric)
        visible = {c: cost for c, cost in zip(one.groups, costs, strict=True) if bool(cost.any())}
        if not visible:
            pairs.append(None)
            continue
        found, together = plan_heads(
            list(visible.values()), (other.count, one.count), solver=solver, epsilon=epsilon
        )
        plans |= zip(visible, found, strict=True)
        pairs.append(together)
    return plans, pairs


def plan_heads(
    costs: Sequence[Tensor],
    counts: tuple[int, int],
    pairs: HeadPairs | None = None,
    *,
    solver: Solver = "auto",
    epsilon: float = 0.05,
) -> tuple[list[Tensor], HeadPairs]:
    """Return the plans of groups that share heads, and which heads go together.

    Parameters
    ----------
    costs
        For each class ``(num_source, num_target)``, head after head.
    counts
        How many heads the source and the target have.
    pairs
        Which heads go together, where that is known. Else the cost of two heads is the sum over
        the groups of what their best plans cost.
    """
    chosen = np.argwhere(np.ones(counts) if pairs is None else pairs).tolist()
    problems = []
    for cost in costs:
        heads = cost.unflatten(0, (counts[0], -1)).unflatten(2, (counts[1], -1))
        problems += [heads[i, :, j] for i, j in chosen]
    solved = iter(solve_transport(problems, solver=solver, epsilon=epsilon))
    plans = []
    total = np.zeros(counts)
    for cost in costs:
        heads = torch.zeros(cost.shape, dtype=torch.float64)
        heads = heads.unflatten(0, (counts[0], -1)).unflatten(2, (counts[1], -1))
        for i, j in chosen:
            one = next(solved)
            heads[i, :, j] = one.plan
            total[i, j] += float(one.cost)
        plans.append(heads)
    if pairs is None:
        pairs = _assigned(total)
    mass = torch.from_numpy(pairs / pairs.sum())[:, None, :, None]
    return [(mass * one).flatten(2, 3).flatten(0, 1) for one in plans], pairs


def _assigned(costs: NDArray[np.float64]) -> HeadPairs:
    """Match heads at the least cost in all.

    Of the side that has more each goes with one; the others get equally many up to one.
    """
    if costs.shape[0] < costs.shape[1]:
        return _assigned(costs.T).T
    more, fewer = costs.shape
    least, most = more // fewer, -(-more // fewer)
    # So much cheaper are the places that must be filled that none of them stays empty.
    bonus = 1.0 + more * float(costs.max() - costs.min())
    places = np.concatenate([costs - bonus * (turn < least) for turn in range(most)], 1)
    rows, columns = linear_sum_assignment(places)
    matched = np.zeros(costs.shape)
    matched[rows, columns % fewer] = 1.0
    return matched


# --- uniting ------------------------------------------------------------------------------------


def _unequal(
    target: TracedModel, source: TracedModel, partner: Sequence[int]
) -> Iterator[tuple[HeadPartition, HeadPartition]]:
    """Yield heads of matched layers that correspond, where their numbers differ."""
    for layer, k in zip(target.layers, partner, strict=True):
        if k < 0 or len(layer.parameters) != len(source.layers[k].parameters):
            continue
        names = dict(zip(layer.parameters, source.layers[k].parameters, strict=True))
        yield from _counterparts(target, source, layer.index, k, names)
        back = {other: name for name, other in names.items()}
        for of_source, of_target in _counterparts(source, target, k, layer.index, back):
            if len(of_target.members) == 1:  # which is no head among several
                yield of_target, of_source


def _counterparts(
    graph: TracedModel, other: TracedModel, layer: int, other_unit: int, names: Mapping[str, str]
) -> Iterator[tuple[HeadPartition, HeadPartition]]:
    """Yield a layer's heads with those of the other network, of which it has another number."""
    by_places: dict[Any, list[ChannelGroup]] = {}
    for one in other.groups:
        by_places.setdefault(_places(other, one, None), []).append(one)
    free = {
        tuple(column)
        for heads in other.heads
        for column in zip(*heads.members, strict=True)
        if _in_one_use(other, column)
    }
    for heads in graph.heads:
        if heads.layer != layer:
            continue
        found: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for column in zip(*heads.members, strict=True):
            alike = by_places.get(_places(graph, graph.groups[column[0]], names), [])
            theirs = tuple(one.index for one in sorted(alike, key=_first_place))
            if _in_one_use(graph, column) and (len(theirs) == 1 or theirs in free):
                found.setdefault(len(theirs), []).append((column, theirs))
        for count, columns in found.items():
            ours, others = zip(*columns, strict=True)
            # Of an attention's head channels are counted; else one class may be of many heads of
            # one channel each, as are groups of a norm.
            is_head = any(other.groups[one[0]].is_counted for one in others)
            if count != len(heads.members) and (count > 1 or is_head):
                yield (
                    HeadPartition(layer, tuple(zip(*ours, strict=True))),
                    HeadPartition(other_unit, tuple(zip(*others, strict=True))),
                )


def _places(graph: TracedModel, one: ChannelGroup, names: Mapping[str, str] | None) -> Any:
    """Return where a class occurs, but for its positions there."""
    found = []
    for group_axis in one.axes:
        name = group_axis.use.parameter
        uses = [use.index for use in graph.uses_by_parameter[name]]
        shown = name if names is None else names.get(name)
        place = uses.index(group_axis.use.index)
        found.append(
            (shown, place, group_axis.axis, group_axis.direction, group_axis.positions.size(1))
        )
    return tuple(found)


def _first_place(one: ChannelGroup) -> int:
    return int(one.axes[0].positions.min())


def _in_one_use(graph: TracedModel, groups: Sequence[int]) -> bool:
    """Say whether some groups lie side by side, and not in views of their own as groups do."""
    places = [
        [(group_axis.use.index, group_axis.axis) for group_axis in graph.groups[one].axes]
        for one in groups
    ]
    return all(one == places[0] for one in places)


def _united_profile(profile: ModelProfile, groups: Sequence[HeadPartition]) -> ModelProfile:
    importance = profile.importance
    if groups and importance:
        importance = tuple(
            torch.cat([importance[index] for index in parts]) / len(parts)
            for parts in _parts(profile.traced, groups)
        )
    return replace(profile, traced=_united(profile.traced, groups), importance=importance)


def _parts(graph: TracedModel, partitions: Sequence[HeadPartition]) -> list[tuple[int, ...]]:
    """Return for each group that there is afterwards those of which it is made."""
    columns = {column[0]: column for one in partitions for column in zip(*one.members, strict=True)}
    gone = {index for column in columns.values() for index in column[1:]}
    return [columns.get(one.index, (one.index,)) for one in graph.groups if one.index not in gone]


def _united(graph: TracedModel, partitions: Sequence[HeadPartition]) -> TracedModel:
    """Return a graph in which the groups of some heads are united."""
    if not partitions:
        return graph
    groups: list[ChannelGroup] = []
    new_group = torch.full((len(graph.groups) + 1,), -1)  # the last for fixed channels
    offset = torch.zeros(len(graph.groups) + 1, dtype=torch.int64)
    for indices in _parts(graph, partitions):
        parts = [graph.groups[index] for index in indices]
        for place, part in enumerate(parts):
            new_group[part.index] = len(groups)
            offset[part.index] = place * part.size
        group_axes = tuple(
            replace(each[0], positions=torch.cat([one.positions for one in each]))
            for each in zip(*(part.axes for part in parts), strict=True)
        )
        atoms = torch.cat([part.atoms for part in parts])
        is_counted = any(part.is_counted for part in parts)
        groups.append(ChannelGroup(len(groups), len(atoms), atoms, group_axes, is_counted))

    def renamed(one: Any) -> Any:
        """Name the channels of a hook point or a calibration point by the united groups."""
        members = one.members + offset[one.groups]
        return replace(one, groups=new_group[one.groups], members=members)

    layers = tuple(
        replace(
            layer,
            hook_points=tuple(map(renamed, layer.hook_points)),
            calibration_points=tuple(map(renamed, layer.calibration_points)),
        )
        for layer in graph.layers
    )
    gone = {index for one in partitions for head in one.members for index in head}
    left = []
    for heads in graph.heads:
        kept = [
            [int(new_group[index]) for index in column]
            for column in zip(*heads.members, strict=True)
            if column[0] not in gone
        ]
        if kept:
            left.append(HeadPartition(heads.layer, tuple(zip(*kept, strict=True))))
    united_heads = tuple(
        UnitedHeads(
            one.layer, len(one.members), tuple(int(new_group[index]) for index in one.members[0])
        )
        for one in partitions
    )
    return replace(
        graph, layers=layers, groups=tuple(groups), heads=tuple(left), united_heads=united_heads
    )
