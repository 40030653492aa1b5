"""Graphs of torch_geometric, or of tensors, as a graph network's inputs by name.

The library is imported only where its objects are given, so that somebody else has imported it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.profiling.graphs import GraphBatches
from clafusion.tracing.graphs import BATCH, EDGES, named_graph
from clafusion.weights.factories import ModelFile

__all__ = ["OnData", "graph_batches"]

_AT_ONCE = 64  # graphs of a list that run together


class OnData(nn.Module):
    """Call a network that takes one ``Data`` object, by the tensors in that object.

    Parameters
    ----------
    network
        The network. It stays as it is.
    names
        Which of the object's tensors it reads, as ``("x", "edge_index", "batch")``.

    Examples
    --------
    >>> from clafusion.interop.torch_geometric import OnData
    >>> models = [OnData(one, ("x", "edge_index")) for one in (first, second)]  # doctest: +SKIP
    """

    def __init__(self, network: nn.Module, names: Sequence[str] = ("x", EDGES)) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)
        parameters = [inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY) for one in names]
        self.__signature__ = inspect.Signature(parameters)

    def forward(self, **tensors: Tensor) -> Any:
        """Return what the network puts out for a ``Data`` object of these tensors."""
        from torch_geometric.data import Data

        return self.network(Data(**tensors))


def graph_batches(data: Any, model: Any) -> GraphBatches | list[dict[str, Tensor]] | None:
    """Return data as batches of graphs by the names in a model's forward; None for other data.

    What is in memory becomes a list, a loader stays one.

    Parameters
    ----------
    data
        One graph: a ``Data`` object, a mapping, or where the forward has an ``edge_index`` a tuple
        in its order. Or several: a list of such, or a loader of ``torch_geometric``.
    model
        The network. Of one that is not built yet, all tensors in the data are its inputs.

    Raises
    ------
    InputError
        A graph lacks what the forward needs.
    """
    if isinstance(data, GraphBatches):
        return data
    if isinstance(data, (Tensor, np.ndarray, str, bytes, Iterator)):
        return None
    if _is_graph(data, model):
        data = [data]
    elif (
        isinstance(data, Mapping)
        or not isinstance(data, Iterable)
        or not _is_graph(next(iter(data), None), model)
    ):
        return None
    names = _names(model)
    if isinstance(data, list) and all(map(_is_data, data)):
        data = _joined(data, names)
    batches = GraphBatches(data, partial(_read, model=model, names=names))
    return list(batches) if isinstance(data, (list, tuple)) else batches


def _names(model: Any) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a network's forward; None where they are unknown or any."""
    if isinstance(model, ModelFile):
        model, _ = model.open()
    if not isinstance(model, nn.Module):
        return None
    if isinstance(model, OnData):
        return model.__signature__.parameters
    parameters = inspect.signature(model.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return None
    return parameters


def _is_data(value: Any) -> bool:
    """Say whether a value is a graph, or a batch of graphs, of torch_geometric."""
    library = sys.modules.get("torch_geometric.data")
    return library is not None and isinstance(value, library.Data)


def _is_graph(value: Any, model: Any) -> bool:
    """Say whether a value is one graph, or a batch of graphs."""
    if _is_data(value) or (isinstance(value, Mapping) and EDGES in value):
        return True
    if not isinstance(value, (tuple, list)) or not any(map(_may_be_edges, value)):
        return False
    return EDGES in list(_names(model) or ())[: len(value)]


def _may_be_edges(value: Any) -> bool:
    is_tensor = isinstance(value, Tensor) and not value.is_floating_point()
    return is_tensor and value.dim() == 2


def _joined(data: Sequence[Any], names: Mapping[str, Any] | None) -> Sequence[Any]:
    """Return graphs as batches, where the network asks which node is of which graph."""
    from torch_geometric.data import Batch

    if names is None or BATCH not in names or any(hasattr(one, "ptr") for one in data):
        return data
    return [
        Batch.from_data_list(list(data[start : start + _AT_ONCE]))
        for start in range(0, len(data), _AT_ONCE)
    ]


def _read(
    batch: Any, *, model: Any, names: Mapping[str, inspect.Parameter] | None
) -> dict[str, Tensor]:
    """Return the tensors of a graph that a network takes, by their names."""
    found: Mapping[str, Any]
    if _is_data(batch):
        found = dict(batch.to_dict())
        if BATCH not in found:
            found[BATCH] = batch.edge_index.new_zeros(batch.num_nodes)
    elif isinstance(batch, Mapping):
        found = batch
    else:
        found = named_graph(model, batch) or {}
    tensors = {name: _plain(one) for name, one in found.items() if isinstance(one, Tensor)}
    if names is None:
        kept = {
            name: one for name, one in tensors.items() if name not in ("y", "ptr", "train_mask")
        }
        return kept if _is_data(batch) else tensors
    missing = [
        one.name
        for one in names.values()
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and one.name not in tensors
    ]
    if missing:
        raise InputError(_lacks(model, missing, found))
    return {name: one for name, one in tensors.items() if name in names}


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without the class that a library has given it, as an ``EdgeIndex``."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def _lacks(model: Any, missing: Sequence[str], found: Mapping[str, Any]) -> str:
    """Say what a graph lacks."""
    network = type(model).__name__
    has = ", ".join(map(repr, found))
    if len(missing) == 1 and EDGES not in missing and missing[0] in ("data", "batch_data", "graph"):
        return (
            f"the forward of {network} takes one object, {missing[0]!r}: give "
            "clafusion.interop.torch_geometric.OnData(model, names of the tensors that it reads) "
            "for each model"
        )
    if "adj_t" in missing:
        return (
            f"{network} takes 'adj_t', a sparse matrix, which torch.export cannot follow: let it "
            f"take {EDGES!r}, the edges as (2, num_edges)"
        )
    return (
        f"{network} needs {', '.join(map(repr, missing))}, which the graph lacks: it has {has}. "
        "Give every input of its forward, by its name"
    )
