"""``clafusion sweep``: the same models fused by every combination of settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clafusion.cli.options import configured, messages_by_flags, output_by_flag
from clafusion.cli.parameters import (
    Archs,
    AsJson,
    CheckpointKeys,
    ConfigFile,
    DataFile,
    DataKey,
    Device,
    Labels,
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
from clafusion.cli.show import pair_progress, print_json, print_line, print_text
from clafusion.config import FusionConfig, options_of
from clafusion.errors import InputError

if TYPE_CHECKING:
    from clafusion.batch.grid import GridPoint
    from clafusion.batch.sweep import SweepResult

__all__ = ["sweep_command"]


def sweep_command(
    weights: NamedFiles,
    data: DataFile,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write a row for each fusion (.csv).", metavar="FILE"),
    ] = None,
    arch: Archs = None,
    checkpoint_key: CheckpointKeys = None,
    weight: Annotated[
        str | None,
        typer.Option(
            help="Of two models: weights of the first one, as 0,0.25,0.5,0.75,1.", metavar="X,X,..."
        ),
    ] = None,
    merge_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            help="All models' weights, as 2:1:1; once for each point.",
            metavar="X:X:...",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="So many seeds, from 0 on, for each point.")
    ] = None,
    config: ConfigFile = None,
    data_key: DataKey = None,
    labels: Labels = None,
    limit: Limit = 2000,
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
    """Fuse the same models by every combination of settings; show quality and its deviation.

    Any setting takes several values between commas, as --calibration repair,least_squares.
    """
    from clafusion.batch.sweep import sweep_grid
    from clafusion.cli.inputs import DataOptions, check_plot, labels_of
    from clafusion.cli.models import given_models
    from clafusion.cli.parsing import merge_weights_of, numbers_of
    from clafusion.execution.call import usable_device
    from clafusion.reports import plot as draw
    from clafusion.weights.atomic import check_output

    given = given_models(weights, arch, checkpoint_key)
    names = list(given.files)
    of_first = numbers_of("--weight", weight, float)
    every = [merge_weights_of("--weights", one, names) or [] for one in merge_weights or []]
    grid = _grid(options, config)
    usable_device(device, "--device")
    check_plot(plot)
    if out is not None:
        check_output(out, (".csv",), "--out", (data, *given.files.values()))
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    models, samples = given.with_data(data, limit, reading)
    of_samples = labels_of(data, labels, limit)
    with pair_progress("fusions") as report, messages_by_flags():
        found = sweep_grid(
            models,
            samples,
            grid,
            weight=of_first,
            weights=every or None,
            seeds=seeds,
            labels=of_samples,
            device=None if device == "cpu" else device,
            progress=report,
        )
    if out is not None:
        with output_by_flag("--out"):
            found.to_csv(out)
    if plot is not None:
        draw(found, plot)
    if as_json:
        print_json({"points": found.table.to_dicts(), "summary": found.summary.to_dicts()})
    else:
        _print(found)
        print_line("written", out)
        print_line("picture", plot)
    if any(one.error is not None for one in found.points):
        raise typer.Exit(1)


def _print(found: SweepResult) -> None:
    from clafusion.reports.text import plain_table

    table = found.summary
    numeric = range(len(found.axes) - ("seed" in found.axes), len(table.columns))
    print_text(plain_table(table.columns, table.cells(), numeric))
    for error in dict.fromkeys(one.error for one in found.points):
        print_line("failed", error)


def _grid(given: Mapping[str, str | bool], file: Path | None) -> list[GridPoint]:
    """Return every combination of what was typed between commas."""
    from clafusion.batch.grid import GridPoint
    from clafusion.cli.settings import read_config

    base = None if file is None else read_config(file, "--config")
    options = {one.path: one for one in options_of(FusionConfig)}
    several: dict[str, list[Any]] = {}
    for path, value in given.items():
        splits = isinstance(value, str) and (path not in options or options[path].kind != "text")
        several[path] = str(value).split(",") if splits else [value]
        if "" in several[path]:
            flag = options[path].flag if path in options else f"--{path}"
            raise InputError(f"{flag} {value} has an empty part between its commas")
    varying = [path for path, values in several.items() if len(values) > 1]
    points = []
    for values in itertools.product(*several.values()):
        typed = dict(zip(several, values, strict=True))
        chosen = {path: typed[path] for path in varying}
        points.append(GridPoint(chosen, configured(typed, base)))
    return points
