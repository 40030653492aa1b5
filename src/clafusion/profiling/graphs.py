"""Graphs as data: batches of inputs by name, of which whole graphs can be taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from clafusion.errors import InputError
from clafusion.tracing.graphs import BATCH, EDGES, GraphInputs, graph_inputs

__all__ = ["GraphBatches", "graphs_in", "is_graph", "taken_graphs"]


class GraphBatches:
    """Graphs from anywhere, as mappings of a network's inputs; the nodes' come first.

    Parameters
    ----------
    source
        An iterable of batches that can be read again, as a loader.
    read
        Makes of a batch the inputs by name.
    """

    def __init__(self, source: Iterable[Any], read: Callable[[Any], Mapping[str, Tensor]]) -> None:
        self.source = source
        self._read = read

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i, batch in enumerate(self.source):
            inputs = self._read(batch)
            given = graph_inputs(inputs, f"data, batch {i}: ")
            if given is None:
                raise InputError(
                    f"data, batch {i} has no {EDGES!r}, though others have: it has "
                    f"{', '.join(map(repr, inputs))}"
                )
            yield {name: inputs[name] for name in given.names}


def is_graph(batch: Any) -> bool:
    """Say whether a batch is a mapping that holds graphs."""
    return isinstance(batch, Mapping) and EDGES in batch


def graphs_in(batch: Mapping[str, Tensor]) -> int:
    """Return how many graphs a batch holds."""
    return int(batch[BATCH].max()) + 1 if BATCH in batch else 1


def taken_graphs(
    given: GraphInputs, inputs: tuple[Tensor, ...], graphs: Tensor
) -> tuple[Tensor, ...]:
    """Return some graphs of a batch: those of a mask ``(num_graphs,)``."""
    if bool(graphs.all()):
        return inputs
    graphs = graphs.to(inputs[0].device)
    return tuple(given.taken(inputs, graphs[given.membership(inputs)], graphs))
