"""Which hidden channels of all parents the target keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from clafusion.calibration.channel_selection import keep_channels
from clafusion.calibration.least_squares.equations import (
    chosen_positions,
    features,
    incoming_node,
    num_positions,
    squares,
    stacked,
)
from clafusion.calibration.least_squares.hidden import Hidden, Kept
from clafusion.execution.call import State
from clafusion.execution.walk import Walk
from clafusion.merging.problem import FusionProblem
from clafusion.threads import one_thread

__all__ = ["Choice", "choose_channels", "hidden_grams"]

_ROWS = 30_000  # of each choice


@dataclass(frozen=True)
class Choice:
    """Hidden channels that are kept, and how the layer that reads them starts.

    Attributes
    ----------
    kept
        For each part of the hidden channels what the target keeps of it.
    readout
        ``(num_features (+ 1), num_outputs)``: how the target's layer reads the channels once they
        have taken over what the others told. The last row is the bias, where there is one.
    """

    kept: tuple[Kept, ...]
    readout: Tensor


def hidden_grams(
    problem: FusionProblem,
    hidden: Mapping[str, Hidden],
    inputs: Sequence[tuple[Tensor, ...]],
    states: Sequence[State],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the inner products of all parents' hidden channels side by side, in one pass.

    Parameters
    ----------
    problem, hidden
        The parents, and the hidden channels by the layer that writes them.
    inputs
        The batches.
    states
        The parents' own weights.
    generator
        Chooses positions where there are more rows than needed.
    """
    count = sum(one[0].size(0) for one in inputs)
    nodes: list[set[str]] = [set() for _ in problem.parents]
    for one in hidden.values():
        for part in one.parts:
            nodes[part.parent].add(incoming_node(part.reader))
    grams: dict[str, Tensor] = {}
    positions: dict[str, Tensor] = {}
    for batch in inputs if hidden else ():
        walks = [
            Walk(parent.traced, batch, state, set(of))
            for parent, state, of in zip(problem.parents, states, nodes, strict=True)
        ]
        for name, one in hidden.items():
            kernel, has_bias = one.reader.kernel_size, one.reader.point.bias is not None
            values = [walks[part.parent].reach(incoming_node(part.reader)) for part in one.parts]
            if name not in positions:
                width = sum(part.columns.numel() for part in one.parts)
                places = num_positions(one.parts[0].reader, values[0], kernel)
                positions[name] = chosen_positions(places, width, _ROWS, count, generator)
            last = len(one.parts) - 1
            sides = [
                features(part.reader, x, kernel, positions[name], has_bias=has_bias and i == last)
                for i, (part, x) in enumerate(zip(one.parts, values, strict=True))
            ]
            # Copies of a channel differ by roundings, which float32 sums would hide.
            gram = squares(torch.cat(sides).double())
            grams[name] = grams[name].add_(gram) if name in grams else gram
    return grams


def choose_channels(
    problem: FusionProblem,
    hidden: Mapping[str, Hidden],
    grams: Mapping[str, Tensor],
    states: Sequence[State],
    weights: Mapping[str, Sequence[float]],
) -> dict[str, Choice]:
    """Choose among all parents' hidden channels: writing layer's node -> what is kept.

    Parameters
    ----------
    problem, hidden, states
        As for :func:`hidden_grams`.
    grams
        See there.
    weights
        For each writing layer the parents' weights.
    """
    choices: dict[str, Choice] = {}
    for name, one in hidden.items():
        readout, importance = _readouts(problem, hidden, one, states, weights[name])
        sizes = [part.columns.numel() for part in one.parts]
        firsts = [0, *accumulate(sizes)]
        columns = [part.columns + first for part, first in zip(one.parts, firsts, strict=False)]
        with one_thread():
            alive, readout = keep_channels(
                grams[name],
                readout,
                torch.cat(columns),
                len(one.columns),
                importance=importance,
                kinship=_kinship(problem, one),
            )
        kept = _given(problem, one, alive)
        start = readout.new_zeros(one.columns.numel(), readout.size(1))
        for given, theirs in zip(kept, columns, strict=True):
            start[one.columns[given.own].flatten()] = readout[theirs[given.taken].flatten()]
        choices[name] = Choice(kept, torch.cat([start, readout[firsts[-1] :]]))
    return {name: _of_outputs(hidden, choices, name) for name in hidden}


def _of_outputs(hidden: Mapping[str, Hidden], choices: Mapping[str, Choice], name: str) -> Choice:
    """Return a choice whose reading layer writes no more than what is kept of its own outputs."""
    one, after = choices[name], hidden[name].reader.affine.name
    if after not in choices:
        return one
    outputs = one.readout.split([len(part.channel_of) for part in hidden[after].parts], 1)
    readout = one.readout.new_zeros(len(one.readout), len(hidden[after].channel_of))
    for part, kept, of in zip(hidden[after].parts, choices[after].kept, outputs, strict=True):
        readout[:, hidden[after].channel_of[kept.own]] = of[:, part.channel_of[kept.taken]]
    return replace(one, readout=readout)


def _readouts(
    problem: FusionProblem,
    hidden: Mapping[str, Hidden],
    one: Hidden,
    states: Sequence[State],
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return how a layer reads all parents' channels side by side.

    ``(num_features (+ 1), num_outputs)`` and the outputs' importance. The outputs are the weighted
    mean, or where the reading layer's own outputs are to be chosen all parents' apart.
    """
    reader = one.reader
    readouts = []
    for part in one.parts:
        names, state = problem.parents[part.parent].correspondence.names, states[part.parent]
        readouts.append(stacked(reader, {own: state[names[own]] for own in reader.parameters}))
    given = [weights[part.parent] for part in one.parts]
    if reader.affine.name in hidden:
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
        parents = [problem.parents[part.parent] for part in one.parts]
        node = reader.point.node
        readouts = [
            weight * parent.moved(theirs, node, parent.correspondence.points[node])
            for parent, theirs, weight in zip(parents, readouts, given, strict=True)
        ]
        importance = readouts[0].new_ones(readouts[0].size(1))
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
        scale = (plan.sum(1, keepdim=True) * plan.sum(0)).sqrt()
        normalised.append(plan / torch.where(scale > 0, scale, 1.0))
    side_by_side = torch.cat(normalised)
    alike = side_by_side @ side_by_side.T
    first = 0
    for one in normalised:  # within one parent each channel is like itself only
        last = first + len(one)
        alike[first:last, first:last] = torch.eye(len(one)).to(alike)
        first = last
    return alike
