"""Which hidden channels of all parents the target keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from clafusion.calibration.channel_selection import inverse_gram, keep_channels
from clafusion.calibration.least_squares.hidden import Hidden, Kept
from clafusion.calibration.least_squares.rows import (
    Positions,
    chosen_positions,
    features,
    num_positions,
    rows_for,
)
from clafusion.calibration.least_squares.storing import stacked
from clafusion.execution.call import State
from clafusion.merging.mean import shares, weighted_mean
from clafusion.merging.problem import FusionProblem
from clafusion.threads import one_thread

__all__ = [
    "ROWS_AT_ONCE",
    "choice_rows",
    "choose_channels",
    "hidden_features",
    "hidden_inverse",
    "hidden_positions",
    "of_kept",
]

_ROWS, _LEAST_ROWS = 8, 4096  # of a choice: for each column, and in all
ROWS_AT_ONCE = 8192
"""Of hidden channels so many rows are multiplied in float64 at a time."""


def hidden_positions(
    hidden: Hidden,
    values: Sequence[Tensor],
    batch_size: int,
    num_inputs: int,
    generator: torch.Generator,
) -> Positions:
    """Choose of which positions of all parents' hidden channels inner products are taken.

    ``values`` are of a batch of ``batch_size`` of all ``num_inputs`` inputs.
    """
    part, kernel = hidden.parts[0], hidden.reader.kernel_size
    width = sum(one.columns.numel() for one in hidden.parts)
    places = num_positions(part.reader, values[0], kernel, batch_size)
    return chosen_positions(places, choice_rows(width), num_inputs, generator)


def choice_rows(num_features: int) -> int:
    """Return of how many rows a choice among so many features takes inner products at the most."""
    return rows_for(num_features, _ROWS, _LEAST_ROWS)


def hidden_features(
    hidden: Hidden, values: Sequence[Tensor], chosen: Tensor, num_inputs: int
) -> Tensor:
    """Return what the reading layers of all parents multiply, side by side.

    ``values`` are the hidden channels, parent by parent. See :func:`features`; the 1 of the bias
    comes last.
    """
    kernel, has_bias = hidden.reader.kernel_size, hidden.reader.point.bias is not None
    last = len(hidden.parts) - 1
    sides = [
        features(part.reader, x, kernel, chosen, num_inputs, has_bias=has_bias and i == last)
        for i, (part, x) in enumerate(zip(hidden.parts, values, strict=True))
    ]
    return torch.cat(sides)


def hidden_inverse(problem: FusionProblem, hidden: Hidden, gram: Tensor) -> Tensor:
    """Return the inverse of the inner products of :func:`hidden_features`, in their memory."""
    with one_thread():
        return inverse_gram(gram, torch.cat(_columns(hidden)), kinship=_kinship(problem, hidden))


def choose_channels(
    problem: FusionProblem,
    hidden: Hidden,
    inverse: Tensor,
    states: Sequence[State],
    weights: Sequence[float],
    *,
    reader_chooses: bool,
) -> tuple[tuple[Kept, ...], Tensor]:
    """Choose among all parents' hidden channels.

    Parameters
    ----------
    problem, hidden
        The parents, and their hidden channels.
    inverse
        See :func:`hidden_inverse`. Its memory is used up.
    states
        The parents' own weights.
    weights
        The parents' weights at the layer that writes the channels.
    reader_chooses
        Whether the channels that the reading layer writes are to be chosen, too.

    Returns
    -------
    (kept, readout)
        For each part of the hidden channels what the target keeps of it, and how its reading layer
        starts, ``(num_features (+ 1), num_outputs)``: how it reads the channels once they have
        taken over what the others told. The last row is the bias, where there is one.
    """
    readout, importance = _readouts(problem, hidden, states, weights, reader_chooses)
    columns = _columns(hidden)
    with one_thread():
        alive, readout = keep_channels(
            inverse, readout, torch.cat(columns), len(hidden.columns), importance=importance
        )
    kept = _given(problem, hidden, alive)
    start = readout.new_zeros(hidden.columns.numel(), readout.size(1))
    for given, theirs in zip(kept, columns, strict=True):
        start[hidden.columns[given.own].flatten()] = readout[theirs[given.taken].flatten()]
    size = sum(one.numel() for one in columns)
    return kept, torch.cat([start, readout[size:]])


def _columns(hidden: Hidden) -> list[Tensor]:
    """Return where each part's channels stand among the features of all side by side."""
    firsts = accumulate((part.columns.numel() for part in hidden.parts), initial=0)
    return [part.columns + first for part, first in zip(hidden.parts, firsts, strict=False)]


