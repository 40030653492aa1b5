"""The reassembled network: blocks and stitches in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from clafusion.reassembly.stitching import Stitch

__all__ = ["Reassembled"]


class Reassembled(nn.Module):
    """Blocks of several models in a row, and stitches between them.

    It computes as in eval mode: blocks are exported graphs, in which dropout is off and BatchNorm
    keeps its statistics. Everything can be trained; :attr:`stitches` alone, too.

    Parameters
    ----------
    parts
        Blocks and stitches, in order.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the last block puts out."""
        first, *others = self.parts
        x = first(*inputs, **named)
        for part in others:
            x = part(x)
        return x

    @property
    def stitches(self) -> tuple[Stitch, ...]:
        """The stitches, which alone were fitted."""
        return tuple(one for one in self.parts if isinstance(one, Stitch))
