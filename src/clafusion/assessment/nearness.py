"""What an assessment says: how near networks are to what the parents put out together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["DISTANCES", "FusionAssessment", "Kind", "Nearness"]

_APART = 0.02  # of the rows: where agreements are as far apart, the verdict says so

Kind: TypeAlias = Literal["classes", "values"]
"""As what outputs are compared."""

DISTANCES: Mapping[Kind, str] = {"classes": "divergence", "values": "squared error"}
"""What tables call the distance."""


@dataclass(frozen=True)
class Nearness:
    """How near a network's outputs are to the parents' together.

    Attributes
    ----------
    distance
        The mean Kullback-Leibler divergence in nats, or the relative squared error: 0 where the
        outputs are the same, inf where they are not finite.
    agreement
        Of classes: the share of rows, from 0 to 1, for which both choose the same. Else None.
    """

    distance: float
    agreement: float | None = None

    def __str__(self) -> str:
        """Return both in words."""
        if self.agreement is None:
            return f"relative squared error {self.distance:.3g}"
        return f"agreement {100 * self.agreement:.1f} %, divergence {self.distance:.3g}"


@dataclass(frozen=True)
class FusionAssessment:
    """How near the result comes to the parents together, and how near each parent alone.

    See :mod:`clafusion.assessment` for the equations.

    Attributes
    ----------
    kind
        ``"classes"`` or ``"values"``: as what the outputs are compared.
    result
        How near the result is to the parents together.
    parents
        The same of each parent alone, by name. Empty where each has classes of its own, and they
        are together what they put out side by side.
    between_parents
        How near the parents are to each other: for how many rows all of them choose the same class,
        and the mean distance of every two. None where each has classes of its own.
    num_inputs
        How many inputs were looked at.
    held_out
        Whether these inputs were kept out of the fusion. If not, the result has seen them, and on
        others it may be further away.
    nearer
        The names of the parents that alone are nearer than the result. A difference counts that is
        above two standard errors of the mean over the inputs, and above 0.0001.
    """

    kind: Kind
    result: Nearness
    parents: Mapping[str, Nearness]
    between_parents: Nearness | None
    num_inputs: int
    held_out: bool
    nearer: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<FusionAssessment: {self.verdict}>"

    @property
    def nearest_parent(self) -> str:
        """The name of the parent that alone is the nearest to all together."""
        return min(self.parents, key=lambda name: self.parents[name].distance)

    @property
    def verdict(self) -> str:
        """What the figures say, in one sentence."""
        seen = "kept out of the fusion" if self.held_out else "that the fusion has seen"
        on = f"{self.num_inputs} inputs {seen}"
        if not self.parents:
            return f"Beside the parents side by side, on {on}: {self.result}"
        name = self.nearest_parent
        if self.nearer:
            return (
                f"{name} alone comes nearer to the parents together than the result, on {on}: "
                f"{self.parents[name]}; the result {self.result}"
            )
        return (
            f"No parent alone comes clearly nearer to the parents together than the result, on "
            f"{on}: {self.result}; {name} alone {self.parents[name]}{self._but_agreeing()}"
        )

    def _but_agreeing(self) -> str:
        """Name a parent that agrees with all together clearly more often, though it is further."""
        agreements = {name: one.agreement or 0.0 for name, one in self.parents.items()}
        best = max(agreements, key=lambda name: agreements[name])
        if agreements[best] <= (self.result.agreement or 0.0) + _APART:
            return ""
        return f". But {best} alone agrees more often: {100 * agreements[best]:.1f} %"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures and the verdict as plain data for JSON; None for infinity."""
        return {
            "kind": self.kind,
            "result": _plain(self.result),
            "parents": {name: _plain(one) for name, one in self.parents.items()},
            "between_parents": self.between_parents and _plain(self.between_parents),
            "num_inputs": self.num_inputs,
            "held_out": self.held_out,
            "nearer": list(self.nearer),
            "verdict": self.verdict,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> FusionAssessment:
        """Return the assessment of which :meth:`to_dict` gave the facts."""
        return cls(
            facts["kind"],
            _read(facts["result"]),
            {name: _read(one) for name, one in facts["parents"].items()},
            facts["between_parents"] and _read(facts["between_parents"]),
            facts["num_inputs"],
            facts["held_out"],
            tuple(facts["nearer"]),
        )


def _plain(one: Nearness) -> dict[str, Any]:
    return {
        "distance": one.distance if math.isfinite(one.distance) else None,
        "agreement": one.agreement,
    }


def _read(facts: Mapping[str, Any]) -> Nearness:
    distance = facts["distance"]
    return Nearness(math.inf if distance is None else distance, facts["agreement"])
