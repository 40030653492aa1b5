"""Pieces of HTML. What comes from users enters by :func:`text` or as an attribute: escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping

__all__ = [
    "compact",
    "definitions",
    "element",
    "percent",
    "scrollable",
    "section",
    "sortable",
    "text",
]

_UNITS = ("", "k", "M", "G", "T", "P")


def text(value: object) -> str:
    """Return a text with all that HTML would read escaped."""
    return html.escape(str(value), quote=True)


def element(tag: str, *children: str, **attributes: object) -> str:
    """Return an element of children that are HTML already.

    An attribute's name is written with ``_`` for ``-`` and may end with ``_`` (``class_``). Its
    value is escaped; None and False leave the attribute out, and True stands for one without a
    value.
    """
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return f"<{tag}{given}>{''.join(children)}</{tag}>"


def section(name: str, title: str, *children: str) -> str:
    """Return a section of the page under a heading; ``name`` is where links go."""
    heading = element("h2", text(title), id=f"{name}-title")
    return element("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def scrollable(content: str, label: str) -> str:
    """Return what may be wider than the page: it is scrolled alone, by keys too."""
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def sortable(titles: Iterable[str], rows: Iterable[str], label: str) -> str:
    """Return a table whose rows can be sorted; ``titles`` and ``label`` are plain text."""
    head = "".join(element("th", text(one), scope="col") for one in titles)
    table = element(
        "table",
        element("thead", element("tr", head)),
        element("tbody", *rows),
        class_="sortable",
    )
    return scrollable(table, label)


def definitions(facts: Mapping[str, str] | Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values, both of them plain text."""
    pairs = facts.items() if isinstance(facts, Mapping) else facts
    rows = (element("dt", text(name)) + element("dd", text(value)) for name, value in pairs)
    return element("dl", *rows)


def percent(value: float) -> str:
    """Return a share from 0 to 1 in percent, without the sign."""
    return f"{100 * value:.1f}"


def compact(count: float) -> str:
    """Return a count with three digits and a unit: ``1.23 M``."""
    if count < 1000:
        return f"{count:.0f}"
    power = min(int(math.log10(count) / 3 + 1e-9), len(_UNITS) - 1)
    shown = f"{count / 1000**power:.3g}"
    if float(shown) >= 1000 and power + 1 < len(_UNITS):  # 999,999 is a million
        power, shown = power + 1, "1"
    return f"{float(shown):g} {_UNITS[power]}"
