"""``clafusion evaluate``: how good networks are on data with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clafusion.cli.parameters import (
    AsJson,
    CheckpointKeys,
    DataFile,
    DataKey,
    Limit,
    MaxLength,
    Mean,
    Scale,
    Shape,
    Std,
    TextColumn,
)
from clafusion.cli.show import print_json, print_text

__all__ = ["evaluate_command"]


def evaluate_command(
    weights: Annotated[
        list[str],
        typer.Argument(
            help="One or more networks: what fuse wrote, Hugging Face directories, exported "
            "programs (.pt2), or weights with --arch. They are called by their files, or as "
            "NAME=FILE says.",
            metavar="FILE",
        ),
    ],
    data: DataFile,
    labels: Annotated[
        str, typer.Option(help="Which array of the data file holds the labels.", metavar="KEY")
    ],
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            help="What makes the networks, MODULE:FACTORY: once for all, or once for each. Without "
            "it the files say what builds them.",
            metavar="MODULE:FACTORY",
        ),
    ] = None,
    checkpoint_key: CheckpointKeys = None,
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="Run factories that the files name."),
    ] = False,
    data_key: DataKey = None,
    limit: Limit = 10000,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    text_column: TextColumn = None,
    max_length: MaxLength = None,
    axis: Annotated[int, typer.Option(help="The axis of the classes in the outputs.")] = -1,
    as_json: AsJson = False,
) -> None:
    """Show accuracy and loss of networks on data with labels, of several also of their mean."""
    from clafusion.cli.inputs import DataOptions, data_of, labels_of
    from clafusion.cli.models import keys_of, loaded_files, try_models
    from clafusion.quality import evaluate
    from clafusion.reports.quality_tables import evaluation_summary

    files = loaded_files(weights, arch)
    keys = keys_of(checkpoint_key, list(files))
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    folders = {name: one.path for name, one in files.items() if Path(one.path).is_dir()}
    samples = data_of(data, limit, reading, folders)
    known = labels_of(data, labels, limit)
    models = {name: one.load(keys[name], trust_code=trust_code) for name, one in files.items()}
    try_models(models, samples)
    found = evaluate(models, samples, known, axis=axis)
    if as_json:
        print_json(found.to_dict())
    else:
        print_text(evaluation_summary(found))
