"""``clafusion merge``: models that were trained from one base into one."""

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
    DataKey,
    Device,
    Limit,
    MaxLength,
    MaxShardSize,
    Mean,
    MemoryLimit,
    Scale,
    Shape,
    Std,
    TextColumn,
)
from clafusion.cli.show import print_json, print_line, print_text, progress, typed_command
from clafusion.errors import InputError

__all__ = ["merge_command"]


def merge_command(
    base: Annotated[
        str,
        typer.Argument(
            help="What the models were trained from: a Hugging Face directory, or weights.",
            metavar="BASE",
        ),
    ],
    models: Annotated[
        list[str],
        typer.Argument(
            help="One or more models. They are called first, second and so on, or as NAME=FILE "
            "says.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Where to write the merged weights (.safetensors, .pt, .pth; in several files: "
            ".safetensors.index.json), an exported program (.pt2, with --data), or of Hugging Face "
            "directories a new directory."
        ),
    ],
    arch: Archs = None,
    merge_weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Each model's weight, as 2,1,1 or 2:1:1; default equal.",
            metavar="X,X,...",
        ),
    ] = None,
    checkpoint_key: CheckpointKeys = None,
    config: ConfigFile = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Unlabelled inputs of all tasks, to calibrate by and to assess the result; "
            "without them nothing is run. Or once for each model, as NAME=FILE: inputs of its own "
            "task.",
            metavar="[NAME=]FILE",
        ),
    ] = None,
    data_key: DataKey = None,
    limit: Limit = 2000,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    text_column: TextColumn = None,
    max_length: MaxLength = None,
    device: Device = "cpu",
    memory_limit: MemoryLimit = None,
    out_dtype: Annotated[
        str | None,
        typer.Option(
            help="The type of the written weights: float32, bfloat16 or float16; default the "
            "base's own.",
            metavar="TYPE",
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    as_json: AsJson = False,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Merge models that were trained from one base, by what training has added to its weights."""
    from clafusion.cli.inputs import DataOptions, data_of, memory_limit_of
    from clafusion.cli.models import given_models, task_files
    from clafusion.cli.outputs import check_network_output
    from clafusion.cli.parsing import merge_weights_of
    from clafusion.cli.settings import plain_settings
    from clafusion.config import MergeConfig
    from clafusion.execution.call import usable_device
    from clafusion.one_origin.merge import merge
    from clafusion.one_origin.result import BASE
    from clafusion.reports.quality_tables import merge_summary
    from clafusion.weights.state_files import weight_type

    given = given_models(models, arch, checkpoint_key, base)
    files = given.files
    names = [name for name in files if name != BASE]
    shares = merge_weights_of("--weights", merge_weights, names)
    with messages_by_flags():
        settings = plain_settings(MergeConfig, config, options)
    usable_device(device, "--device")
    at_most = memory_limit_of(memory_limit, device)
    of_tasks = task_files(data or [], names)
    data_files = tuple(of_tasks.values())
    check_network_output(out, files, data_files)
    if not data_files:
        _check_no_program(out)
    written_type = None if out_dtype is None else weight_type(out_dtype, "--out-dtype")
    known = given.opened()
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    samples = {name: data_of(one, limit, reading, files) for name, one in of_tasks.items()}
    with progress({"merge": 1}) as report, messages_by_flags():
        result = merge(
            known[BASE],
            {name: known[name] for name in names},
            samples.get("", samples or None),
            shares,
            settings,
            device=None if device == "cpu" else device,
            memory_limit=at_most,
            progress=report,
        )
    with output_by_flag("--out"):
        result.save(out, dtype=written_type, max_shard_size=max_shard_size, command=typed_command())
    if as_json:
        print_json({"out": str(out), **result.to_dict()})
        return
    print_text(merge_summary(result))
    print_line("written", out)


def _check_no_program(out: Path) -> None:
    """Refuse a program as ``--out``, which cannot be exported without inputs."""
    from clafusion.interop.programs import PROGRAM
    from clafusion.weights.state_files import WRITABLE

    if out.name.lower().endswith(PROGRAM):
        raise InputError(
            f"--out {str(out)!r} would be an exported program, which needs inputs to export with: "
            f"give --data, or a file of weights ({', '.join(WRITABLE)})"
        )
