"""Presets: whole configurations by one word."""

from __future__ import annotations

from typing import Any

from clafusion.config import FusionConfig, LeastSquares, Profiling, Repair
from clafusion.errors import InputError
from clafusion.settings import Choices

__all__ = ["PRESETS", "preset_of"]

PRESETS = Choices(
    fast="REPAIR in place of least squares, and fewer comparisons: for a first look",
    accurate="least squares and all comparisons on as much data as you give, up to 10,000 inputs",
    paper="CLAFusion step by step as published (arXiv 2110.15538), without a calibration",
)


def preset_of(name: Any) -> FusionConfig:
    """Return the options that a preset stands for.

    Raises
    ------
    InputError
        There is no such preset.
    """
    name = name if isinstance(name, str) else repr(name)
    if name == "fast":
        return FusionConfig(
            profiling=Profiling(alignment_samples=200, matching_rows=2048), calibration=Repair()
        )
    if name == "accurate":
        return FusionConfig(
            profiling=Profiling(alignment_samples=1000, matching_rows=1 << 16),
            calibration=LeastSquares(samples=10_000),
        )
    if name == "paper":
        return FusionConfig.paper()
    raise InputError(f"preset must be one of {', '.join(map(repr, PRESETS))}; got {name!r}")
