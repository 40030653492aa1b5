"""Plain text: tables, and lines of a name and a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["counted_layers", "fact_lines", "plain_table", "seconds_text", "shortened"]


def plain_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()
) -> str:
    """Return a table with aligned columns; those in ``numeric`` are flush right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    return "\n".join([line(titles), line(["-" * width for width in widths]), *map(line, rows)])


def counted_layers(count: int) -> str:
    """Return a number of layers in words."""
    return f"{count} layer" + "s" * (count != 1)


def fact_lines(facts: Mapping[str, str]) -> str:
    """Return one line for each fact: its name and its value."""
    return "\n".join(f"{name:<12} {value}" for name, value in facts.items())


def seconds_text(timings: Mapping[str, float]) -> str:
    """Return the seconds in all and of each stage."""
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in timings.items())
    return f"{math.fsum(timings.values()):.2f} ({stages})"


def shortened(names: Sequence[str], most: int = 3) -> str:
    """Return the names between commas, and how many more there are than ``most``."""
    more = f", ... {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
