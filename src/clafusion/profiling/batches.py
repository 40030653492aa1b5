"""Tensors, lists of batches and DataLoaders -> checked batches of model inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from clafusion.errors import DataError, InputError, is_number_in_array
from clafusion.execution.nesting import flattened, part
from clafusion.profiling.graphs import GraphBatches, graphs_in, is_graph, taken_graphs
from clafusion.tracing.graphs import BATCH, EDGES, graph_inputs
from clafusion.tracing.model import TracedModel
from clafusion.tracing.padding import MASK
from clafusion.weights.digests import add_tensor

__all__ = [
    "LABELS",
    "PROGRESS",
    "Data",
    "Part",
    "Progress",
    "batches",
    "data_digest",
    "first_batch",
    "has_rows",
    "in_chunks",
    "keeps_order",
    "labels_in",
    "num_graphs",
    "num_rows",
    "rows_side_by_side",
]

Data: TypeAlias = "Tensor | Iterable[Any]"
"""A tensor of samples, or an iterable of batches (a list, a DataLoader).

A batch is a tensor, a tuple ``(input, ..., label)`` of which the model's inputs are the first
entries, or a mapping of input names to tensors, of which labels are left out by their names. The
iterable is read more than once. A table with columns, as those of the library datasets, is read in
batches of its columns that hold numbers, each row of one shape.
"""

Progress: TypeAlias = Callable[[str, int], None]
"""Called with the stage's name and how many of its inputs are done."""

PROGRESS = ("stage", "count")
"""What these arguments are called in errors."""

LABELS = (
    "label",
    "labels",
    "label_ids",
    "mc_labels",
    "next_sentence_label",
    "start_positions",
    "end_positions",
)
"""What labels are called in batches that are mappings, by users of transformers."""

_BATCH_SIZE = 256  # rows taken at a time from a tensor


@dataclass(frozen=True)
class Part:
    """Some rows of data, in the data's own batches: an iterable of batches itself.

    Of graphs a row is a whole graph.

    Row ``i``, counted over all batches, is held out where ``floor((i + 1) * share)`` is more than
    ``floor(i * share)``: for a share of 0.1 every tenth. So the rows that are held out are spread
    over data in any order, say by class, and do not depend on the batches' sizes.

    Attributes
    ----------
    data
        All of the data.
    share
        Which share is held out, from 0 to 1.
    held
        Whether this part is what is held out; else it is the rest.
    """

    data: Data
    share: float
    held: bool

    def rows(self, first: int, size: int) -> Tensor:
        """Return which rows of a batch of ``size`` belong to the part; ``first`` came before."""
        counts = torch.arange(first, first + size + 1, dtype=torch.float64).mul(self.share).floor()
        is_held = counts[1:] > counts[:-1]
        return torch.nonzero(is_held == self.held).squeeze(1)

    def mask(self, first: int, size: int) -> Tensor:
        """Return what :meth:`rows` does as a mask ``(size,)``."""
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[self.rows(first, size)] = True
        return chosen

    def places(self, count: int) -> Tensor:
        """Return which of ``count`` values belong to the part.

        There is one for each row, or of graphs one for each node.
        """
        graphs = num_graphs(self.data)
        if not graphs or count == graphs:
            return self.rows(0, count)
        of_graphs = self.mask(0, graphs)
        of_nodes: list[Tensor] = []
        seen = 0
        for batch in _raw(self.data):
            own = of_graphs[seen : seen + graphs_in(batch)]
            seen += len(own)
            of_nodes.append(own[batch[BATCH]] if BATCH in batch else own.expand(_num_rows(batch)))
        return torch.nonzero(torch.cat(of_nodes)).squeeze(1)

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in _raw(self.data):
            if is_graph(batch):
                graphs = self.mask(seen, graphs_in(batch))
                seen += len(graphs)
                if bool(graphs.any()):
                    yield _with_graphs(batch, graphs)
                continue
            size = _num_rows(batch)
            rows = self.rows(seen, size)
            seen += size
            if len(rows):
                yield _taken(batch, rows, size)


def _raw(data: Data) -> Iterable[Any]:
    if isinstance(data, Tensor):
        batches: Iterable[Any] = data.split(_BATCH_SIZE)
        return batches
    return _batches_of_table(data) if _is_table(data) else data


