"""``clafusion reassemble``: blocks of two or more models into one network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from clafusion.cli.options import messages_by_flags, output_by_flag
from clafusion.cli.parameters import (
    Archs,
    AsJson,
    CheckpointKeys,
    ConfigFile,
    DataFile,
    DataKey,
    Device,
    Limit,
    Mean,
    NamedFiles,
    Scale,
    Shape,
    Std,
)
from clafusion.cli.show import print_json, print_line, print_text, progress

__all__ = ["reassemble_command"]


def reassemble_command(
    weights: NamedFiles,
    data: DataFile,
    out: Annotated[
        Path, typer.Option(help="Where to write the network, as an exported program (.pt2).")
    ],
    arch: Archs = None,
    checkpoint_key: CheckpointKeys = None,
    config: ConfigFile = None,
    data_key: DataKey = None,
    limit: Limit = 2000,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "cpu",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw where each block comes from into this file (.png, .svg, .pdf).",
            metavar="FILE",
        ),
    ] = None,
    as_json: AsJson = False,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Cut models of any kinds into blocks, and stitch the best of these into one network."""
    from clafusion.cli.inputs import DataOptions, check_plot
    from clafusion.cli.models import given_models
    from clafusion.cli.settings import plain_settings
    from clafusion.config import ReassemblyConfig
    from clafusion.execution.call import usable_device
    from clafusion.interop.programs import PROGRAM
    from clafusion.reassembly.reassemble import TRIED_BLOCKS, reassemble
    from clafusion.reports import plot as draw
    from clafusion.reports import summary
    from clafusion.weights.atomic import check_output

    given = given_models(weights, arch, checkpoint_key)
    with messages_by_flags():
        settings = plain_settings(ReassemblyConfig, config, options)
    usable_device(device, "--device")
    check_output(out, (PROGRAM,), "--out", (*given.files.values(), data))
    check_plot(plot)
    reading = DataOptions(data_key, shape, scale, mean, std)
    models, samples = given.with_data(data, limit, reading)
    counts = 1 if settings.blocks else len(TRIED_BLOCKS)  # at the most
    work = {"trace": len(models), "stitch": counts * settings.candidates}
    with progress(work) as report, messages_by_flags():
        result = reassemble(models, samples, settings, device=device, progress=report)
    with output_by_flag("--out"):
        result.save(out)
    if plot is not None:
        draw(result, plot)
    if as_json:
        print_json({"out": str(out), "plot": plot and str(plot), **result.to_dict()})
        return
    print_text(summary(result))
    print_line("written", out)
    print_line("picture", plot)
