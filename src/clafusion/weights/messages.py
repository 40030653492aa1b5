"""How errors and long lists appear in messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["listed", "one_line"]

_LISTED = 5


def one_line(error: BaseException, where: str = "", *, most: int | None = 200) -> str:
    """Return an error's type and message on a single line.

    Parameters
    ----------
    error
        The error.
    where
        What stands before its message unless it begins so.
    most
        How many characters of the message are kept; None for all.
    """
    text = " ".join(str(error).split())
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    if not text.startswith(where):
        text = f"{where}: {text}".removesuffix(": ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def listed(names: Iterable[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more
