"""Plans that keep or double channels of one network, where the target has another number of them.

Those are kept, or doubled, that tell the most of all. Of attention heads, of which there are other
numbers, whole ones are, and channels within them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.profiling.profile import ModelProfile
from clafusion.threads import one_thread
from clafusion.tracing.model import UnitedHeads
from clafusion.transport.plan import TransportPlan

__all__ = ["resizing_plan"]


def resizing_plan(
    correspondence: Correspondence, index: int, source: ModelProfile
) -> TransportPlan:
    """Return a plan from a group of the source to the target's.

    Each target channel is one of the source's; ``index`` is the target's group.
    """
    group = correspondence.source.groups[correspondence.groups[index]]
    sizes = group.size, correspondence.target.groups[index].size
    rows = _shown(correspondence, index, source)
    chosen = None
    pairs = zip(correspondence.source.united_heads, correspondence.target.united_heads, strict=True)
    for one, other in pairs:
        if index in other.groups:
            inner = sizes[0] // one.count, sizes[1] // other.count
            chosen = torch.cat(
                [
                    head * inner[0]
                    + _kept(*inner, None if rows is None else rows.split(inner[0], 1)[head])
                    for head in _kept_heads(correspondence, one, other, source)
                ]
            )
    if chosen is None:
        chosen = _kept(*sizes, rows)
    return TransportPlan.from_rows(chosen, sizes[0])


def _shown(correspondence: Correspondence, index: int, source: ModelProfile) -> Tensor | None:
    """Return ``(num_rows, num_channels)``: a group's values where they show, else None."""
    hooks = correspondence.hooks[index]
    shown = [source.rows[one.source][:, one.source_columns] for one in hooks]
    return torch.cat(shown) if shown else None


def _kept_heads(
    correspondence: Correspondence, one: UnitedHeads, other: UnitedHeads, source: ModelProfile
) -> list[int]:
    """Choose for each target head one of the source's, the same for all of their groups."""
    if one.count <= other.count:
        return [place % one.count for place in range(other.count)]
    rows = _shown(correspondence, other.groups[-1], source)
    if rows is None:
        return list(range(other.count))
    size = rows.size(1) // one.count
    heads = dict.fromkeys((_most_telling(rows) // size).tolist())  # as they first appear
    return sorted(list(heads)[: other.count])


def _kept(num_source: int, num_target: int, rows: Tensor | None) -> Tensor:
    """Choose for each target channel one of the source's, which ``rows`` show."""
    chosen = torch.arange(min(num_source, num_target))
    if num_source == num_target:
        return chosen
    order = torch.arange(num_source) if rows is None else _most_telling(rows)
    if num_source > num_target:
        return order[:num_target].sort().values
    more = num_target - num_source
    return torch.cat([chosen, order.repeat(more // num_source + 1)[:more]])


def _most_telling(rows: Tensor) -> Tensor:
    """Order channels so that each is the one of which those before it tell the least.

    It is the order of the pivots of the covariance's Cholesky factor, as in column subset selection
    by QR (Businger and Golub, Numer. Math. 1965).
    """
    with one_thread():
        centred = rows.double().cpu()
        centred = centred - centred.mean(0)
        covariance = centred.T @ centred
        left = covariance.diagonal().clone()
        factor = torch.zeros_like(covariance)
        order = []
        for i in range(len(left)):
            pivot = int(left.argmax())
            order.append(pivot)
            column = covariance[pivot] - factor[:, :i] @ factor[pivot, :i]
            factor[:, i] = column / left[pivot].clamp(min=1e-300).sqrt()
            left -= factor[:, i].square()
            left[order] = -torch.inf
    return torch.tensor(order)
