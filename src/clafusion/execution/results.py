"""Results of operations that a module holds as attributes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["copy_memo", "forget_results", "held_tensors"]

_CONTAINERS = (dict, list, set, OrderedDict)


def copy_memo(model: nn.Module) -> dict[int, Any]:
    """Return what :func:`copy.deepcopy` need not copy of a module, by ids: the memo to give it.

    Of what the module takes for results of operations the same values, without a history: a hook
    such as that of the old weight norm computes a weight before each call and leaves it behind.
    PyTorch copies no such tensor; the next call makes it anew. And new empty containers for empty
    ones: every module has a dozen, for hooks, and they take most of a small copy's time.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for attribute in vars(module).values():
            if type(attribute) in _CONTAINERS and not attribute:
                memo[id(attribute)] = type(attribute)()
            for value in _values(attribute):
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach()
    return memo


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what modules hold as plain attributes, by names, as ``"block.table"``.

    Without what :func:`forget_results` makes them drop. No state dict has these tensors.
    """
    found = {}
    for path, module in model.named_modules():
        if type(module).train is not nn.Module.train:
            continue
        for name, attribute in vars(module).items():
            if name in ("_parameters", "_buffers"):
                continue
            for i, value in enumerate(_values(attribute)):
                if type(value) is Tensor:
                    place = name if value is attribute else f"{name}[{i}]"
                    found[f"{path}.{place}" if path else place] = value
    return found


def forget_results(model: nn.Module) -> None:
    """Let modules drop what they keep of their parameters from call to call, in place.

    As LeViT's attentions do, which keep their biases in eval mode and drop them in ``train``. Other
    weights would not change what such a module computes. What a module never drops stays.
    """
    for module in model.modules():
        if type(module).train is nn.Module.train or not any(map(_keeps, vars(module).values())):
            continue
        modes = {one: one.training for one in module.modules()}
        module.train(True)
        module.train(False)
        for one, mode in modes.items():
            one.training = mode


def _values(attribute: Any) -> Iterator[Any]:
    """Yield an attribute itself, or what a dictionary, list or tuple holds."""
    if isinstance(attribute, Mapping):
        yield from attribute.values()
    elif isinstance(attribute, (list, tuple)):
        yield from attribute
    else:
        yield attribute


def _keeps(attribute: Any) -> bool:
    """Say whether an attribute is a result, or holds nothing but results, by whatever keys."""
    held = list(_values(attribute))
    return bool(held) and all(type(one) is Tensor for one in held)
