"""How tensors lie in memory: the order of their axes, which some code depends on.

``x.view(x.size(0), -1)`` asks that the axes lie in their own order,
``x.permute(0, 2, 3, 1).view(...)`` that the channels lie innermost (``torch.channels_last``). A
convolution's output lies as its weight does, so that a weight that lies otherwise breaks either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["axes_in_memory", "laid_out", "layouts_of"]


def axes_in_memory(tensor: Tensor) -> tuple[int, ...] | None:
    """Return a tensor's axes as they lie in memory, the outermost first; None for the usual order.

    It is the usual one, too, where elements share memory, as in an expanded tensor.
    """
    if tensor.layout is not torch.strided or tensor.dim() < 2:
        return None
    sizes, strides = tensor.shape, tensor.stride()
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        return None
    usual = tuple(range(tensor.dim()))
    # Of equal strides the axis of one entry is the inner one.
    order = tuple(sorted(usual, key=lambda axis: (-strides[axis], -sizes[axis], axis)))
    return None if order == usual else order


def layouts_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return a module's parameters and buffers that do not lie as usual, with their axes."""
    found: dict[str, tuple[int, ...]] = {}
    for kind in (module.named_parameters, module.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            axes = axes_in_memory(tensor)
            if axes is not None:
                found[name] = axes
    return found


def laid_out(tensor: Tensor, axes: Sequence[int] | None) -> Tensor:
    """Return a copy whose axes lie in memory as :func:`axes_in_memory` says."""
    order = tuple(range(tensor.dim()) if axes is None else axes)
    made = torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)