def _is_table(data: Any) -> bool:
    """Say whether data is a table with columns, of which a slice of rows can be taken."""
    return isinstance(getattr(data, "column_names", None), list) and all(
        hasattr(data, one) for one in ("__getitem__", "__len__")
    )


def _batches_of_table(data: Any) -> Iterator[dict[str, Tensor]]:
    """Yield rows of a table, each column that holds numbers as a tensor."""
    for start in range(0, len(data), _BATCH_SIZE):
        columns = data[start : start + _BATCH_SIZE]
        batch: dict[str, Tensor] = {}
        for name, values in columns.items():
            try:
                if isinstance(values, (list, tuple)) and isinstance(values[0], Tensor):
                    values = torch.stack(list(values))
                batch[name] = torch.as_tensor(values)
            except (ValueError, TypeError, RuntimeError) as error:
                if name in LABELS or not _holds_numbers(values):
                    continue
                raise InputError(
                    f"data, column {name!r}: rows {start} and on have unlike lengths: pad them, as "
                    'by tokenizer(texts, padding="max_length")'
                ) from error
        yield batch


def _holds_numbers(values: Any) -> bool:
    leaves = tree_leaves(list(values))
    return bool(leaves) and not any(isinstance(one, (str, bytes)) or one is None for one in leaves)


def _num_rows(batch: Any) -> int:
    """Return the size of a batch, that of its first tensor; 0 where there is none."""
    return next((one.size(0) for one in _tensors_of(batch) if one.dim()), 0)


def _tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, also of mappings that are no dictionaries."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for one in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors_of(one)


def _taken(batch: Any, rows: Tensor, size: int) -> Any:
    """Return some rows of all tensors in a batch that have a row for each input."""
    if isinstance(batch, Tensor):
        has_rows = batch.dim() > 0 and batch.size(0) == size
        return batch[rows.to(batch.device)] if has_rows else batch
    if isinstance(batch, Mapping):
        return {name: _taken(one, rows, size) for name, one in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_taken(one, rows, size) for one in batch)
    return batch


def _with_graphs(batch: Mapping[str, Tensor], graphs: Tensor) -> dict[str, Tensor]:
    """Return some graphs of a batch."""
    given = graph_inputs(batch)
    assert given is not None
    values = tuple(batch[name] for name in given.names)
    return dict(zip(given.names, taken_graphs(given, values, graphs), strict=True))


def num_graphs(data: Data) -> int:
    """Return how many graphs there are; 0 in data that are no graphs."""
    whole = data.data if isinstance(data, Part) else data
    if isinstance(whole, Tensor) or not any(map(is_graph, _first(_raw(whole)))):
        return 0
    return sum(graphs_in(batch) for batch in data if is_graph(batch))


def has_rows(data: Data, least: int) -> bool:
    """Say whether there are ``least`` rows; no more batches are read than that takes."""
    _check_kind(data)
    count = 0
    for batch in [data] if isinstance(data, Tensor) else _raw(data):
        count += _num_rows(batch)
        if count >= least:
            return True
    return False


def num_rows(data: Data) -> int:
    """Return how many rows there are; every batch is read."""
    _check_kind(data)
    return sum(map(_num_rows, data if isinstance(data, Part) else _raw(data)))


def rows_side_by_side(data: Data, samples: int) -> int:
    """Return how many rows a profile runs at once: batches until there are ``samples``, or one."""
    _check_kind(data)
    first = most = 0
    for batch in _raw(data):
        size = _num_rows(batch)
        most = max(most, size)
        if first < samples:
            first += size
    return max(first, most)


def keeps_order(data: Data) -> bool:
    """Say whether every reading gives the same rows in the same order, as far as can be told.

    That is so for a tensor and a list, and for a DataLoader that takes its samples in order. Of any
    other iterable the first batch is read twice.
    """
    if isinstance(data, GraphBatches):
        return keeps_order(data.source)
    if isinstance(data, (Tensor, Sequence)) or _is_table(data):
        return True
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        sampler = data.batch_sampler
        if type(sampler) is BatchSampler:
            return isinstance(sampler.sampler, SequentialSampler)
        return sampler is None and isinstance(data.sampler, SequentialSampler)
    _check_kind(data)
    return data_digest(_first(data)) == data_digest(_first(data))


def _first(data: Iterable[Any]) -> list[Any]:
    return [batch for _, batch in zip(range(1), data, strict=False)]


