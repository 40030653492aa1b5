"""Copies of modules: deep ones, and ones that share the parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from clafusion.errors import InputError, UnsupportedOpError
from clafusion.execution.results import copy_memo, forget_results

__all__ = ["copied", "evaluation_copy", "parameters_protected"]

_CACHES = ("_cached_edge_index", "_cached_adj_t", "_cached_x")
"""What layers of torch_geometric keep of the graph that they last ran on."""


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a module.

    Raises
    ------
    InputError
        The module cannot be copied; the message says what to take off.
    """
    return _copied(model, {})


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a module, in eval mode, that shares its parameters but nothing else.

    It takes no memory for the weights. Whoever runs it must not let it change them: see
    :func:`parameters_protected`.

    Raises
    ------
    InputError
        As for :func:`copied`.
    """
    made = _copied(model, {id(one): one for one in model.parameters()}).eval()
    forget_results(made)
    return made


def _copied(model: nn.Module, shared: dict[int, Any]) -> nn.Module:
    try:
        made = copy.deepcopy(model, shared | copy_memo(model))
    except Exception as error:
        shown = next(iter(str(error).strip().splitlines()), repr(error))
        raise InputError(
            f"{type(model).__name__} cannot be copied ({shown}). Take off what no copy can be made "
            "of, such as compiled functions, locks, or lists with results of forward"
        ) from error
    for one in made.modules():  # as of GCNConv(cached=True): edges of the last graph, not of this
        for name in _CACHES:
            if getattr(one, name, None) is not None:
                setattr(one, name, None)
    return made


def parameters_protected(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which an operation that would change a parameter raises instead.

    Raises
    ------
    UnsupportedOpError
        From within: the message names the operation and the parameter.
    """
    return _Protection({_memory(one): name for name, one in model.named_parameters()})


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Protection(TorchDispatchMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                for one in pytree.tree_leaves(value):
                    if isinstance(one, Tensor) and _memory(one) in self._names:
                        raise UnsupportedOpError(
                            f"the model's forward changes its parameter "
                            f"{self._names[_memory(one)]!r} ({func._schema.name}): keep what a "
                            "call changes in a buffer that it does not read again"
                        )
        return func(*args, **kwargs)
