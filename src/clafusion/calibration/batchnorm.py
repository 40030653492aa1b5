"""Estimate the running statistics of BatchNorms again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clafusion.execution.call import call_model, device_of
from clafusion.profiling.batches import Data, batches

__all__ = ["reset_batchnorm"]


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
    modes = {one: one.training for one in model.modules()}
    momenta = [one.momentum for one in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for inputs in batches(data, example_inputs, keywords, device=device):
                call_model(model, inputs, keywords)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for one, mode in modes.items():
            one.training = mode