def first_batch(data: Data) -> Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]:
    """Return the model inputs in the first batch of ``data``, to trace a model with.

    If the batch is a tuple, only its first entry counts, for the rest may be labels. A model with
    several inputs needs example inputs of its own to be traced. Of a mapping all entries count but
    those that are called as labels are (``LABELS``).

    Raises
    ------
    InputError
        ``data`` is empty, can be read only once, or holds no tensors.
    """
    _check_kind(data)
    if isinstance(data, Tensor):
        _check_rows("data", data)
        return data[:_BATCH_SIZE]
    for batch in _raw(data):
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if isinstance(batch, Mapping):
            return {name: value for name, value in batch.items() if name not in LABELS}
        if isinstance(batch, Tensor):
            return batch
        raise InputError(
            "a batch of data must be a tensor, a tuple that begins with tensors or a mapping of "
            f"names to tensors; got {type(batch).__name__}"
        )
    raise InputError("data is empty: give at least one batch")


def labels_in(data: Data) -> Tensor:
    """Return the labels in batches of inputs and labels, one batch behind the other.

    They are the last entry of a batch that is a tuple, ``"labels"`` or ``"label"`` of a mapping.

    Raises
    ------
    InputError
        A batch has no labels.
    """
    _check_kind(data)
    found: list[Tensor] = []
    for i, batch in enumerate(data if isinstance(data, Tensor) else _raw(data)):
        labels = None
        if isinstance(batch, Mapping):
            labels = next((batch[one] for one in ("labels", "label") if one in batch), None)
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            labels = batch[-1]
        if not isinstance(labels, Tensor) or labels.dim() == 0:
            where = "data is a tensor of inputs" if isinstance(data, Tensor) else f"data, batch {i}"
            raise InputError(
                f"{where}, without labels: give labels, one for each input, or batches of inputs "
                "and labels"
            )
        found.append(labels)
    if not found:
        raise InputError("data is empty: give at least one batch")
    return torch.cat(found)


def batches(
    data: Data,
    example_inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...] = (),
    *,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the model inputs of every batch, checked against the example inputs.

    Parameters
    ----------
    data
        A tensor, which is read 256 rows at a time, or an iterable of batches.
    example_inputs, keywords
        As in :class:`clafusion.TracedModel`.
    device
        Where the inputs go; default where they are.

    Raises
    ------
    DataError
        ``data`` is empty or can be read only once, or a batch has another number of inputs,
        shape or dtype than the example inputs, or NaN or infinite values. Of a :class:`Part` the
        other part's rows are checked, too.
    """
    try:
        yield from _batches(data, example_inputs, keywords, device)
    except DataError:
        raise
    except InputError as error:
        raise DataError(str(error)) from error.__cause__


def _batches(
    data: Data,
    example_inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...],
    device: torch.device | None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what :func:`batches` does."""
    taken = data if isinstance(data, Part) else None
    data = data if taken is None else taken.data
    _check_kind(data)
    count, has_masks = 0, False
    given = graph_inputs(dict(zip(keywords, example_inputs, strict=True))) if keywords else None
    for i, batch in enumerate(_raw(data)):
        inputs = _inputs(batch, len(example_inputs), keywords, i)
        if isinstance(batch, Mapping) and MASK in batch and MASK not in keywords:
            has_masks = has_masks or i == 0  # then the model does not take it
            if not has_masks:
                raise InputError(
                    f"data, batch {i} has {MASK!r}, which the first batch lacks: give it in every "
                    "batch"
                )
        for name, value, example in zip(
            keywords or [""] * len(inputs), inputs, example_inputs, strict=True
        ):
            where = f"data, batch {i}" + (f", input {name!r}" if name else "")
            if name != EDGES:
                _check_like(value, example, where, of_edges=name.startswith("edge_"))
        size = inputs[0].size(0)
        if given is not None:
            given.checked(inputs, f"data, batch {i}: ")
            size = given.num_graphs(inputs)
        if taken is not None and given is not None:
            graphs = taken.mask(count, size)
            inputs = taken_graphs(given, inputs, graphs) if bool(graphs.any()) else ()
        elif taken is not None:  # what is wrong with a row shows wherever the row belongs
            inputs = _taken(inputs, taken.rows(count, size), size)
        count += size
        if inputs and inputs[0].size(0):
            yield tuple(value.to(device) for value in inputs) if device is not None else inputs
    if count == 0:
        raise InputError("data is empty: give at least one batch")


