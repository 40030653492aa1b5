"""Settings with lists in them -> every combination: a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clafusion.config import FusionConfig
from clafusion.errors import InputError
from clafusion.settings import Settings, described
from clafusion.stages import config_from

__all__ = ["GridPoint", "expanded", "grid_of"]


@dataclass(frozen=True)
class GridPoint:
    """One combination of a grid.

    Attributes
    ----------
    chosen
        Path of each option that varies -> its value here, as it is shown.
    config
        The options.
    """

    chosen: Mapping[str, Any]
    config: FusionConfig


def grid_of(config: FusionConfig | None, settings: Mapping[str, Any]) -> list[GridPoint]:
    """Return all combinations of settings in which some values, at any depth, are lists.

    Parameters
    ----------
    config
        What holds where ``settings`` say nothing.
    settings
        Fields of a :class:`clafusion.FusionConfig`, as keywords or as in a manifest; a list stands
        for several values.

    Raises
    ------
    InputError
        A list is empty, or an option is unknown or out of its range.
    """
    return [
        GridPoint(chosen, config_from(config, given)) for chosen, given in expanded(settings, "")
    ]


def expanded(value: Any, path: str) -> list[tuple[dict[str, Any], Any]]:
    """Return all combinations of a value: what was chosen, by path, and the value without lists.

    Raises
    ------
    InputError
        A list is empty.
    """
    if isinstance(value, Mapping):
        found: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {})]
        for name, inner in value.items():
            below = expanded(inner, f"{path}.{name}" if path else str(name))
            found = [
                ({**chosen, **more}, {**given, name: one})
                for chosen, given in found
                for more, one in below
            ]
        return list(found)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise InputError(f"{path} is an empty list: give at least one value")
        return [
            ({path: _shown(one), **more}, given)
            for one in value
            for more, given in expanded(one, path)
        ]
    return [({}, value)]


def _shown(value: Any) -> Any:
    if isinstance(value, Settings):
        return described(value)
    if isinstance(value, Mapping):
        return value.get("name", ", ".join(map(str, value.values())))
    return value
