"""Numbers, lists of numbers and sizes, as they are typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from clafusion.errors import InputError

__all__ = ["bytes_of", "merge_weights_of", "numbers_of"]

N = TypeVar("N", int, float)

_SIZE = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d\d?)?)\s*(?:([kmgt])(i?))?b?")


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
    from clafusion.stages import merge_weights

    try:
        merge_weights(found, names)
    except InputError as error:
        raise InputError(f"{option}{str(error).removeprefix('weights')}") from error
    return found


def bytes_of(option: str, text: str) -> int:
    """Return how many bytes a size such as ``500MB``, ``2GB`` or ``2GiB`` is.

    Raises
    ------
    InputError
        It is no size, or less than a byte.
    """
    matched = _SIZE.fullmatch(text.strip().lower())
    if matched is None:
        raise InputError(f"{option} takes a size such as 500MB, 2GB or 2GiB; got {text!r}")
    size = (1024 if matched[3] else 1000) ** " kmgt".index(matched[2] or " ")
    found = int(float(matched[1]) * size)
    if found < 1:
        raise InputError(f"{option} must be at least 1 byte; got {text!r}")
    return found
