"""A table of plain values: shown as text or HTML, written as CSV, given to pandas."""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clafusion.errors import InputError
from clafusion.weights.atomic import check_output, replacing

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Rows of numbers, texts and None, which stands for nothing known.

    Attributes
    ----------
    columns
        The columns' names.
    rows
        A tuple of values for each row.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
        """Return a table without the columns of which nothing is known."""
        kept = [
            i for i in range(len(columns)) if not rows or any(row[i] is not None for row in rows)
        ]
        return cls(
            tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.to_dicts())

    def __repr__(self) -> str:
        return f"<Table of {len(self.rows)} rows: {', '.join(self.columns)}>"

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return each row as a dictionary."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame``.

        In a column of texts and numbers, as that of an option which takes both, all are texts, so
        that the frame can be written as Parquet.

        Raises
        ------
        InputError
            The library pandas is missing.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise InputError(
                "to_frame() needs the library pandas: pip install pandas; to_dicts() and "
                "to_csv() need none"
            ) from error
        columns = [list(values) for values in zip(*self.rows, strict=True)]
        named = zip(self.columns, columns or [[] for _ in self.columns], strict=True)
        return DataFrame({name: _of_one_kind(values) for name, values in named})

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as CSV; with ``path`` write it there, too.

        Raises
        ------
        InputError
            The file does not end with ``.csv`` or cannot be written.
        """
        memory = io.StringIO()
        writer = csv.writer(memory, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        if path is not None:
            target = check_output(path, (".csv",), "path")
            with replacing(target, "path") as temporary:
                temporary.write_text(memory.getvalue(), encoding="utf-8")
        return memory.getvalue()

    def cells(self) -> list[list[str]]:
        """Return the rows as they are shown, numbers to four digits."""
        return [[_shown(one) for one in row] for row in self.rows]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(one)}</th>" for one in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in self.cells()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _of_one_kind(values: list[Any]) -> list[Any]:
    kinds = {isinstance(one, str) for one in values if one is not None}
    if len(kinds) < 2:
        return values
    return [one if one is None else str(one) for one in values]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
