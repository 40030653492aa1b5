"""Which entries of a state dict are one tensor under several names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["aliases_of", "identity_of"]


def identity_of(tensor: Tensor) -> Any:
    """Return a value that is equal for tensors that are one: one object, or one and the same view.

    A parameter made from another one's ``.data`` is another object in the same memory. What is
    loaded into one of them is in the other one too. Identities hold as long as the tensors live.
    """
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)
    try:
        place = tensor.data_ptr()
    except RuntimeError:  # a tensor without memory of its own
        return id(tensor)
    if place == 0 or tensor.numel() == 0:
        return id(tensor)
    return str(tensor.device), place, tuple(tensor.shape), tensor.stride(), tensor.dtype


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Return for every tied state entry but the first the name of the first."""
    first: dict[Any, str] = {}
    aliases = {}
    entries = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in entries:
        known = first.setdefault(identity_of(tensor), name)
        if known != name:
            aliases[name] = known
    return aliases
