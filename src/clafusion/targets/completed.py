"""Networks completed by what changes nothing, where no layer could stand in for what they lack."""

from __future__ import annotations

from collections.abc import Sequence

from clafusion.targets.dense_blocks import with_equal_dense_blocks
from clafusion.targets.equal_experts import with_equal_experts
from clafusion.tracing.model import TracedModel

__all__ = ["completed_models"]


def completed_models(models: Sequence[TracedModel]) -> list[TracedModel]:
    """Bring dense blocks to one length and lists of experts to one number, before alignment."""
    return with_equal_experts(with_equal_dense_blocks(models))
