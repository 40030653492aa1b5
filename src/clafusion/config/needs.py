"""What options need of each other."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from clafusion.errors import InputError
from clafusion.settings import Settings

__all__ = ["check_needed"]


def check_needed(who: str, settings: Settings, *needs: tuple[str, Any, str]) -> None:
    """Refuse settings that lack what ``who`` needs: a path, the value there and what for, each.

    Raises
    ------
    InputError
        An option has another value; the message names it, what it has to be and why.
    """
    for path, needed, reason in needs:
        if attrgetter(path)(settings) != needed:
            raise InputError(f"{who} needs {path}={needed!r}, for {reason}")
