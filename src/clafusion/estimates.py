"""What a fusion will take, told before it runs: time, memory, and how much it writes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clafusion.assessment.parts import most_assessed, parts_of
from clafusion.config import FusionConfig, LeastSquares, NoCalibration, Repair
from clafusion.interop.inputs import example_of, readable
from clafusion.memory import NeededMemory, needed_memory, shown
from clafusion.profiling.batches import Data, num_rows, rows_side_by_side
from clafusion.stages import ExampleInputs, config_from, named_models, traced_parent
from clafusion.tracing.model import TracedModel
from clafusion.weights.factories import Model

__all__ = ["FusionEstimate", "calibration_cost", "estimate"]

_BY_RATE = 2e8  # steps of an assignment in a second, for groups whose channels are matched


@dataclass(frozen=True)
class FusionEstimate:
    """What a fusion will take, about.

    Attributes
    ----------
    seconds
        Stage -> seconds on this machine, from one timed pass over the example inputs.
    memory
        What the process will hold with ``memory_limit``, which may be no less than its ``peak``.
    result_bytes
        The size of the fused weights, in memory and in a file. A fusion with ``memory_limit``
        writes temporary files of twice that size.
    num_inputs
        How many inputs the fusion sees; those that are held out for the assessment come on top.
    """

    seconds: Mapping[str, float]
    memory: NeededMemory
    result_bytes: int
    num_inputs: int

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.total_seconds), 60)
        stages = ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items())
        needed = ", ".join(f"{name} {shown(value)}" for name, value in self.memory.stages.items())
        return (
            f"time     about {minutes} min {seconds} s ({stages})\n"
            f"memory   about {shown(self.memory.peak)} with a memory limit: "
            f"{shown(self.memory.held)} held now; {needed}\n"
            f"written  {shown(self.result_bytes)} of fused weights"
        )


def estimate(
    models: Sequence[Model] | Mapping[str, Model],
    data: Data,
    config: FusionConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    **overrides: Any,
) -> FusionEstimate:
    """Say what :func:`clafusion.fuse` will take: time, memory, and how much it writes.

    The models are traced and proved, and each runs on the example inputs once more with a clock.
    The figures are for the CPU, and are good to about a factor of two.

    Parameters and errors are those of :func:`clafusion.fuse`.

    Examples
    --------
    >>> print(clafusion.estimate([small, large], tokens))  # doctest: +SKIP
    """
    config = config_from(config, overrides, ("example_inputs",))
    named = named_models(models)
    data = readable(data, named)
    if example_inputs is None:
        example_inputs = example_of(data, next(iter(named.values())))
    started = time.perf_counter()
    traced = [traced_parent(name, one, example_inputs, config) for name, one in named.items()]
    tracing = time.perf_counter() - started
    parts = parts_of(data, traced, config.assessment)
    count = num_rows(parts.kept)
    assessed = min(num_rows(parts.assessed), most_assessed(held_out=parts.held_out))
    at_once = rows_side_by_side(parts.kept, config.profiling.alignment_samples)
    passes = [_seconds_of_an_input(one) for one in traced]
    every, largest = sum(passes), max(passes)
    steps = sum(min(one.size, 1 << 13) ** 2.5 for model in traced for one in model.groups)
    return FusionEstimate(
        seconds={
            "trace": tracing,
            "profile": every * count,
            "match": 2 * every * at_once + steps / _BY_RATE,
            "calibrate": calibration_cost(config, every, largest) * count,
            "assess": (every + largest) * assessed,
        },
        memory=needed_memory(traced, at_once, config),
        result_bytes=(max if config.outputs == "same" else sum)(
            [
                sum(one.numel() * one.element_size() for one in model.module_state().values())
                for model in traced
            ]
        ),
        num_inputs=count,
    )


def calibration_cost(config: FusionConfig, every: float, largest: float) -> float:
    """Return the seconds that a calibration takes for each input.

    ``every`` are those of a pass of all models, ``largest`` those of the largest one alone.
    """
    method = config.used_calibration
    if isinstance(method, NoCalibration):
        return 0.0
    if isinstance(method, LeastSquares):
        return 2.5 * (every + 2 * largest)  # anchors are tried; equations take as long as passes
    return (1.5 if isinstance(method, Repair) else 1.0) * largest


def _seconds_of_an_input(model: TracedModel) -> float:
    inputs = model.example_inputs
    with torch.no_grad():
        model.run(inputs)
        started = time.perf_counter()
        model.run(inputs)
    return (time.perf_counter() - started) / inputs[0].size(0)
