"""Entries of a manifest that several of its parts have: mappings, names and data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clafusion.errors import InputError

__all__ = ["DATA_KEYS", "DataEntry", "data_entry", "entries_of", "names_of"]

DATA_KEYS = (
    "file",
    "key",
    "limit",
    "shape",
    "scale",
    "mean",
    "std",
    "text_column",
    "max_length",
    "labels",
)


@dataclass(frozen=True)
class DataEntry:
    """Data that a manifest names, and that are not read yet.

    Attributes
    ----------
    settings
        Arguments of :func:`clafusion.profiling.samples.load_samples`, and how texts are read.
    """

    settings: Mapping[str, Any]


def entries_of(found: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    """Return a mapping whose names are all known.

    Raises
    ------
    InputError
        It is no mapping, or has another name; the message says ``where``.
    """
    if not isinstance(found, Mapping):
        raise InputError(f"{where} must be a mapping of {', '.join(known)}; got {found!r}")
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise InputError(f"{where} has an unknown entry {unknown[0]!r}; known: {', '.join(known)}")
    return dict(found)


def names_of(found: Any, where: str, models: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a list of different models' names.

    Raises
    ------
    InputError
        It is no list, or names something else, or one twice.
    """
    if not isinstance(found, list):
        raise InputError(f"{where} must be a list of names of models; got {found!r}")
    for name in found:
        if not isinstance(name, str) or name not in models:
            raise InputError(f"{where} names {name!r}, which models does not have")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise InputError(f"{where} names {twice!r} twice")
    return tuple(found)


def data_entry(found: Any, root: Path, where: str = "data") -> DataEntry:
    """Return data that a manifest names: a file, or a mapping with how it is read.

    Raises
    ------
    InputError
        There is no file, or an entry is unknown or of another form.
    """
    data: dict[str, Any]
    data = {"file": found} if isinstance(found, str) else entries_of(found, where, DATA_KEYS)
    if not isinstance(data.get("file"), str):
        raise InputError(f"{where} must name a file of inputs")
    for key in ("mean", "std", "shape"):
        value = data.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) or key == "shape" else [value]
        is_right = _is_whole if key == "shape" else _is_number
        if not (isinstance(values, list) and values and all(map(is_right, values))):
            raise InputError(f"{where}, {key} must be a list of finite numbers; got {value!r}")
        data[key] = values
    for key, is_right in (
        ("limit", _is_whole),
        ("scale", _is_number),
        ("key", _is_text),
        ("labels", _is_text),
        ("text_column", _is_text),
        ("max_length", _is_whole),
    ):
        if data.get(key) is not None and not is_right(data[key]):
            raise InputError(f"{where}, {key} is not possible as {data[key]!r}")
    return DataEntry({**data, "file": root / data["file"]})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
