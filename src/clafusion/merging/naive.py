"""Averaging without matching: what fusion has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real

from torch import nn

from clafusion.errors import InputError, check_listed
from clafusion.matching.head_order import restored_model
from clafusion.matching.orthogonal import unrotated_model
from clafusion.matching.weight_costs import index_plans
from clafusion.merging.mean import average
from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
from clafusion.weights.build import with_state

__all__ = ["naive_average", "unmatched"]


def naive_average(problem: FusionProblem, weights: Sequence[float] | None = None) -> nn.Module:
    """Average the parents of a fusion in the target's structure, channel by channel in order.

    Streams that were rotated are as they were. Norms that were folded for that stay folded.

    Parameters
    ----------
    problem
        The parents and the target of a fusion: ``result.problem``. Of networks that were fused one
        after another that is the last step's, whose first parent is a fused network itself.
    weights
        The parents' weights; default those of the fusion.

    Raises
    ------
    InputError
        ``problem`` is something else, or that of a trunk alone (``outputs="both"``).
    """
    if not isinstance(problem, FusionProblem):
        raise InputError(f"problem must be result.problem; got {type(problem).__name__}")
    if problem.is_beginning:
        raise InputError(
            "problem is that of a shared trunk, of outputs='both', and networks of other classes "
            "have no mean: compare with the same fusion with calibration='none'"
        )
    given = [one.weights.overall for one in problem.parents] if weights is None else weights
    check_listed(given, "weights", "a list of numbers, one for each parent")
    if len(given) != len(problem.parents):
        raise InputError(f"weights must be {len(problem.parents)} numbers; got {len(given)}")
    for i, one in enumerate(given):
        if not (isinstance(one, Real) and 0 <= one < math.inf):
            raise InputError(f"weights[{i}] must be a number of at least 0; got {one!r}")
    state = average(unmatched(problem), [MergeWeights(weight) for weight in given])
    return with_state(problem.target.model, state, problem.target.aliases)


def unmatched(problem: FusionProblem) -> FusionProblem:
    """Return a problem whose parents have their channels, heads and outputs in their own order."""
    return replace(problem, parents=tuple(_unmatched(one) for one in problem.parents))


def _unmatched(parent: Parent) -> Parent:
    """Return a parent whose channels, heads and outputs are in their own order."""
    if parent.is_identity:
        return replace(parent, output_plan=None)
    own = parent.traced
    if parent.head_orders:
        heads = [(own.heads[index], order) for index, order in parent.head_orders.items()]
        own = restored_model(own, heads)
    if parent.rotations:
        own = unrotated_model(own, parent.correspondence, parent.rotations)
    correspondence = replace(parent.correspondence, source=own)
    plans = tuple(index_plans(correspondence))
    return replace(parent, correspondence=correspondence, plans=plans, output_plan=None)
