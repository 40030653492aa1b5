r"""Match networks with different numbers of blocks, such as attention heads.

Where both networks have equally many blocks, each block has channel classes of its own, and
:mod:`clafusion.block_matching` brings them into one order. Where the numbers differ, the classes of
all blocks are united into one, whose plan moves blocks as wholes,

.. math:: T = \sum_{(i, j)} E_{ij} \otimes T_{ij},

with :math:`T_{ij}` the best plan of the channels of the source's block ``i`` and the target's block
``j``. Each block of the network that has more of them goes with one of the other's, which get
equally many up to one. Where the target has more, several of its blocks are copies of one of the
source's, and what is read from that is divided among them: the source's function stays as it is.
Where the target has fewer, each of its blocks is a mean of several.
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

from clafusion.depth import Lifting
from clafusion.graph import ChannelBlocks, ChannelClass, ModelGraph, UnitedBlocks
from clafusion.neuron_costs import ActivationCost, pair_costs
from clafusion.signatures import Signature
from clafusion.transport import Solver, solve_transport

__all__ = ["BlockPairs", "block_plans", "plan_blocks", "unite_blocks", "unite_graphs"]

BlockPairs: TypeAlias = NDArray[np.float64]
"""``(num_source_blocks, num_target_blocks)``: 1 where two blocks go together, else 0."""


def unite_blocks(
    target: Signature, source: Signature, partner: Sequence[int]
) -> tuple[Signature, Signature]:
    """Do what :func:`unite_graphs` does to the graphs of signatures."""
    pairs = list(_unequal(target.graph, source.graph, partner))
    of_target, of_source = zip(*pairs, strict=True) if pairs else ((), ())
    return _united_signature(target, of_target), _united_signature(source, of_source)


def unite_graphs(
    target: ModelGraph, source: ModelGraph, partner: Sequence[int]
) -> tuple[ModelGraph, ModelGraph]:
    """Unite the classes of the blocks of which matched units have different numbers.

    ``partner`` has for each unit of the target that of the source, or -1. Returned are graphs of
    the same models with ``united`` blocks, which correspond in order; what was given, where all
    matched units have the same numbers.
    """
    pairs = list(_unequal(target, source, partner))
    of_target, of_source = zip(*pairs, strict=True) if pairs else ((), ())
    return _united(target, of_target), _united(source, of_source)


def block_plans(
    lifting: Lifting,
    deep: Signature,
    shallow: Signature,
    *,
    metric: ActivationCost = "correlation",
    solver: Solver = "auto",
    epsilon: float = 0.05,
) -> tuple[dict[int, Tensor], list[BlockPairs | None]]:
    """Match blocks by what the data show of their channels.

    Returns
    -------
    (plans, pairs)
        The plans ``(num_source, num_target)`` of the united classes that show, by class; and for
        each of ``lifting.deep.united`` which blocks go together, or None where no class shows. The
        others can be matched by weights: see :func:`clafusion.weight_matching.match_by_weights`.
    """
    plans: dict[int, Tensor] = {}
    pairs: list[BlockPairs | None] = []
    for one, other in zip(lifting.deep.united, lifting.shallow.united, strict=True):
        shown = [(c, lifting.classes[c], lifting.points[c]) for c in one.classes]
        costs = pair_costs(lifting, deep, shallow, shown, metric=metric)
        visible = {c: cost for c, cost in zip(one.classes, costs, strict=True) if bool(cost.any())}
        if not visible:
            pairs.append(None)
            continue
        found, together = plan_blocks(
            list(visible.values()), (other.count, one.count), solver=solver, epsilon=epsilon
        )
        plans |= zip(visible, found, strict=True)
        pairs.append(together)
    return plans, pairs


def plan_blocks(
    costs: Sequence[Tensor],
    counts: tuple[int, int],
    pairs: BlockPairs | None = None,
    *,
    solver: Solver = "auto",
    epsilon: float = 0.05,
) -> tuple[list[Tensor], BlockPairs]:
    """Return the plans of classes that share blocks, and which blocks go together.

    Parameters
    ----------
    costs
        For each class ``(num_source, num_target)``, block after block.
    counts
        How many blocks the source and the target have.
    pairs
        Which blocks go together, where that is known. Else the cost of two blocks is the sum over
        the classes of what their best plans cost.
    """
    chosen = np.argwhere(np.ones(counts) if pairs is None else pairs).tolist()
    problems = []
    for cost in costs:
        blocks = cost.unflatten(0, (counts[0], -1)).unflatten(2, (counts[1], -1))
        problems += [blocks[i, :, j] for i, j in chosen]
    solved = iter(solve_transport(problems, solver=solver, epsilon=epsilon))
    plans = []
    total = np.zeros(counts)
    for cost in costs:
        blocks = torch.zeros(cost.shape, dtype=torch.float64)
        blocks = blocks.unflatten(0, (counts[0], -1)).unflatten(2, (counts[1], -1))
        for i, j in chosen:
            one = next(solved)
            blocks[i, :, j] = one.plan
            total[i, j] += float(one.cost)
        plans.append(blocks)
    if pairs is None:
        pairs = _assigned(total)
    mass = torch.from_numpy(pairs / pairs.sum())[:, None, :, None]
    return [(mass * one).flatten(2, 3).flatten(0, 1) for one in plans], pairs


def _assigned(costs: NDArray[np.float64]) -> BlockPairs:
    """Match blocks at the least cost in all.

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
    target: ModelGraph, source: ModelGraph, partner: Sequence[int]
) -> Iterator[tuple[ChannelBlocks, ChannelBlocks]]:
    """Yield blocks of matched units that correspond, where their numbers differ."""
    for unit, k in zip(target.units, partner, strict=True):
        if k < 0 or len(unit.parameters) != len(source.units[k].parameters):
            continue
        names = dict(zip(unit.parameters, source.units[k].parameters, strict=True))
        yield from _counterparts(target, source, unit.index, k, names)
        back = {other: name for name, other in names.items()}
        for of_source, of_target in _counterparts(source, target, k, unit.index, back):
            if len(of_target.members) == 1:  # which is no block among several
                yield of_target, of_source


