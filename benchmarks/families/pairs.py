"""What comes of a pair of networks: the properties that every fusion must have."""

from __future__ import annotations

import copy
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

import clafusion
from benchmarks.families.family import EXACT, PAIRS, Family, Inputs, Size
from clafusion.fusion import fuse_aligned
from tests.support.architectures import tensors
from tests.support.networks import orders_of, permuted

__all__ = ["Member", "Members", "row"]

_CALIBRATED = 1e-3
"""How far outputs may be apart after least squares, which rewrites layers from float32 products."""

_TOLD = (clafusion.WidthWarning, clafusion.PinnedWarning)


@dataclass
class Member:
    """A network of a family, traced."""

    model: nn.Module
    inputs: Inputs
    traced: clafusion.TracedModel

    @cached_property
    def itself(self) -> float:
        """How far the network fused with a copy of itself is from it."""
        return self._gap_with(copy.deepcopy(self.model))

    @cached_property
    def copy(self) -> float:
        """How far the network fused with a copy whose free channels have other places is from it.

        Raises
        ------
        AssertionError
            The copy itself puts out something else.
        """
        moved = permuted(self.model, self.traced, orders_of(self.traced))
        changed = _gap(moved, self.model, self.inputs)
        if changed > EXACT:
            raise AssertionError(f"other places of the channels change the outputs: {changed}")
        return self._gap_with(moved)

    def _gap_with(self, other: nn.Module) -> float:
        pair = [self.model, other]
        fused = clafusion.fuse(pair, [self.inputs], example_inputs=self.inputs).model
        return _gap(fused, self.model, self.inputs)


@dataclass
class Members:
    """The networks of one family, each made and traced once."""

    family: Family
    _known: dict[Size, Member] = field(default_factory=dict)

    @property
    def channels(self) -> int | None:
        """Return how many channels of the smallest network may move; None if it is refused."""
        smallest = self._known.get((0, 1))
        return None if smallest is None else sum(one.size for one in smallest.traced.groups)

    def member(self, size: Size) -> Member:
        """Return the network of a size."""
        if size not in self._known:
            model, inputs = self.family.make(*size)
            self._known[size] = Member(model, inputs, clafusion.trace(model, inputs))
        return self._known[size]


def row(members: Members, kind: str, limit: float) -> dict[str, Any]:
    """Return what comes of one pair, for which the processor has ``limit`` seconds.

    ``outcome`` is ``"fused"``, ``"refused"`` by a named error, ``"wrong"`` (a property does not
    hold, and nothing told so) or ``"fault"`` (anything else, such as a limit of time).
    """
    start = time.process_time()
    found: dict[str, Any] = {}
    try:
        with _at_most(limit):
            pair = [members.member(size) for size in PAIRS[kind]]
            # Where all parents' layers and channels fit, each parent's function must come back.
            largest = members.member((1, 2)) if kind == "both" else pair[0]
            found |= _properties(*pair, largest)
    except clafusion.ClafusionError as error:
        found |= {"outcome": "refused", "message": str(error).splitlines()[0]}
    except (_TooLong, Exception) as error:  # a fault is a row of the table, too
        text = str(error).splitlines() or [""]
        kind_of_error = type(error).__name__.strip("_")
        found |= {"outcome": "fault", "message": f"{kind_of_error}: {text[0]}"}
    return {**found, "seconds": round(time.process_time() - start, 1)}


def _properties(first: Member, second: Member, largest: Member) -> dict[str, Any]:
    """Fuse two networks in all ways; return what holds of the results.

    ``largest`` has the structure that can hold both. ``first`` and ``second`` say how far the
    result is from the only parent that has weight, the first or the second; ``told`` names those of
    which a warning says that their function is not kept.
    """
    inputs = first.inputs
    pair = [first.model, second.model]
    # With what REPAIR needs, the profiles do for all calibrations.
    aligned = clafusion.align(pair, [inputs], _CALIBRATIONS["repair"], example_inputs=inputs)
    gaps: dict[str, float] = {}
    told: list[str] = []
    plain = clafusion.FusionConfig(calibration="none", target=clafusion.Like(largest.model))
    for name, weights in (("first", [1.0, 0.0]), ("second", [0.0, 1.0])):
        parent = pair[weights.index(1.0)]
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            result = fuse_aligned(aligned, [inputs], weights, plain, template=largest.traced)
        if any(isinstance(one.message, _TOLD) for one in given):
            told.append(name)
        gaps[name] = _gap(result.model, parent, inputs)
    gaps["itself"] = max(first.itself, second.itself)
    gaps["copy"] = max(first.copy, second.copy)
    finite = {
        calibration: _is_finite(fuse_aligned(aligned, [inputs], None, config).model, inputs)
        for calibration, config in _CALIBRATIONS.items()
    }
    holds = (
        all(gaps[name] <= EXACT or name in told for name in ("first", "second"))
        and max(gaps["itself"], gaps["copy"]) <= _CALIBRATED
        and all(finite.values())
    )
    rounded = {name: float(f"{gap:.2g}") for name, gap in gaps.items()}
    return {
        "outcome": "fused" if holds else "wrong",
        **rounded,
        "told": told,
        **finite,
    }


_CALIBRATIONS = {
    name: clafusion.FusionConfig(calibration=name) for name in ("repair", "least_squares")
}


def _gap(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """Return how far two models' outputs are apart, relative to the largest of each output."""
    with torch.no_grad():
        found, wanted = (tensors(one(*inputs)) for one in (model, other))
    return max(
        float((one - two).abs().max() / two.abs().max().clamp(min=1e-30))
        for one, two in zip(found, wanted, strict=True)
    )


def _is_finite(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether all that a model puts out is finite."""
    with torch.no_grad():
        return all(bool(one.isfinite().all()) for one in tensors(model(*inputs)))


class _TooLong(BaseException):
    """A pair took too long. No ``except Exception`` of a library can swallow it."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise in what takes more time of the processor."""

    def stop(*_: Any) -> None:
        raise _TooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
