"""A GPU that is not there: tensors that say they are elsewhere, and compute on the CPU.

PyTorch's rules of mixing devices are kept: an operation takes tensors of one device, beside numbers
(tensors without dimensions) and indices from the CPU. So what a GPU would refuse is refused here.
The device calls itself "meta", the only one besides the CPU that every build of PyTorch knows.
Setting ``.data`` is not simulated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_COPYING = {"copy_", "_to_copy", "_copy_from"}


class FarTensor(torch.Tensor):
    """Says that it is on the simulated GPU; ``near`` holds its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> FarTensor:
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=GPU,
            requires_grad=False,
        )
        far.near = near
        return far

    def __repr__(self, **_: Any) -> str:
        return f"FarTensor({self.near})"

    def tolist(self) -> Any:
        return self.near.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    far = any(isinstance(one, FarTensor) for one in tensors)
    to = kwargs.get("device")
    if to is not None:
        far = torch.device(to).type == "meta"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        near = [one for one in tensors if not isinstance(one, FarTensor) and one.ndim > 0]
        if name in _INDEXING:  # where the indices lie is free
            near = [one for one in near if any(one is other for other in (args[0], *args[2:]))]
        if far and near and name not in _COPYING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} found {GPU} and cpu"
            )
        if name == "copy_":
            far = isinstance(args[0], FarTensor)
    inner_args, inner_kwargs = tree_map(
        lambda one: one.near if isinstance(one, FarTensor) else one, (args, kwargs)
    )
    result = func(*inner_args, **inner_kwargs)
    if not far:
        return result
    same = {id(one.near): one for one in tensors if isinstance(one, FarTensor)}
    return tree_map(
        lambda one: (
            (same[id(one)] if id(one) in same else FarTensor(one))
            if type(one) is torch.Tensor
            else one
        ),
        result,
    )


class _Moves(TorchDispatchMode):
    """Moves to the GPU, and makes there what is asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if to is not None and torch.device(to).type == "meta":
            return _compute(func, args, kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """Let ``device="meta"`` mean the simulated one."""
    with _Moves():
        yield GPU


def move(model: nn.Module) -> None:
    """Put a model's parameters and buffers there."""
    for module in model.modules():
        for name, one in list(module._parameters.items()):
            if one is not None:
                del module._parameters[name]
                far = FarTensor(one.detach())
                module._parameters[name] = nn.Parameter(far, requires_grad=False)
        for name, one in list(module._buffers.items()):
            if one is not None:
                module._buffers[name] = FarTensor(one)
