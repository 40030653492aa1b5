"""Run modules, list the tensors that they put out, and say where they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.execution.nesting import nested

__all__ = [
    "State",
    "call_model",
    "device_of",
    "flatten_tensors",
    "in_eval_mode",
    "rounding_of",
    "usable_device",
    "without_by_products",
    "without_caches",
]

State: TypeAlias = Mapping[str, Tensor]
"""Parameters and buffers by name, as in ``Module.state_dict()``."""

_BY_PRODUCTS = frozenset(
    "attentions cross_attentions decoder_attentions decoder_hidden_states encoder_attentions "
    "encoder_hidden_states encoder_last_hidden_state hidden_states".split()
)


def call_model(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...] = (),
    *,
    state: State | None = None,
) -> list[Tensor]:
    """Run a module itself and return its output tensors, in order.

    What counts is said by :func:`without_by_products`.

    Parameters
    ----------
    model
        The module.
    inputs
        Its inputs.
    keywords
        The names of the inputs, where the module takes them by keyword; else empty. See
        :mod:`clafusion.execution.nesting` for inputs that are lists or mappings.
    state
        Parameters and buffers to run with; default the module's own.
    """
    arguments = () if keywords else inputs
    named = nested(keywords, inputs) if keywords else {}
    with without_caches(model):
        if state is None:
            outputs = model(*arguments, **named)
        else:
            outputs = torch.func.functional_call(
                model, dict(state), arguments, named, strict=False, tie_weights=True
            )
    return list(flatten_tensors(without_by_products(outputs)))


def without_by_products(outputs: Any) -> Any:
    """Return a model's outputs without the inner values that transformers puts beside them.

    An encoder's states beside a decoder's logits are no answer of the model: who reads them is the
    decoder, whose weights go along with any order of their channels. Where nothing else is put out
    they stay.
    """
    if not isinstance(outputs, Mapping) or _BY_PRODUCTS.isdisjoint(outputs):
        return outputs
    kept = {name: one for name, one in outputs.items() if name not in _BY_PRODUCTS}
    return kept if any(True for _ in flatten_tensors(kept)) else outputs


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let a language model return no cache of keys and values; restore its setting afterwards.

    Networks of transformers return one beside their outputs where ``config.use_cache`` is set.
    """
    found: list[Any] = [getattr(one, "config", None) for one in model.modules()]
    configs = {id(one): one for one in found}
    changed: list[Any] = []
    try:
        for config in configs.values():
            if getattr(config, "use_cache", None) is True:
                with suppress(AttributeError):  # somebody's own, which is frozen
                    config.use_cache = False
                    changed.append(config)
        yield
    finally:
        for config in changed:
            config.use_cache = True


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and every module of it back into its own mode afterwards."""
    modes = {one: one.training for one in model.modules()}
    try:
        with suppress(NotImplementedError):  # an exported program, which has one mode
            model.eval()
        yield
    finally:
        for one, mode in modes.items():
            one.training = mode


def flatten_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nested output, in order."""
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))


def rounding_of(weights: Iterable[Tensor]) -> float:
    """Return how far two ways to compute the same may be apart, relative to the largest output.

    PyTorch has several kernels for one operation, of which a model and its graph may take two.
    """
    types = {one.dtype for one in weights}
    return 3e-2 if types & {torch.float16, torch.bfloat16} else 1e-3


def device_of(model: nn.Module) -> torch.device | None:
    """Return where a module's parameters are; None for a module without any."""
    return next((one.device for one in model.parameters()), None)


def usable_device(device: str | torch.device, name: str = "device") -> torch.device:
    """Return a device that PyTorch can use here; errors call the argument ``name``.

    Raises
    ------
    InputError
        It cannot; the message has PyTorch's reason.
    """
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name} {device!r} cannot be used here: {reason}") from error
    return torch.device(device)
