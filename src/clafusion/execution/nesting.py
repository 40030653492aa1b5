"""Inputs that are lists or mappings of tensors: each tensor by a name that says where it belongs.

``{"image": x, "levels": [y, z]}`` are ``image``, ``levels.0`` and ``levels.1``. A key of a mapping
that is a number is in quotes, for it is no place in a list: ``{"maps": {"0": x}}`` is ``maps.'0'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["flattened", "is_nested", "nested", "part"]


def is_nested(value: Any) -> bool:
    """Say whether an input holds several tensors."""
    return isinstance(value, (list, tuple, Mapping))


def flattened(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what an input holds, each with its name."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from flattened(one, f"{name}.{_quoted(key)}")
    elif isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            yield from flattened(one, f"{name}.{i}")
    else:
        yield name, value


def nested(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Return values as the inputs to which their names belong."""
    whole: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *outer, last = name.split(".")
        level = whole
        for one in outer:
            level = level.setdefault(one, {})
        level[last] = value
    return {name: _with_lists(value) for name, value in whole.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    parts = {name: _with_lists(one) for name, one in value.items()}
    if list(parts) == [str(i) for i in range(len(parts))]:
        return list(parts.values())
    return {name.strip("'"): one for name, one in parts.items()}


def _quoted(key: Any) -> str:
    return f"'{key}'" if str(key).isdigit() else str(key)


def part(whole: Mapping[str, Any], name: str) -> Any:
    """Return what a mapping of inputs holds under a name; None where it holds nothing."""
    if name in whole:
        return whole[name]
    value: Any = whole
    for one in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(one.strip("'"))
        elif isinstance(value, (list, tuple)) and one.isdigit() and int(one) < len(value):
            value = value[int(one)]
        else:
            return None
    return value
