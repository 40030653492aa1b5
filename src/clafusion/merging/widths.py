"""Widths of the result that are no multiples of those of the only parent that has weight.

Transport moves equal masses: of 3 channels into 4 the second target channel gets a third of one
source channel's mass and two thirds of another's, so that it is a mean of both. In an average of
several networks every channel is a mean anyway; of one network alone the function changes.
"""

from __future__ import annotations

from clafusion.alignment.models import label
from clafusion.errors import WidthWarning, warn
from clafusion.merging.problem import FusionProblem
from clafusion.transport.plan import TransportPlan

__all__ = ["warn_of_uneven_widths"]


def warn_of_uneven_widths(problem: FusionProblem) -> None:
    """Warn where one parent has all weight, and its channels do not fit the result evenly.

    Warns
    -----
    WidthWarning
        The message names the channels of each such pair of widths.
    """
    weighed = [one for one in problem.parents if one.weights.overall > 0]
    if len(weighed) != 1:
        return
    (parent,) = weighed
    groups = parent.correspondence.target.groups
    found: dict[tuple[int, int], str] = {}
    for group, plan in zip(groups, parent.plans, strict=True):
        if plan is None:
            continue
        reached = int(plan.covered.sum())  # a wider result has places for other parents alone
        if reached % plan.shape[0] and (group.is_averaged or not _copies_all(plan)):
            found.setdefault((plan.shape[0], reached), group.name)
    if not found:
        return
    shown = ", ".join(
        f"{of_target} of {name!r} for its {of_source}"
        for (of_source, of_target), name in list(found.items())[:3]
    )
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    warn(
        f"{label(parent.name)} alone has weight, but the result has {shown}{more} channels, which "
        "is no multiple: channels are averaged there, or some copied more often than others, and "
        "what the network computes need not be kept. Give target=Like(module) a module whose "
        "widths are multiples of the network's",
        WidthWarning,
    )


def _copies_all(plan: TransportPlan) -> bool:
    """Return whether a plan takes every channel somewhere, and mixes none."""
    rows, columns, _ = plan.entries
    return len(columns.unique()) == len(columns) and len(rows.unique()) == plan.shape[0]
