"""Checkpoints in several files: the index says which tensor lies where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from clafusion.errors import InputError
from clafusion.weights.messages import listed, one_line

__all__ = ["INDEX", "is_index", "shards_of"]

INDEX = ".index.json"
"""How the name of an index ends."""


def is_index(path: Path) -> bool:
    """Return whether a file is called as the index of a checkpoint in several files."""
    return path.name.lower().endswith(INDEX)


def shards_of(path: Path, what: str) -> dict[Path, list[str]]:
    """Return the files that an index names, and which tensors are read from each.

    Raises
    ------
    InputError
        The index is none, or a file that it names is missing. The message calls it ``what``.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {one_line(error)}") from error
    names = found.get("weight_map") if isinstance(found, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise InputError(
            f"{what} {str(path)!r} is no index of a checkpoint: it has no 'weight_map', which says "
            "the file of each tensor"
        )
    shards: dict[Path, list[str]] = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{what} {str(path)!r}: the file of {name!r} must be a name in the same folder; "
                f"got {file!r}"
            )
        shards.setdefault(path.with_name(file), []).append(name)
    gone = [shard.name for shard in shards if not shard.is_file()]
    if gone:
        raise InputError(
            f"{what} {str(path)!r} names files that are not beside it: "
            f"{listed(map(repr, gone))}; fetch them into its folder"
        )
    return shards
