"""How errors and long lists appear in messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["listed", "one_line"]

_LISTED = 5


def one_line(error: BaseException) -> str:
    """Return an error's type and message on a single line of moderate length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def listed(names: Iterable[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more
