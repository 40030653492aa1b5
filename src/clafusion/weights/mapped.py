"""Models whose weights stay in their files until an operation reads them."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FileWeights", "file_backed", "parameters_on_meta"]

_BUILDING = threading.RLock()  # a class's method is replaced, which all threads see
_DONTNEED = 4  # MADV_DONTNEED of Linux: of a file's pages only the mapping goes


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that are built in here keep their parameters on the meta device, without memory.

    Buffers are real: many are computed when a module is built and are in no file.
    """
    register = nn.Module.register_parameter
    known: MutableMapping[Tensor, nn.Parameter] = WeakTensorKeyDictionary()
    builder = threading.get_ident()

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if threading.get_ident() != builder:
            return
        if type(param) is nn.Parameter and not param.is_meta:
            if param not in known:  # one that is registered twice is tied
                known[param] = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            self._parameters[name] = known[param]

    with _BUILDING:
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def file_backed(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of the tensors that lie in mapped files; of none where that cannot be told.

    Linux tells it.
    """
    if not sys.platform.startswith("linux"):
        return frozenset()
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, end = (int(part, 16) for part in span.split("-"))
            ranges.append((start, end))
    return frozenset(
        name
        for name, one in tensors.items()
        if one.device.type == "cpu"
        and one.numel()
        and any(start <= one.data_ptr() and _end(one) <= end for start, end in ranges)
    )


def _end(tensor: Tensor) -> int:
    return tensor.data_ptr() + tensor.numel() * tensor.element_size()


class FileWeights(Mapping[str, Tensor]):
    """The weights of a module, of which those that lie in mapped files take no memory.

    Reading one copies it, so that its pages can go again at once. It is a
    :class:`clafusion.execution.walk.RowState`.

    Parameters
    ----------
    tensors
        The module's parameters, buffers and constants, contiguous. Nobody may change them.
    mapped
        The names of those that lie in mapped files: see :func:`file_backed`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], mapped: Collection[str]) -> None:
        self._tensors, self._mapped = dict(tensors), frozenset(mapped)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._mapped:
            return tensor
        copied = tensor.clone()
        _drop_pages(tensor)
        return copied

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows ``rows``, a vector of indices, of a tensor."""
        found = self._tensors[name][rows]
        if name in self._mapped:
            _drop_pages(self._tensors[name])
        return found

    def drop(self) -> None:
        """Let go of all pages that somebody has read."""
        for name in self._mapped:
            _drop_pages(self._tensors[name])


def _drop_pages(tensor: Tensor) -> None:
    """Unmap the pages that a tensor in a mapped file fills; reading it maps them again."""
    page = mmap.PAGESIZE
    start, end = -(-tensor.data_ptr() // page) * page, _end(tensor) // page * page
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _libc() -> Any:
    return ctypes.CDLL(None)
