"""Files of texts: lines, JSON lines, tables."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clafusion.errors import InputError
from clafusion.weights.messages import one_line
from clafusion.weights.state_files import check_input

__all__ = ["TEXT_ENDINGS", "read_texts"]

TEXT_ENDINGS = (".txt", ".jsonl", ".csv", ".parquet")
_COLUMNS = ("text", "sentence", "content")


def read_texts(
    path: str | os.PathLike[str], column: str | None = None, limit: int | None = None
) -> list[str]:
    """Read texts from a ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` file.

    Parameters
    ----------
    path
        The file. Of a ``.txt`` every line that is not blank is a text.
    column
        Which entry of a row is the text; default the first of ``text``, ``sentence`` and
        ``content`` that there is, or the only one.
    limit
        Take this many from the beginning.

    Raises
    ------
    InputError
        The file is missing or cannot be read, has no such column, or holds no text.
    """
    file = check_input(path, TEXT_ENDINGS, "data file")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1; got {limit}")
    ending = file.suffix.lower()
    if ending == ".txt" and column is not None:
        raise InputError(f"data file {str(path)!r} has lines and no columns: leave the column out")
    texts: list[str] = []
    try:
        for text in _lines(file) if ending == ".txt" else _column(file, ending, column):
            if text.strip():
                texts.append(text)
            if len(texts) == limit:
                break
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"data file {str(path)!r} cannot be read: {one_line(error)}") from error
    if not texts:
        raise InputError(f"data file {str(path)!r} holds no text")
    return texts


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        yield from (line.rstrip("\n") for line in lines)


def _column(file: Path, ending: str, column: str | None) -> Iterator[str]:
    for i, row in enumerate(_rows(file, ending), 1):
        if i == 1:
            column = _chosen(file, row, column)
        value = row.get(str(column))
        if not isinstance(value, str):
            kind = "nothing" if value is None else f"a {type(value).__name__}"
            raise InputError(f"data file {str(file)!r}, row {i}: {column!r} holds {kind}, no text")
        yield value


def _chosen(file: Path, row: dict[str, Any], column: str | None) -> str:
    names = list(row)
    if column is not None:
        if column not in names:
            raise InputError(
                f"data file {str(file)!r} has no column {column!r}; it has {', '.join(names)}"
            )
        return column
    known = [one for one in _COLUMNS if one in names]
    if known or len(names) == 1:
        return (known or names)[0]
    raise InputError(
        f"data file {str(file)!r} has the columns {', '.join(names)}: say which holds the text "
        "(--text-column)"
    )


def _rows(file: Path, ending: str) -> Iterator[dict[str, Any]]:
    if ending == ".parquet":
        yield from _parquet_rows(file)
        return
    with file.open(encoding="utf-8", newline="") as lines:
        if ending == ".csv":
            yield from csv.DictReader(lines)
            return
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"data file {str(file)!r}, line {i} is no JSON: {one_line(error)}"
                ) from error
            if isinstance(row, str):
                row = {"text": row}
            if not isinstance(row, dict):
                raise InputError(
                    f"data file {str(file)!r}, line {i} must be a mapping or a text; got "
                    f"{type(row).__name__}"
                )
            yield row


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(
            f"data file {str(file)!r} needs the library pyarrow: install it, or give .jsonl or .csv"
        ) from error
    for batch in parquet.ParquetFile(file).iter_batches(256):
        yield from batch.to_pylist()
