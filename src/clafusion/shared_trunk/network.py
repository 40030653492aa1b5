"""The network of a shared trunk and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SharedTrunk"]


class SharedTrunk(nn.Module):
    """A trunk, and branches of which each puts out classes of its own.

    It computes as in eval mode: trunk and branches are exported graphs, in which dropout is off and
    BatchNorm keeps its statistics. Everything can be trained.

    Parameters
    ----------
    trunk
        What all branches read; None where each of them reads the inputs.
    branches
        One for each task.
    sizes
        How many classes each task has.
    """

    def __init__(
        self, trunk: nn.Module | None, branches: Sequence[nn.Module], sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.branches = nn.ModuleList(branches)
        self.sizes = tuple(sizes)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return ``(batch, sum(sizes))``: the tasks' outputs, one behind the other."""
        if self.trunk is None:
            return torch.cat([one(*inputs, **named) for one in self.branches], 1)
        x = self.trunk(*inputs, **named)
        return torch.cat([one(x) for one in self.branches], 1)
