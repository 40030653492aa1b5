"""The family of targets: which structure the result gets."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar, Literal

from clafusion.errors import InputError
from clafusion.settings import Choices, Module, Settings, choice, flag, number, text

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MERGES", "WIDTHS", "Deeper", "Like", "Shallower", "Target", "Wider"]

WIDTHS = ("own", "narrow", "wide")
"""The words that a target's ``width`` can be; else it is a parent's name or position."""

MERGES = Choices(
    least_squares="they are left out, and least squares makes up for them",
    sum="multiplied into the next: channels count whose sum is positive",
    majority="multiplied into the next: channels count that are mostly positive",
    average="multiplied into the next: channels count by how often they are positive",
)


@dataclass(frozen=True)
class Target(Settings, family=True):
    """Which structure the result gets. If you are not sure, take "deeper".

    ``reference`` says with which parent the others are aligned: the deepest or the shallowest, of
    equals the first.
    """

    reference: ClassVar[Literal["deepest", "shallowest"]] = "deepest"


_OWN, *_BY_SIZE = WIDTHS
_WIDTH = (
    f"whose widths: {_OWN} (of the parent that gives the depth; of equally deep ones the first), "
    f"{', '.join(_BY_SIZE)}, or a parent's name or position"
)


@dataclass(frozen=True)
class Deeper(Target, name="deeper"):
    """As deep as the deepest parent; where several are the deeper one somewhere, as their union."""

    width: str | int = text(_OWN, _WIDTH, also=int)


@dataclass(frozen=True)
class Shallower(Target, name="shallower"):
    """As deep as the shallowest parent; the others' layers that it lacks go."""

    reference: ClassVar[Literal["deepest", "shallowest"]] = "shallowest"

    width: str | int = text(_OWN, _WIDTH, also=int)
    merge: str = choice("least_squares", MERGES, "how the layers go that the result lacks")


@dataclass(frozen=True)
class Wider(Target, name="wider"):
    """As "deeper", with room for channels that only one of two networks has: average to ensemble.

    Channels that agree share a place, the others keep places of their own. Which share is one
    partial transport over all layers. At factor 2 nothing has to be shared: the result puts out the
    mean of both networks' outputs, where no norm spans channels.
    """

    factor: float = number(
        1.25, "from 1, as wide as the wider of both, to 2, both side by side", low=1.0, high=2.0
    )

    def __post_init__(self) -> None:
        factor = self.factor
        if isinstance(factor, Real) and not isinstance(factor, bool):
            if factor < 1:
                raise InputError(
                    f"factor must be in [1, 2]; got {factor!r}: below 1 the wider network's "
                    "channels have no place. For fewer channels give target=Deeper(width='narrow') "
                    "or target=Like(module)"
                )
            if factor > 2:
                raise InputError(
                    f"factor must be in [1, 2]; got {factor!r}: at 2 both networks stand side by "
                    "side, and channels beyond that would have nothing to do"
                )
        super().__post_init__()


@dataclass(frozen=True)
class Like(Target, name="like"):
    """Like a module of yours that can hold the parents' layers; its weights do not matter."""

    template: nn.Module | str = text(
        "", "the module (on the command line and in manifests what makes it)", also=Module
    )
    own_places: bool = flag(
        False,
        "of two networks: channels beyond the wider one's are for what only one has, not copies",
    )
