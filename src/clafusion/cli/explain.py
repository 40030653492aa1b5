"""``clafusion explain``: what matches between models, what does not, and why."""

from __future__ import annotations

from collections.abc import Mapping

from clafusion.cli.inputs import (
    Archs,
    CheckpointKeys,
    DataFile,
    DataKey,
    DataOptions,
    Mean,
    NamedFiles,
    Scale,
    Shape,
    Std,
    archs_of,
    keys_of,
    load_models,
    named_files,
    samples_of,
    try_models,
)
from clafusion.cli.options import configured
from clafusion.reports import explain

__all__ = ["STAGES", "explain_command"]

STAGES = ("verify",)
"""The fields of the configuration that count for a comparison."""

_ROWS = 8


def explain_command(
    weights: NamedFiles,
    arch: Archs,
    data: DataFile,
    checkpoint_key: CheckpointKeys = None,
    data_key: DataKey = None,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Compare models layer by layer: what matches, what does not, and why. Fuse nothing."""
    files = named_files(weights)
    settings = configured(options)
    names = list(files)
    models = load_models(files, archs_of(arch, names), keys_of(checkpoint_key, names))
    samples = samples_of(data, _ROWS, DataOptions(data_key, shape, scale, mean, std))
    try_models(models, samples)
    print(explain(models, samples, verify=settings.verify))
