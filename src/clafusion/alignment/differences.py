"""What two layers that do not match differ in, in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from clafusion.tracing.fixed_values import Constant
from clafusion.tracing.layer import Layer

__all__ = ["differences", "nearest"]


def differences(one: Layer, other: Layer) -> list[str]:
    """Say what differs in two layers, of each what the first has and then what the second has.

    Returns an empty list for layers that match.
    """
    if one.kind != other.kind:
        return [f"{_KINDS[one.kind]} and {_KINDS[other.kind]}"]
    found = _of_operations(one.structure[1:], other.structure[1:])
    found += [f"{text} (beside the layer)" for text in _of_operations(one.beside, other.beside)]
    if one.stream != other.stream:
        found.append("on which stream they are")
    if one.rows != other.rows:
        found.append(f"rows of {one.rows} and of {other.rows}")
    if one.output_shape != other.output_shape:
        found.append(
            f"output positions {_shape(one.output_shape)} and {_shape(other.output_shape)}"
        )
    return list(dict.fromkeys(found))


def nearest(layer: Layer, others: Sequence[Layer]) -> Layer:
    """Return the layer that differs least from one; of equals the one that stands nearest."""
    return min(
        others,
        key=lambda one: (
            one.kind != layer.kind,
            _names(one) != _names(layer),
            len(differences(layer, one)),
            abs(one.index - layer.index),
        ),
    )


def _names(layer: Layer) -> list[str]:
    return [entry[0] for entry in layer.structure[1:]]


_KINDS = {
    "chain": "a layer of a chain",
    "residual_block": "a block of parallel paths",
    "norm": "a norm",
}


def _of_operations(ones: Sequence[Any], others: Sequence[Any]) -> list[str]:
    names = [[entry[0] for entry in entries] for entries in (ones, others)]
    if names[0] != names[1]:
        shown = [_operations(own, than) for own, than in (names, names[::-1])]
        return [f"operations {shown[0]} and {shown[1]}"]
    found = []
    for (name, settings, wiring, freedom), (_, settings_of, wiring_of, freedom_of) in zip(
        ones, others, strict=True
    ):
        given, of_other = dict(settings), dict(settings_of)
        for key in dict.fromkeys([*given, *of_other]):
            if given.get(key) != of_other.get(key):
                found.append(
                    f"{name}: {key} {_value(given.get(key))} and {_value(of_other.get(key))}"
                )
        if wiring != wiring_of:
            found.append(_of_wiring(name, wiring, wiring_of))
        elif freedom != freedom_of:
            found.append(f"{name}: {_of_freedom(freedom, freedom_of)}")
    return found


def _of_wiring(name: str, wiring: Sequence[Any], wiring_of: Sequence[Any]) -> str:
    counts = [sum(one == "parameter" for one in each) for each in (wiring, wiring_of)]
    if len(wiring) != len(wiring_of) and counts[0] != counts[1]:
        words = ["without" if count == min(counts) else "with" for count in counts]
        what = "a bias" if max(counts) == 2 else "another parameter"
        return f"{name}: {words[0]} {what} and {words[1]}"
    for one, other in zip_longest(wiring, wiring_of):
        if isinstance(one, Constant) and isinstance(other, Constant) and one != other:
            again = "" if one.name == other.name else f" ({other.name!r})"
            return f"{one!r}{again}: its values"
    return f"{name}: what it reads"


def _of_freedom(freedom: Sequence[Any], freedom_of: Sequence[Any]) -> str:
    if freedom[:-1] != freedom_of[:-1]:
        return "which channels can change places"
    turns = [", ".join(map(str, one[-1])) or "no" for one in (freedom, freedom_of)]
    return f"a channel stands in {turns[0]} and {turns[1]} place(s)"


def _operations(own: Sequence[str], than: Sequence[str]) -> str:
    """Show a list of operations where it differs from another one."""
    start = next(
        (i for i, (a, b) in enumerate(zip(own, than, strict=False)) if a != b),
        min(len(own), len(than)),
    )
    shown = own[start : start + 3]
    more = "..." if len(own) > start + 3 else ""
    return (("..." if start else "") + ", ".join(shown) + more) or "none"


def _value(value: Any) -> str:
    return "none" if value is None else str(value)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "none"
