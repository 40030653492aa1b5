"""``clafusion explain``: what matches between models, what does not, and why."""

from __future__ import annotations

from collections.abc import Mapping

from clafusion.cli.options import configured
from clafusion.cli.parameters import (
    Archs,
    CheckpointKeys,
    DataFile,
    DataKey,
    MaxLength,
    Mean,
    NamedFiles,
    Scale,
    Shape,
    Std,
    TextColumn,
)
from clafusion.cli.show import print_text

__all__ = ["STAGES", "explain_command"]

STAGES = ("verify",)
"""The fields of the configuration that count for a comparison."""

_ROWS = 8


def explain_command(
    weights: NamedFiles,
    data: DataFile,
    arch: Archs = None,
    checkpoint_key: CheckpointKeys = None,
    data_key: DataKey = None,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    text_column: TextColumn = None,
    max_length: MaxLength = None,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Compare models layer by layer: what matches, what does not, and why. Fuse nothing."""
    from clafusion.cli.inputs import DataOptions
    from clafusion.cli.models import given_models
    from clafusion.interop.inputs import example_of, readable
    from clafusion.reports import explain

    given = given_models(weights, arch, checkpoint_key)
    settings = configured(options)
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    models, samples = given.with_data(data, _ROWS, reading)
    example = example_of(readable(samples, models), next(iter(models.values())))
    print_text(explain(models, example, verify=settings.verify))
