"""Rows of hook points that are made when they are read, by running the network again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from clafusion.errors import StructureError
from clafusion.execution.call import State
from clafusion.execution.lazy import LazyState
from clafusion.execution.walk import Walk
from clafusion.tracing.model import TracedModel

__all__ = ["RowKey", "RowsOnDemand", "with_columns"]

RowKey: TypeAlias = tuple[int, int]
"""A hook point: its layer and its index in that layer."""

_KEPT = 2  # hook points whose rows stay


class RowsOnDemand(Mapping[RowKey, Tensor]):
    """Rows by hook point, each made when it is read.

    All rows of a large network take many times the memory of its weights. Reading them in the
    graph's order costs one more pass of the network, and each step back another one. Neither the
    inputs nor the weights may change before :meth:`close`.

    Parameters
    ----------
    model, state
        The network.
    nodes
        Which node shows each hook point.
    inputs
        All inputs, in parts that run side by side.
    sampled
        Returns the rows of a node, given its values and the number of inputs of each.

    Raises
    ------
    StructureError
        When rows are read after :meth:`close`.
    """

    def __init__(
        self,
        model: TracedModel,
        state: State,
        nodes: Mapping[RowKey, str],
        inputs: Sequence[tuple[Tensor, ...]],
        sampled: Callable[[str, Sequence[Tensor], Sequence[int]], Tensor],
    ) -> None:
        self._model, self._state, self._nodes = model, state, nodes
        self._inputs, self._sampled = inputs, sampled
        self._order = {node.name: i for i, node in enumerate(model.module.graph.nodes)}
        self._last: OrderedDict[str, Tensor] = OrderedDict()
        self._walks: list[Walk] = []
        self._wanted: set[str] = set()
        self._at = 0
        self._is_closed = False

    def __getitem__(self, key: RowKey) -> Tensor:
        node = self._nodes[key]
        if self._is_closed:
            raise StructureError(
                "the rows of large networks are gone when their fusion ends: take the profiles of "
                "clafusion.align, which keep them"
            )
        if node in self._last:
            self._last.move_to_end(node)
            return self._last[node]
        if not self._walks or self._order[node] <= self._at:
            self._restart()
        self._wanted.add(node)
        with torch.no_grad():
            values = [walk.reach(node) for walk in self._walks]
            counts = [one[0].size(0) for one in self._inputs]
            rows = self._sampled(node, values, counts)
        for walk in self._walks:
            walk.release(node)
        self._at = self._order[node]
        self._last[node] = rows
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
        """Let go of the inputs and all values: whoever reads rows from now on gets an error."""
        self._inputs, self._walks, self._is_closed = (), [], True
        self._last.clear()

    def _restart(self) -> None:
        self._wanted = set()
        self._walks = [Walk(self._model, one, self._state, self._wanted) for one in self._inputs]


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
