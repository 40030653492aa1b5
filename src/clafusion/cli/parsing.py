"""Lists of numbers, as they are typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from clafusion.errors import InputError
from clafusion.stages import merge_weights

__all__ = ["merge_weights_of", "numbers_of"]

N = TypeVar("N", int, float)


def numbers_of(option: str, text: str | None, kind: type[N]) -> list[N] | None:
    """Return the numbers between commas, or None for no text.

    Raises
    ------
    InputError
        Something is no number of this kind.
    """
    if text is None:
        return None
    try:
        return [kind(one) for one in text.strip("()[] ").split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} takes {what} between commas; got {text!r}") from error


def merge_weights_of(option: str, text: str | None, names: Sequence[str]) -> list[float] | None:
    """Return one weight for each model, given as ``2,1,1`` or ``2:1:1``; None for no text.

    Raises
    ------
    InputError
        A weight is no number, or as for :func:`clafusion.stages.merge_weights`.
    """
    found = numbers_of(option, None if text is None else text.replace(":", ","), float)
    if found is None:
        return None
    try:
        merge_weights(found, names)
    except InputError as error:
        raise InputError(f"{option}{str(error).removeprefix('weights')}") from error
    return found
