"""Labelled tensors and DataLoaders -> checked batches on a device."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.execution.call import device_of, usable_device

__all__ = [
    "Batch",
    "LabelledData",
    "batches_of",
    "check_data",
    "is_pair",
    "num_batches",
    "parted",
    "training_device",
]

LabelledData: TypeAlias = "tuple[Tensor, Tensor] | Iterable[Any]"
"""A pair ``(inputs, labels)``, or an iterable of batches that can be read again (a DataLoader).

A batch is a tuple ``(input, ..., labels)``, or a mapping of input names and ``"labels"``.
"""

Batch: TypeAlias = "tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor | None]"
"""Positional inputs, inputs by name, and labels or None."""


def is_pair(data: Any) -> bool:
    """Return whether data are a pair ``(inputs, labels)``; labels may be None."""
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)


def check_data(name: str, data: Any, labelled: bool) -> None:
    """Check what can be checked of data without reading a batch.

    Raises
    ------
    InputError
        The data can be read only once, are of another kind, empty, or lack the labels that
        ``labelled`` demands. The message calls the data ``name``.
    """
    if isinstance(data, Iterator):
        raise InputError(
            f"{name} can be read only once, but is needed in each epoch: give tensors, a list of "
            "batches or a DataLoader instead of an iterator"
        )
    _refuse_graph(name, data)
    if isinstance(data, (Tensor, str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise InputError(
            f"{name} must be a pair of tensors (inputs, labels) or a DataLoader; "
            f"got {type(data).__name__}"
        )
    if not is_pair(data):
        is_list = isinstance(data, (list, tuple)) and len(data) > 1
        if labelled and is_list and all(isinstance(batch, Tensor) for batch in data):
            raise InputError(
                f"{name} must be a pair of tensors (inputs, labels), or batches [(input, ..., "
                f"labels), ...]; got a {type(data).__name__} of tensors"
            )
        return
    inputs, labels = data
    if inputs.dim() == 0 or len(inputs) == 0:
        raise InputError(f"{name} is empty: its inputs have shape {tuple(inputs.shape)}")
    if isinstance(labels, Tensor):
        if labels.dim() == 0 or len(labels) != len(inputs):
            raise InputError(
                f"{name} has {len(inputs)} inputs, but labels of shape {tuple(labels.shape)}"
            )
        if not labelled and labels.is_floating_point():
            raise InputError(
                f"{name} is a pair, of which the second must be labels; got {labels.dtype}. Give "
                "two batches of inputs as a list"
            )
    elif labelled or labels is not None:
        raise InputError(
            f"{name} must be a pair of tensors (inputs, labels); its second entry is "
            f"{type(labels).__name__}"
        )


def parted(data: Any, share: float) -> tuple[Any, Any]:
    """Return what of data is trained on, and what is kept out: evenly spaced rows of a pair.

    None is kept out of other data, and where fewer than two rows would be.
    """
    if not is_pair(data) or int(share * len(data[0])) < 2:
        return data, None
    count = len(data[0])
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.linspace(0, count - 1, int(share * count)).long()] = True
    kept, out = (
        tuple(None if one is None else one[rows.to(one.device)] for one in data)
        for rows in (~held, held)
    )
    return kept, out


def num_batches(data: Any, batch_size: int) -> int | None:
    """Return how many batches an epoch has; None where the data have no length."""
    if is_pair(data):
        count = len(data[0])
        return 1 if count <= batch_size else -(-(count - (count % batch_size == 1)) // batch_size)
    try:
        return len(data)
    except TypeError:
        return None


def batches_of(
    name: str,
    data: Any,
    batch_size: int,
    device: torch.device,
    labelled: bool,
    *,
    shuffle: bool = True,
) -> Iterator[Batch]:
    """Yield the batches of an epoch, on the device.

    With ``shuffle`` a pair of tensors is shuffled by PyTorch's generator, a single sample that is
    left over is dropped, and a DataLoader's own generators are seeded from PyTorch's.

    Raises
    ------
    InputError
        A batch is no tensor, tuple or mapping of tensors, or lacks labels.
    """
    if is_pair(data):
        inputs, labels = data
        order = torch.randperm(len(inputs)) if shuffle else torch.arange(len(inputs))
        for chosen in order.split(batch_size):
            if shuffle and batch_size > 1 and len(chosen) == 1 < len(order):
                return
            own = None if labels is None else labels[chosen.to(labels.device)].to(device)
            yield (inputs[chosen.to(inputs.device)].to(device),), {}, own
        return
    if shuffle:
        for generator in _generators(data):
            generator.manual_seed(int(torch.randint(2**62, ())))
    for i, batch in enumerate(data):
        yield _unpacked(name, batch, i, device, labelled)


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the random generators that a DataLoader and its samplers hold, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    held = (getattr(owner, "generator", None) for owner in owners)
    return list({id(value): value for value in held if isinstance(value, torch.Generator)}.values())


def _unpacked(name: str, batch: Any, index: int, device: torch.device, labelled: bool) -> Batch:
    """Return a batch's inputs and labels, on the device."""
    _refuse_graph(f"{name}, batch {index}", batch)
    if isinstance(batch, list) and batch:
        _refuse_graph(f"{name}, batch {index}", batch[0])
    if isinstance(batch, Mapping):
        named = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        labels = named.pop("labels", None)
        if named and not (labelled and labels is None):
            return (), named, labels
    parts = [batch] if isinstance(batch, Tensor) else batch
    if isinstance(parts, (tuple, list)) and all(isinstance(part, Tensor) for part in parts):
        moved = [part.to(device) for part in parts]
        if len(moved) > 1:
            return tuple(moved[:-1]), {}, moved[-1]
        if len(moved) == 1 and not labelled:
            return tuple(moved), {}, None
    wanted = (
        "tensors (input, ..., labels) or a mapping with a tensor 'labels'"
        if labelled
        else "a tensor or a tuple"
    )
    raise InputError(f"{name}, batch {index}, must be {wanted}; got {_kind(batch)}")


def _refuse_graph(called: str, value: Any) -> None:
    """Refuse an object of torch_geometric, which does not say what is input and what is label."""
    library = sys.modules.get("torch_geometric.data")
    if library is not None and isinstance(value, library.Data):
        raise InputError(
            f"{called}, is a graph of torch_geometric: for training give its inputs and labels by "
            "name, as [{'x': data.x, 'edge_index': data.edge_index, 'labels': data.y}]"
        )


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        entries = (f"{name!r} ({type(value).__name__})" for name, value in batch.items())
        return f"a mapping with {', '.join(entries) or 'nothing'}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in batch)})"
    return type(batch).__name__


def training_device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    """Return the device to train on; default that of the model, which has parameters.

    Raises
    ------
    InputError
        PyTorch cannot use the device here.
    """
    if device is not None:
        return usable_device(device)
    own = device_of(model)
    assert own is not None, "a model without parameters is refused before"
    return own