def of_kept(hidden: Hidden, kept: Sequence[Kept], sides: Sequence[Tensor]) -> Tensor:
    """Return the columns of the channels that are kept, in the target's order.

    ``sides`` are ``(num_rows, num_channels)``, part by part: what each parent has for every channel
    of the writing layer.
    """
    found = sides[0].new_zeros(len(sides[0]), len(hidden.channel_of))
    for part, one, side in zip(hidden.parts, kept, sides, strict=True):
        found[:, hidden.channel_of[one.own]] = side[:, part.channel_of[one.taken]]
    return found


def _readouts(
    problem: FusionProblem,
    hidden: Hidden,
    states: Sequence[State],
    weights: Sequence[float],
    reader_chooses: bool,
) -> tuple[Tensor, Tensor]:
    """Return how a layer reads all parents' channels side by side.

    ``(num_features (+ 1), num_outputs)`` and the outputs' importance. The outputs are the weighted
    mean, or where the reading layer's own outputs are to be chosen all parents' apart.
    """
    reader = hidden.reader
    readouts = []
    for part in hidden.parts:
        names, state = problem.parents[part.parent].correspondence.names, states[part.parent]
        readouts.append(stacked(reader, {own: state[names[own]] for own in reader.parameters}))
    given = [weights[part.parent] for part in hidden.parts]
    if reader_chooses:
        sizes = [theirs.size(1) for theirs in readouts]
        before = [0, *accumulate(sizes)]
        importance = torch.cat(
            [
                theirs.new_full((theirs.size(1),), w)
                for theirs, w in zip(readouts, given, strict=True)
            ]
        )
        readouts = [
            F.pad(theirs, (first, before[-1] - first - theirs.size(1)))
            for theirs, first in zip(readouts, before, strict=False)
        ]
    else:
        parents = [problem.parents[part.parent] for part in hidden.parts]
        node = reader.point.node
        masks = [one.covers(node) for one in parents]
        readouts = [
            torch.as_tensor(share).to(theirs)
            * parent.moved(theirs, node, parent.correspondence.points[node])
            for parent, theirs, share in zip(parents, readouts, shares(given, masks), strict=True)
        ]
        importance = readouts[0].new_ones(readouts[0].size(1))
        if any(one is not None for one in masks):  # of a channel that some have, by their weights
            present = [importance if one is None else one.to(importance) for one in masks]
            importance = weighted_mean(present, given)
    if reader.point.bias is None:
        return torch.cat(readouts), importance
    bias = torch.stack([theirs[-1] for theirs in readouts]).sum(0, keepdim=True)
    return torch.cat([*(theirs[:-1] for theirs in readouts), bias]), importance


def _given(problem: FusionProblem, hidden: Hidden, alive: Tensor) -> tuple[Kept, ...]:
    """Find a place for every channel that is kept: the target's own stay where they are."""
    firsts = [0, *accumulate(len(part.columns) for part in hidden.parts)]
    taken = [alive[(alive >= a) & (alive < b)] - a for a, b in pairwise(firsts)]
    own = [problem.parents[part.parent].is_identity for part in hidden.parts]
    free = torch.ones(len(hidden.columns), dtype=torch.bool, device=alive.device)
    for stays, channels in zip(own, taken, strict=True):
        if stays:
            free[channels] = False
    places = torch.nonzero(free).squeeze(1)
    given = []
    for stays, channels in zip(own, taken, strict=True):
        if stays:
            given.append(Kept(channels, channels))
        else:
            into, places = places.tensor_split([len(channels)])
            given.append(Kept(into, channels))
    return tuple(given)


def _kinship(problem: FusionProblem, hidden: Hidden) -> Tensor:
    r"""Return how alike all parents' channels, side by side, are by the transport plans.

    With ``U`` a plan normalised by rows and columns, whose singular values are at most 1, two
    parents' channels are alike by :math:`U_p U_q^\top`; no eigenvalue of all is negative.
    """
    normalised = []
    for part in hidden.parts:
        plan = problem.parents[part.parent].plans[part.group]
        assert plan is not None, "a matched layer writes a group without a partner"
        scale = (plan.row_sums[:, None] * plan.column_sums).sqrt()
        normalised.append(plan.dense() / torch.where(scale > 0, scale, 1.0))
    side_by_side = torch.cat(normalised)
    alike = side_by_side @ side_by_side.T
    first = 0
    for one in normalised:  # within one parent each channel is like itself only
        last = first + len(one)
        alike[first:last, first:last] = torch.eye(len(one)).to(alike)
        first = last
    return alike
