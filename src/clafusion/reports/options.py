"""Options as plain data -> each by its path, and which of them are not the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clafusion.config import FusionConfig
from clafusion.errors import ClafusionError
from clafusion.settings import Settings

__all__ = ["changed_options", "flat_options", "usual_options"]


def changed_options(
    given: Mapping[str, Any], kind: type[Settings] = FusionConfig
) -> dict[str, str]:
    """Return the options of a configuration ``kind`` that are not the default, by their paths."""
    usual = usual_options(given, kind)
    return {path: one for path, one in flat_options(given).items() if usual.get(path) != one}


def usual_options(given: Mapping[str, Any], kind: type[Settings] = FusionConfig) -> dict[str, str]:
    """Return the options' defaults, as :func:`flat_options` does; of the given variants."""
    usual = flat_options(kind().to_dict())
    try:
        of_variants = flat_options(kind.parse(_variants(given), "settings").to_dict())
    except ClafusionError:  # a variant that is registered elsewhere only
        return usual
    return of_variants | usual


def _variants(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with nothing but the variants' names."""
    nested = {name: _variants(one) for name, one in given.items() if isinstance(one, Mapping)}
    return nested | ({"name": given["name"]} if "name" in given else {})


def flat_options(found: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Return nested settings as ``path.of.option`` -> value; a variant's name is its family's."""
    flat: dict[str, str] = {}
    for name, value in found.items():
        here = path if name == "name" and path else f"{path}.{name}".lstrip(".")
        if isinstance(value, Mapping):
            flat |= flat_options(value, here)
        else:
            flat[here] = f"{value:g}" if isinstance(value, float) else str(value)
    return flat
