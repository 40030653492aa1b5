"""``clafusion align``: which layers of models belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from clafusion.cli.options import configured, messages_by_flags
from clafusion.cli.parameters import (
    Archs,
    AsJson,
    CheckpointKeys,
    ConfigFile,
    DataFile,
    DataKey,
    Device,
    Limit,
    MaxLength,
    Mean,
    NamedFiles,
    Plot,
    Scale,
    Shape,
    Std,
    TextColumn,
)
from clafusion.cli.show import print_json, print_line, print_text, progress
from clafusion.config import NoCalibration

__all__ = ["STAGES", "align_command"]

STAGES = ("profiling", "alignment", "verify", "seed")
"""The fields of the configuration that count for an alignment."""


def align_command(
    weights: NamedFiles,
    data: DataFile,
    arch: Archs = None,
    checkpoint_key: CheckpointKeys = None,
    config: ConfigFile = None,
    data_key: DataKey = None,
    limit: Limit = 400,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    text_column: TextColumn = None,
    max_length: MaxLength = None,
    device: Device = "cpu",
    plot: Plot = None,
    as_json: AsJson = False,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Show which layers of models belong together, and at what cost. Fuse nothing."""
    from clafusion.cli.inputs import DataOptions, check_plot
    from clafusion.cli.models import given_models
    from clafusion.cli.settings import read_config
    from clafusion.execution.call import usable_device
    from clafusion.fusion import align
    from clafusion.profiling.batches import num_rows
    from clafusion.reports import plot as draw
    from clafusion.reports import summary
    from clafusion.stages import expected_work

    given = given_models(weights, arch, checkpoint_key)
    base = None if config is None else read_config(config, "--config")
    # What only a calibration needs is not recorded.
    settings = replace(configured(options, base), calibration=NoCalibration())
    usable_device(device, "--device")
    check_plot(plot)
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    models, samples = given.with_data(data, limit, reading)
    work = expected_work(num_rows(samples), settings, len(models))
    stages = ("trace", "profile", "importance")
    of_align: dict[str, int] = {one: work[one] for one in stages if one in work}
    with progress(of_align) as report, messages_by_flags():
        aligned = align(models, samples, settings, device=device, progress=report)
    if plot is not None:
        draw(aligned, plot)
    if as_json:
        shown = None if plot is None else str(plot)
        print_json({**aligned.to_dict(), "plot": shown, "seconds": dict(aligned.timings)})
        return
    print_text(summary(aligned))
    print_line("picture", plot)
