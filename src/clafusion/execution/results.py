"""Results of operations that a module holds as attributes."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["kept_results"]


def kept_results(model: nn.Module) -> dict[int, Tensor]:
    """Return what a deep copy takes for results of operations: the same values, without a history.

    A hook such as that of the old weight norm computes a weight before each call and leaves it
    behind. PyTorch copies no such tensor; the next call makes it anew.

    Returns
    -------
    dict
        By the tensors' ids: a memo for :func:`copy.deepcopy`.
    """
    return {
        id(value): value.detach()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
