"""What the walks of a proof put out, compared part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clafusion.execution.call import flatten_tensors
from clafusion.execution.heap import WHILE_TRACING, give_back
from clafusion.execution.walk import Walk, in_lockstep
from clafusion.tracing.readout import Readout

__all__ = ["Outputs", "difference", "outputs_of"]

_PART = 1 << 18  # elements that are made or compared at a time
_NODES, _PARTS = 16, 4  # so many are run or made before what they freed is given back
_POSITIONS = 2  # at which all outputs of a last layer with many are compared
_MANY = 1 << 22
"""Elements of a last layer's outputs: more are made in parts, when they are compared."""


class Outputs:
    """A walk's outputs; those of a last layer with many are made part by part, and not all.

    Such a layer does the same at every position. A mistake in how its rows move changes outputs at
    any position, and one in what it reads at a position changes any of the outputs there. So all of
    them are made at two positions of each input, and at all positions as many as it has inputs.

    Parameters
    ----------
    walk
        A walk that has run, but for the last layer, if there is one.
    readout
        The last layer.
    """

    def __init__(self, walk: Walk, readout: Readout | None) -> None:
        self._walk, self._readout = walk, readout
        found = walk.finish() if readout is None else walk.known_outputs()
        self._known = list(flatten_tensors(list(found)))

    def parts(self) -> Iterator[list[Tensor]]:
        """Yield lists of tensors: first the outputs at hand, then parts of the last layer's."""
        yield self._known
        if self._readout is not None:
            one = self._readout
            some = torch.linspace(one.positions // 2, one.positions - 1, _POSITIONS).long()
            every = torch.arange(one.channels)
            of_all = every[:: max(one.channels // one.width, 1)]
            for wanted, positions in ((every, some), (of_all, None)):
                parts = wanted.split(max(_PART // max(one.positions, one.width), 1))
                for count, rows in enumerate(parts):
                    yield self._walk.rows_of(one.node, one.following, rows, positions)
                    if count % _PARTS == 0:
                        give_back(WHILE_TRACING)

    def are_finite(self) -> bool:
        """Say whether no output is infinite or no number."""
        return all(bool(one.isfinite().all()) for part in self.parts() for one in part)


def outputs_of(walks: Sequence[Walk], readout: Readout | None, num_inputs: int) -> list[Outputs]:
    """Run walks of one graph side by side, and return what they put out.

    Parameters
    ----------
    walks
        The walks.
    readout
        The graph's last layer; its outputs are made when they are compared, where they are many.
    num_inputs
        How many inputs there are.
    """
    if readout is not None and (
        not readout.is_alike or num_inputs * readout.positions * readout.channels <= _MANY
    ):
        readout = None
    if readout is None:
        steps: Iterator[object] = in_lockstep(walks)
    else:
        steps = zip(*(walk.before(readout.nodes) for walk in walks), strict=True)
    for count, _ in enumerate(steps):
        if count % _NODES == 0:
            give_back(WHILE_TRACING)
    return [Outputs(walk, readout) for walk in walks]


def difference(outputs: Sequence[Tensor] | Outputs, expected: Sequence[Tensor] | Outputs) -> float:
    """Return the largest difference, relative to the largest expected value of the same output.

    Outputs of a last layer that come in parts count as one.
    """
    worst = 0.0
    whole, *in_parts = _parts(outputs, expected)
    for output, reference in zip(*whole, strict=True):
        if output.shape != reference.shape:
            return math.inf
        if reference.numel():
            gap, scale = _gap_and_scale(output, reference)
            worst = max(worst, gap / (scale or 1.0))
    # Several outputs come of one layer: each by its own scale.
    gaps: dict[int, float] = {}
    scales: dict[int, float] = {}
    for part in in_parts:
        for i, (output, reference) in enumerate(zip(*part, strict=True)):
            gap, scale = _gap_and_scale(output, reference)
            gaps[i] = max(gaps.get(i, 0.0), gap)
            scales[i] = max(scales.get(i, 0.0), scale)
    return max([worst, *(gaps[i] / (scales[i] or 1.0) for i in gaps)])


def _parts(
    outputs: Sequence[Tensor] | Outputs, expected: Sequence[Tensor] | Outputs
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    if isinstance(outputs, Outputs) and isinstance(expected, Outputs):
        yield from zip(outputs.parts(), expected.parts(), strict=True)
    else:
        assert not isinstance(outputs, Outputs), "both are at hand, or neither"
        assert not isinstance(expected, Outputs), "both are at hand, or neither"
        yield outputs, expected


def _gap_and_scale(output: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the largest difference and the largest reference value, part by part.

    Infinite values and what is no number have no difference from the same.
    """
    parts = zip(output.flatten().split(_PART), reference.flatten().split(_PART), strict=True)
    found = [
        ((one.double() - other.double()).abs().max(), other.double().abs().max())
        for one, other in parts
    ]
    gap, scale = (float(torch.stack(several).max()) for several in zip(*found, strict=True))
    if math.isfinite(gap + scale):
        return gap, scale
    output, reference = output.double(), reference.double()
    same = (output == reference) | (output.isnan() & reference.isnan())
    gaps = torch.where(same, 0.0, (output - reference).abs()).nan_to_num(nan=torch.inf)
    finite = reference[reference.isfinite()].abs()
    return float(gaps.max()), float(finite.max()) if finite.numel() else 0.0
