"""Groups of blocks -> which networks are worth stitching."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from clafusion.errors import InputError, StructureError
from clafusion.reassembly.blocks import Block
from clafusion.reassembly.stitching import StitchPlan, stitch_plan

__all__ = ["Candidate", "Joins", "candidates_of", "joins_of"]

_MOST = 100_000  # combinations that are looked at


@dataclass(frozen=True)
class Joins:
    """Which blocks can follow which.

    Attributes
    ----------
    plans
        For two blocks of groups that follow each other how the first one's value becomes what the
        second one reads; None where they follow each other in their own model.
    refused
        Why others cannot.
    """

    plans: Mapping[tuple[int, int], StitchPlan | None]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """Blocks that could become a network.

    Attributes
    ----------
    blocks
        Their positions among all blocks, in order.
    parameters
        How many parameters the network would have, stitches included.
    left
        The share of the variance that its stitches leave, as far as the models' own values tell;
        all of several together.
    """

    blocks: tuple[int, ...]
    parameters: int
    left: float


def joins_of(blocks: Sequence[Block], groups: Sequence[Sequence[int]]) -> Joins:
    """Say which blocks of a group can follow which of the group before."""
    plans: dict[tuple[int, int], StitchPlan | None] = {}
    refused: list[str] = []
    for before, behind in pairwise(groups):
        for i, j in product(before, behind):
            one, other = blocks[i], blocks[j]
            if other.follows(one):
                plans[i, j] = None
                continue
            assert one.end is not None
            assert other.start is not None
            called = f"{one.text} of {one.model!r} and {other.text} of {other.model!r}"
            try:
                plans[i, j] = stitch_plan(one.end, other.start, called)
            except StructureError as error:
                refused.append(str(error))
    return Joins(plans, tuple(refused))


def candidates_of(
    blocks: Sequence[Block],
    groups: Sequence[Sequence[int]],
    joins: Joins,
    residuals: Mapping[tuple[int, int], float],
    most_parameters: int | None,
) -> list[Candidate]:
    """Return the networks that take a block of each group and come of several models, best first.

    Raises
    ------
    InputError
        No blocks can be joined, or no network is small enough; the message says why.
    """
    if math.prod(map(len, groups)) > _MOST:
        raise InputError(
            f"{len(blocks)} blocks have more than {_MOST} combinations: take fewer models, or "
            "fewer blocks"
        )
    found, smallest = list[Candidate](), math.inf
    for chosen in product(*groups):
        pairs = list(pairwise(chosen))
        if len({blocks[i].model for i in chosen}) == 1 or any(
            one not in joins.plans for one in pairs
        ):
            continue
        plans = [plan for one in pairs if (plan := joins.plans[one]) is not None]
        parameters = sum(blocks[i].parameters for i in chosen)
        parameters += sum(plan.parameters for plan in plans)
        smallest = min(smallest, parameters)
        if most_parameters is None or parameters <= most_parameters:
            kept = math.prod(1 - min(residuals[one], 1.0) for one in pairs if one in residuals)
            found.append(Candidate(chosen, parameters, 1 - kept))
    if not found and smallest < math.inf:
        raise InputError(
            f"most_parameters={most_parameters}: the smallest network of these blocks has "
            f"{int(smallest)}"
        )
    if not found:
        why = f": {joins.refused[0]}" if joins.refused else ""
        raise InputError(f"no blocks of different models can be joined{why}")
    return sorted(found, key=lambda one: (one.left, one.blocks))
