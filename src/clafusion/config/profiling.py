"""The options of profiling: what is recorded of every parent on the data."""

from __future__ import annotations

from dataclasses import dataclass

from clafusion.settings import Choices, Settings, choice, count

__all__ = ["LAYER_VALUES", "Profiling"]

LAYER_VALUES = Choices(
    output="the layers' outputs",
    preactivation="their values before the nonlinearity",
)


@dataclass(frozen=True)
class Profiling(Settings):
    """What is recorded of every parent on the data."""

    alignment_samples: int = count(
        400, "inputs over which layers are compared; held in memory at once", least=2
    )
    matching_rows: int = count(
        8192, "pairs of input and position over which channels are compared", least=2
    )
    layer_values: str = choice("output", LAYER_VALUES, "by what layers are compared")
    inputs: int | None = count(None, "profile on this many inputs only; default all", least=2)
