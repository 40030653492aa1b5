"""Results of operations that a module holds as attributes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["forget_results", "kept_results"]


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


def forget_results(model: nn.Module) -> None:
    """Let modules drop what they keep of their parameters from call to call, in place.

    As LeViT's attentions do, which keep their biases in eval mode and drop them in ``train``. Other
    weights would not change what such a module computes.
    """
    for module in model.modules():
        if type(module).train is nn.Module.train or not any(map(_keeps, vars(module).values())):
            continue
        modes = {one: one.training for one in module.modules()}
        module.train(True)
        module.train(False)
        for one, mode in modes.items():
            one.training = mode


def _keeps(value: object) -> bool:
    """Say whether an attribute is a dictionary of results, by whatever keys."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(type(one) is Tensor for one in value.values())
    )