def in_chunks(
    data: Data,
    model: TracedModel,
    max_inputs: int | None,
    chunk: int,
    *,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the first ``max_inputs`` inputs (None: all), at most ``chunk`` of them at a time.

    A model that admits one batch size only, or takes graphs, gets whole batches.
    """
    whole = model.takes_whole_batches
    seen = 0
    for inputs in batches(data, model.example_inputs, model.keywords, device=device):
        if max_inputs is not None and not whole:
            inputs = tuple(one[: max_inputs - seen] for one in inputs)
        size = inputs[0].size(0)
        if whole:
            yield inputs
        else:
            # None is much smaller than others: of few rows torch's bytes depend on threads.
            count = max(1, -(-size // chunk))
            yield from zip(*(one.tensor_split(count) for one in inputs), strict=True)
        seen += size
        if max_inputs is not None and seen >= max_inputs:
            return


def _check_kind(data: Any) -> None:
    if isinstance(data, Iterator):
        raise InputError(
            "data can be read only once, but is needed several times: give a tensor, a list of "
            "batches or a DataLoader instead of an iterator"
        )
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, (Tensor, Iterable)):
        hint = ". Put it into a list, as its only batch: [data]" * isinstance(data, Mapping)
        raise InputError(
            "data must be a tensor, a list of batches or a DataLoader; got "
            f"{type(data).__name__}{hint}"
        )
    if is_number_in_array(data):
        raise InputError("data is a single number: give at least one row")
    if isinstance(data, np.ndarray):
        raise InputError("data is a NumPy array: give torch.from_numpy(data)")
    if isinstance(data, Tensor) and data.layout != torch.strided:
        raise InputError("data is a sparse tensor: give data.to_dense()")


def _inputs(batch: Any, count: int, keywords: tuple[str, ...], index: int) -> tuple[Tensor, ...]:
    """Return the ``count`` model inputs of a batch, without labels."""
    where = f"data, batch {index}"
    values: list[Any]
    is_nested = any("." in name for name in keywords)  # then a mapping may be one input of several
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
        batch = batch if is_nested else batch[0]  # the rest may be labels
    if isinstance(batch, Mapping):
        missing = [name for name in keywords if part(batch, name) is None]
        if missing or not keywords:
            raise InputError(
                f"{where} is a mapping, so the model's inputs are needed by name: give "
                f"example_inputs as a mapping, too; missing {missing or 'their names'}"
            )
        values = [part(batch, name) for name in keywords]
    elif is_nested:  # positional inputs that hold several tensors
        values = [one for _, one in flattened(batch, "")][:count]
    elif isinstance(batch, (tuple, list)):
        values = list(batch[:count])
    else:
        values = [batch]
    if len(values) != count or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise InputError(
            f"{where} must begin with {count} tensor(s), the model's inputs; got {kinds}"
        )
    return tuple(values)


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.dim() == 0 or tensor.size(0) == 0:
        raise InputError(f"{name} is empty (shape {tuple(tensor.shape)}): give at least one row")


def _check_like(tensor: Tensor, example: Tensor, where: str, *, of_edges: bool = False) -> None:
    """Refuse an input of another kind than the example; of edges there may be none."""
    if tensor.dim() != example.dim() or tensor.shape[1:] != example.shape[1:]:
        expected = ("batch", *example.shape[1:])
        raise InputError(
            f"{where} has shape {tuple(tensor.shape)}, but the model was traced with "
            f"({', '.join(map(str, expected))})"
        )
    if tensor.dtype != example.dtype:
        raise InputError(
            f"{where} has dtype {tensor.dtype}, but the model takes {example.dtype}; convert it "
            "(and scale it as in training)"
        )
    if not of_edges:
        _check_rows(where, tensor)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{where} holds {bad} NaN or infinite values")


def data_digest(data: Data) -> str:
    """Return the SHA-256 of all tensors of all batches, in order, labels included."""
    digest = hashlib.sha256()
    for batch in [data] if isinstance(data, Tensor) else _raw(data):
        parts: Iterable[tuple[Any, Any]] = (
            [("", batch)]
            if isinstance(batch, Tensor)
            else sorted(batch.items())
            if isinstance(batch, Mapping)
            else enumerate(batch)
        )
        digest.update(b"batch")
        for name, value in parts:
            for inner, one in flattened(value, str(name)):
                if isinstance(one, Tensor):
                    add_tensor(digest, inner, one)
    return digest.hexdigest()
