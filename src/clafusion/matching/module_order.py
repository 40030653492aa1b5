"""Match the modules of a list, such as a mixture's experts, before the channels within them.

The cost of two modules is that of the best plans of their channels, as for heads. What flows
through a module shows at other places than what flows through the one in whose place it comes, so
that a profile of a network with modules in another order has to be observed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.hooks import HookPair
from clafusion.matching.activation_costs import pair_costs
from clafusion.matching.head_order import corresponding_heads
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.layer import HookPoint
from clafusion.tracing.model import TracedModel
from clafusion.tracing.points import places_of
from clafusion.transport.solve import solve_compactly

__all__ = ["module_orders"]


def module_orders(
    correspondence: Correspondence,
    target: ModelProfile,
    source: ModelProfile,
    *,
    metric: str = "correlation",
    known: Collection[int] = (),
) -> dict[int, tuple[int, ...]]:
    """Return in which order the source's modules match the target's best, where they have to move.

    Modules with a channel group among ``known`` stay where they are.

    Returns
    -------
    dict
        Index in ``source.traced.heads`` -> for every place the module that comes there.
    """
    found: dict[int, tuple[int, ...]] = {}
    for index, to, of in corresponding_heads(correspondence):
        if not to.parameters or any(group in known for head in to.members for group in head):
            continue
        models = correspondence.target, correspondence.source
        hooks = [_hooks(*one) for one in zip(models, (to.members, of.members), strict=True)]
        pairs = [
            (i, j, list(_pairs(hooks[0], hooks[1], i, j)))
            for ones, others in ((a, b) for a in to.members for b in of.members)
            for i, j in zip(ones, others, strict=True)
        ]
        costs = pair_costs(correspondence, target, source, pairs, metric=metric)
        solved = torch.stack([one.cost for one in solve_compactly(costs)])
        count = len(to.members)
        from scipy.optimize import linear_sum_assignment  # here, for it takes long to import

        _, order = linear_sum_assignment(solved.view(count, count, -1).sum(2).numpy())
        if order.tolist() != list(range(count)):
            found[index] = tuple(order.tolist())
    return found


_Shown = dict[int, list[tuple[tuple[int, int], HookPoint, Tensor]]]


def _hooks(model: TracedModel, members: Collection[Collection[int]]) -> _Shown:
    """Return for each group where it shows: the hook points, in order, and its columns there."""
    found: _Shown = {index: [] for head in members for index in head}
    for layer in model.layers:
        for place, hook in enumerate(layer.hook_points):
            for index in found.keys() & set(hook.groups.unique().tolist()):
                found[index].append(((layer.index, place), hook, places_of(hook, index)))
    return found


def _pairs(target: _Shown, source: _Shown, one: int, other: int) -> Iterator[HookPair]:
    """Yield the hook points that show a group of the target and one of the source, in order."""
    for (key, hook, columns), (of, point, others) in zip(target[one], source[other], strict=False):
        if hook.positions == point.positions and len(columns) and len(others):
            yield HookPair(key, of, columns, others)
