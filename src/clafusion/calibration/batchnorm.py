"""Estimate the running statistics of BatchNorms again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from clafusion.execution.call import call_model, device_of, in_eval_mode
from clafusion.profiling.batches import Data, batches
from clafusion.tracing.graphs import EDGES

__all__ = ["reset_batchnorm"]

_ENOUGH = 64  # rows that come one by one


def reset_batchnorm(
    model: nn.Module,
    data: Data,
    example_inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...] = (),
) -> None:
    """Re-estimate the running statistics of every BatchNorm, in place, from data.

    The mean over all batches of each batch's mean and (unbiased) variance, as PyTorch's
    ``momentum=None`` does. Models without BatchNorm stay as they are.
    """
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    norms = [one for one in norms if one.running_mean is not None]
    if not norms:
        return
    device = device_of(model)
    momenta = [one.momentum for one in norms]
    with in_eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            with torch.no_grad():
                read = batches(data, example_inputs, keywords, device=device)
                is_graph = EDGES in keywords
                for inputs in read if is_graph else _without_lone_rows(read):
                    if is_graph and len(inputs[0]) == 1:
                        continue  # a single node has no variance
                    call_model(model, inputs, keywords)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _without_lone_rows(read: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches, each single row joined to those before or behind it: it has no variance."""
    held: list[tuple[Tensor, ...]] = []  # at most two
    for inputs in read:
        is_lone = len(inputs[0]) == 1
        if held and len(held[-1][0]) < (_ENOUGH if is_lone else 2):
            held[-1] = _joined(held[-1], inputs)
        else:
            held.append(inputs)
        if len(held) > 1 and len(held[-1][0]) > 1:
            yield held.pop(0)
    if len(held) > 1:
        held = [_joined(*held)]
    yield from held


def _joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(one) for one in zip(first, second, strict=True))
