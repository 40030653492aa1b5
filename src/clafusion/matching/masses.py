"""The masses of channels that transport moves."""

from __future__ import annotations

from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.errors import InputError
from clafusion.profiling.importance import equal_masses

__all__ = ["marginals"]


def marginals(
    correspondence: Correspondence, target: tuple[Tensor, ...], source: tuple[Tensor, ...]
) -> list[tuple[Tensor, Tensor] | None]:
    """Return for each group of the target the masses of its source and target channels.

    ``target`` and ``source`` are what
    :func:`clafusion.profiling.importance.channel_importance` says of the networks. Masses are
    equal where no layer reads the group, so that nothing tells its channels apart; None where the
    source has no such channels.

    Raises
    ------
    InputError
        A network's importance is missing.
    """
    for model, given in ((correspondence.target, target), (correspondence.source, source)):
        if len(given) != len(model.groups):
            raise InputError(
                f"importance must be known of all {len(model.groups)} channel groups; the "
                f"profile has it of {len(given)}: profile the model by the same settings"
            )
    found: list[tuple[Tensor, Tensor] | None] = []
    for one, other, points in zip(
        correspondence.target.groups, correspondence.groups, correspondence.hooks, strict=True
    ):
        if other < 0:
            found.append(None)
        elif points:
            found.append((source[other], target[one.index]))
        else:
            size = correspondence.source.groups[other].size
            found.append((equal_masses(size), equal_masses(one.size)))
    return found
