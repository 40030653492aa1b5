"""What comes of a pair of networks: the properties that every fusion must have."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import clafusion
from benchmarks.families.family import PAIRS, Family, Inputs, Size
from clafusion.fusion import fuse_aligned
from tests.support.architectures import tensors
from tests.support.networks import orders_of, permuted

__all__ = ["Member", "Members", "row"]

_EXACT = 1e-4
_CALIBRATED = 1e-3
"""How far outputs may be apart, relative to the largest: by rounding, and after least squares,
which rewrites every layer from float32 products."""

_TOLD = (clafusion.WidthWarning, clafusion.PinnedWarning)


@dataclass
class Member:
    """A network of a family with what was found out about it alone."""

    model: nn.Module
    inputs: Inputs
    traced: clafusion.TracedModel
    itself: float
    """How far the network fused with a copy of itself is from it."""
    copy: float
    """How far the network fused with a copy whose free channels have other places is from it."""


@dataclass
class Members:
    """The networks of one family, each made and tried once."""

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
            traced = clafusion.trace(model, inputs)
            moved = permuted(model, traced, orders_of(traced))
            changed = _gap(moved, model, inputs)
            if changed > _EXACT:
                raise AssertionError(f"other places of the channels change the outputs: {changed}")
            alone = [
                _gap(_fused([model, other], inputs), model, inputs) for other in (model, moved)
            ]
            self._known[size] = Member(model, inputs, traced, *alone)
        return self._known[size]


def row(members: Members, kind: str, limit: float) -> dict[str, Any]:
    """Return what comes of one pair, at most ``limit`` seconds long.

    ``outcome`` is ``"fused"``, ``"refused"`` by a named error, ``"wrong"`` (a property does not
    hold, and nothing told so) or ``"fault"`` (anything else, such as a limit of time).
    """
    start = time.perf_counter()
    found: dict[str, Any] = {"family": members.family.name, "differs": kind}
    try:
        with _at_most(limit):
            found |= _properties(*(members.member(size) for size in PAIRS[kind]))
    except clafusion.ClafusionError as error:
        found |= {"outcome": "refused", "message": str(error).splitlines()[0]}
    except Exception as error:  # a fault is a row of the table, too
        text = str(error).splitlines() or [""]
        found |= {"outcome": "fault", "message": f"{type(error).__name__}: {text[0]}"}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _properties(first: Member, second: Member) -> dict[str, Any]:
    """Fuse two networks in all ways; return what holds of the results.

    ``first`` and ``second`` say how far the result is from the only parent that has weight, the
    first or the second; ``told`` names those of which a warning says that it is not kept.
    """
    inputs = first.inputs
    pair = [first.model, second.model]
    # With what REPAIR needs, the profiles do for all calibrations.
    aligned = clafusion.align(pair, [inputs], _CALIBRATIONS["repair"], example_inputs=inputs)
    gaps: dict[str, float] = {}
    told: list[str] = []
    for name, weights in (("first", [1.0, 0.0]), ("second", [0.0, 1.0])):
        parent = pair[weights.index(1.0)]
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            result = fuse_aligned(aligned, [inputs], weights, _PLAIN)
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
        all(gaps[name] <= _EXACT or name in told for name in ("first", "second"))
        and max(gaps["itself"], gaps["copy"]) <= _CALIBRATED
        and all(finite.values())
    )
    rounded = {name: float(f"{gap:.2g}") for name, gap in gaps.items()}
    return {"outcome": "fused" if holds else "wrong", **rounded, "told": told, **finite}


# Where all parents' channels fit, each parent's function must come back.
_PLAIN = clafusion.FusionConfig(calibration="none", target=clafusion.Deeper(width="wide"))
_CALIBRATIONS = {
    name: clafusion.FusionConfig(calibration=name) for name in ("repair", "least_squares")
}


def _fused(models: list[nn.Module], inputs: Inputs) -> nn.Module:
    """Return what models fuse to, with the default options."""
    return clafusion.fuse(models, [inputs], example_inputs=inputs).model


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


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
