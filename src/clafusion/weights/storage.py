"""Where a fusion keeps the weights that it makes: in memory, or in files that are gone with it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Protocol
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.execution.layouts import axes_in_memory
from clafusion.weights.build import with_state, with_tensors

__all__ = ["InFiles", "InMemory", "Spill", "Storage"]

_ALIGNED = mmap.ALLOCATIONGRANULARITY  # where a map may begin
_LAID_OUT = " laid out"  # behind the name of a tensor


class Storage(Protocol):
    """Where the weights that a fusion makes are kept."""

    def empty(self) -> MutableMapping[str, Tensor]:
        """Return a state without tensors, to be filled."""
        ...

    def model(
        self, module: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, str]
    ) -> nn.Module:
        """Return a copy of a module that holds ``state``, as :func:`with_state` does."""
        ...


class InMemory:
    """Weights in memory."""

    def empty(self) -> MutableMapping[str, Tensor]:
        """Return a dictionary."""
        return {}

    def model(
        self, module: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, str]
    ) -> nn.Module:
        """Return a copy of a module that holds ``state``, as :func:`with_state` does."""
        return with_state(module, state, aliases)


class InFiles:
    """Weights in temporary files, in the folder that ``TMPDIR`` names; parameters are mapped."""

    def empty(self) -> Spill:
        """Return a state whose tensors go to files."""
        return Spill()

    def model(
        self, module: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, str]
    ) -> nn.Module:
        """Return a copy of a module that holds ``state``, its parameters mapped from files."""
        spill = state if isinstance(state, Spill) else self.empty()
        names = dict(module.named_parameters())
        others: dict[str, Tensor] = {}
        for name in state:
            if name not in names:
                others[name] = state[name]
            elif state is not spill:
                spill[name] = state[name]
        mapped = {
            name: spill.mapped(name, axes_in_memory(one))
            for name, one in names.items()
            if name in spill
        }
        return with_tensors(module, mapped, others, aliases)


class Spill(MutableMapping[str, Tensor]):
    """Tensors by name in a file without a name; reading one reads it from there.

    The system removes the file when the tensors are gone, however the process ends.

    Raises
    ------
    InputError
        A tensor cannot be written, for example on a full disk.
    """

    def __init__(self) -> None:
        with _named_errors():
            self._file = tempfile.TemporaryFile(prefix="clafusion-", buffering=0)  # noqa: SIM115
        finalize(self, self._file.close)  # maps of it live on
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        place, left = self._end, memoryview(values.data)
        with _named_errors():
            while len(left):
                left = left[os.pwrite(self._file.fileno(), left, place + values.size - len(left)) :]
        self._places[name] = place, tensor.shape, tensor.dtype
        self._end = -(-(place + values.size) // _ALIGNED) * _ALIGNED

    def __getitem__(self, name: str) -> Tensor:
        place, shape, dtype = self._places[name]
        values = np.empty(shape.numel() * dtype.itemsize, np.uint8)
        left = memoryview(values.data)
        while len(left):
            left = left[os.preadv(self._file.fileno(), [left], place + values.size - len(left)) :]
        return torch.from_numpy(values).view(dtype).view(shape)

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def mapped(self, name: str, axes: Sequence[int] | None = None) -> Tensor:
        """Return a tensor that stays in the file until it is read. Changes stay in memory.

        With ``axes`` they lie in memory in that order: see :mod:`clafusion.execution.layouts`.
        """
        if axes is not None:
            self[name + _LAID_OUT] = self[name].permute(*axes)
            found = self.mapped(name + _LAID_OUT)
            del self[name + _LAID_OUT]
            return found.permute(*(axes.index(i) for i in range(len(axes))))
        place, shape, dtype = self._places[name]
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        size = shape.numel() * dtype.itemsize
        values = np.memmap(self._file, np.uint8, "c", place, (size,))
        return torch.from_numpy(values).view(dtype).view(shape)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"what a fusion makes cannot be kept in {tempfile.gettempdir()!r}: "
            f"{error.strerror or error}; let TMPDIR name a folder with more space"
        ) from error
