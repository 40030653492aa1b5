"""States whose tensors are made when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

__all__ = ["LazyState", "overlaid"]

Key = TypeVar("Key")


class LazyState(Mapping[Key, Tensor]):
    """Tensors by name, or by another key, each made anew whenever it is read: none has to be held.

    Parameters
    ----------
    names
        The names, in order.
    make
        Returns the tensor of a name. It may be a tensor that others hold, too: do not change it.
    """

    def __init__(self, names: Iterable[Key], make: Callable[[Key], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: Key) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def overlaid(below: Mapping[Key, Tensor], above: Mapping[Key, Tensor]) -> LazyState[Key]:
    """Return the tensors of two states, read from ``above`` where that has them."""
    names = [*below, *(name for name in above if name not in below)]
    return LazyState(names, lambda name: above[name] if name in above else below[name])