def _counterparts(
    graph: ModelGraph, other: ModelGraph, unit: int, other_unit: int, names: Mapping[str, str]
) -> Iterator[tuple[ChannelBlocks, ChannelBlocks]]:
    """Yield a unit's blocks with those of the other network, of which it has another number."""
    by_places: dict[Any, list[ChannelClass]] = {}
    for one in other.classes:
        by_places.setdefault(_places(other, one, None), []).append(one)
    free = {
        tuple(column)
        for blocks in other.blocks
        for column in zip(*blocks.members, strict=True)
        if _in_one_use(other, column)
    }
    for blocks in graph.blocks:
        if blocks.unit != unit:
            continue
        found: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for column in zip(*blocks.members, strict=True):
            alike = by_places.get(_places(graph, graph.classes[column[0]], names), [])
            theirs = tuple(one.index for one in sorted(alike, key=_first_place))
            if _in_one_use(graph, column) and (len(theirs) == 1 or theirs in free):
                found.setdefault(len(theirs), []).append((column, theirs))
        for count, columns in found.items():
            ours, others = zip(*columns, strict=True)
            # Of an attention's head channels are counted; else one class may be of many blocks of
            # one channel each, as are groups of a norm.
            is_head = any(other.classes[one[0]].is_counted for one in others)
            if count != len(blocks.members) and (count > 1 or is_head):
                yield (
                    ChannelBlocks(unit, tuple(zip(*ours, strict=True))),
                    ChannelBlocks(other_unit, tuple(zip(*others, strict=True))),
                )


def _places(graph: ModelGraph, one: ChannelClass, names: Mapping[str, str] | None) -> Any:
    """Return where a class occurs, but for its positions there."""
    found = []
    for slot in one.slots:
        name = slot.use.parameter
        uses = [use.index for use in graph.uses_by_parameter[name]]
        shown = name if names is None else names.get(name)
        place = uses.index(slot.use.index)
        found.append((shown, place, slot.axis, slot.direction, slot.positions.size(1)))
    return tuple(found)


def _first_place(one: ChannelClass) -> int:
    return int(one.slots[0].positions.min())


def _in_one_use(graph: ModelGraph, classes: Sequence[int]) -> bool:
    """Say whether some classes lie side by side, and not in views of their own as groups do."""
    places = [[(slot.use.index, slot.axis) for slot in graph.classes[one].slots] for one in classes]
    return all(one == places[0] for one in places)


def _united_signature(signature: Signature, groups: Sequence[ChannelBlocks]) -> Signature:
    importance = signature.importance
    if groups and importance:
        importance = tuple(
            torch.cat([importance[index] for index in parts]) / len(parts)
            for parts in _parts(signature.graph, groups)
        )
    return replace(signature, graph=_united(signature.graph, groups), importance=importance)


def _parts(graph: ModelGraph, groups: Sequence[ChannelBlocks]) -> list[tuple[int, ...]]:
    """Return for each class that there is afterwards those of which it is made."""
    columns = {column[0]: column for one in groups for column in zip(*one.members, strict=True)}
    gone = {index for column in columns.values() for index in column[1:]}
    return [columns.get(one.index, (one.index,)) for one in graph.classes if one.index not in gone]


def _united(graph: ModelGraph, groups: Sequence[ChannelBlocks]) -> ModelGraph:
    """Return a graph in which the classes of some blocks are united."""
    if not groups:
        return graph
    classes: list[ChannelClass] = []
    new_class = torch.full((len(graph.classes) + 1,), -1)  # the last for fixed channels
    offset = torch.zeros(len(graph.classes) + 1, dtype=torch.int64)
    for indices in _parts(graph, groups):
        parts = [graph.classes[index] for index in indices]
        for place, part in enumerate(parts):
            new_class[part.index] = len(classes)
            offset[part.index] = place * part.size
        slots = tuple(
            replace(each[0], positions=torch.cat([one.positions for one in each]))
            for each in zip(*(part.slots for part in parts), strict=True)
        )
        atoms = torch.cat([part.atoms for part in parts])
        is_counted = any(part.is_counted for part in parts)
        classes.append(ChannelClass(len(classes), len(atoms), atoms, slots, is_counted))

    def renamed(one: Any) -> Any:
        """Name the channels of a read point or a site by the united classes."""
        members = one.members + offset[one.classes]
        return replace(one, classes=new_class[one.classes], members=members)

    units = tuple(
        replace(
            unit,
            read_points=tuple(map(renamed, unit.read_points)),
            sites=tuple(map(renamed, unit.sites)),
        )
        for unit in graph.units
    )
    gone = {index for one in groups for block in one.members for index in block}
    left = []
    for blocks in graph.blocks:
        kept = [
            [int(new_class[index]) for index in column]
            for column in zip(*blocks.members, strict=True)
            if column[0] not in gone
        ]
        if kept:
            left.append(ChannelBlocks(blocks.unit, tuple(zip(*kept, strict=True))))
    united = tuple(
        UnitedBlocks(
            one.unit, len(one.members), tuple(int(new_class[index]) for index in one.members[0])
        )
        for one in groups
    )
    return replace(graph, units=units, classes=tuple(classes), blocks=tuple(left), united=united)
