"""Two Signatures -> the cost of matching every unit of one with every unit of the other."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.signatures import Signature

__all__ = ["LayerCost", "layer_costs"]

LayerCost = Literal["cka"]


def layer_costs(
    deep: Signature, shallow: Signature, *, metric: LayerCost = "cka"
) -> NDArray[np.float64]:
    """Return ``(m, n)``: one minus linear CKA (Kornblith et al., arXiv 1905.00414) of all pairs."""
    assert metric == "cka"
    a, b = (torch.stack([_centred(g).flatten() for g in one.grams]) for one in (deep, shallow))
    norms = a.norm(dim=1)[:, None] * b.norm(dim=1)[None]
    costs: NDArray[np.float64] = (1 - (a @ b.T) / norms).numpy()
    return costs


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
