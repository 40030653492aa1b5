"""Rows of hook points that lie in a file, from which they are read when matching needs them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from clafusion.errors import StructureError
from clafusion.execution.lazy import LazyState
from clafusion.weights.storage import Spill

__all__ = ["RowKey", "SpilledRows", "close_rows", "with_columns"]

RowKey: TypeAlias = tuple[int, int]
"""A hook point: its layer and its index in that layer."""

_KEPT = 2  # hook points whose rows stay


class SpilledRows(Mapping[RowKey, Tensor]):
    """Rows by hook point, each read from a temporary file.

    All rows of a large network take many times the memory of its weights. Reading them from a file
    takes far less time than to run the network again.

    Parameters
    ----------
    nodes
        Which node shows each hook point.
    rows
        The rows by node.
    device
        Where the rows that are read go.

    Raises
    ------
    StructureError
        When rows are read after :meth:`close`.
    """

    def __init__(self, nodes: Mapping[RowKey, str], rows: Spill, device: torch.device) -> None:
        self._nodes, self._device = nodes, device
        self._rows: Spill | None = rows
        self._last: OrderedDict[str, Tensor] = OrderedDict()

    def __getitem__(self, key: RowKey) -> Tensor:
        node = self._nodes[key]
        if self._rows is None:
            raise StructureError(
                "the rows of large networks are gone when their fusion ends: take the profiles of "
                "clafusion.align, which keep them"
            )
        if node in self._last:
            self._last.move_to_end(node)
            return self._last[node]
        rows = self._last[node] = self._rows[node].to(self._device)
        if len(self._last) > _KEPT:
            self._last.popitem(last=False)
        return rows

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    def __iter__(self) -> Iterator[RowKey]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def close(self) -> None:
        """Let go of the file: whoever reads rows from now on gets an error."""
        self._rows = None
        self._last.clear()


def close_rows(every: Iterable[Mapping[RowKey, Tensor]]) -> None:
    """Let go of the files of those rows that lie in one."""
    for rows in every:
        if isinstance(rows, SpilledRows):
            rows.close()


def with_columns(
    rows: Mapping[RowKey, Tensor], columns: Mapping[RowKey, Tensor | None]
) -> Mapping[RowKey, Tensor]:
    """Return some hook points' rows with other columns: those at these indices, or all for None."""

    def selected(key: RowKey) -> Tensor:
        of_key = columns[key]
        return rows[key] if of_key is None else rows[key][:, of_key]

    if not isinstance(rows, dict):
        return LazyState(columns, selected)
    return {key: selected(key) for key in columns}
