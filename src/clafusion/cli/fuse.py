"""``clafusion fuse``: two or more models into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

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
    MaxShardSize,
    Mean,
    MemoryLimit,
    NamedFiles,
    Plot,
    Scale,
    Shape,
    Std,
    TextColumn,
)
from clafusion.cli.show import print_json, print_line, print_text, progress, typed_command
from clafusion.errors import InputError

__all__ = ["fuse_command"]


def fuse_command(
    weights: NamedFiles,
    data: DataFile,
    out: Annotated[
        Path,
        typer.Option(
            help="Where to write the fused weights (.safetensors, .pt, .pth; in several files: "
            ".safetensors.index.json) or an exported program (.pt2); of Hugging Face directories a "
            "new directory."
        ),
    ],
    arch: Archs = None,
    merge_weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Each model's weight in the average, as 2,1,1 or 2:1:1; default equal.",
            metavar="X,X,...",
        ),
    ] = None,
    checkpoint_key: CheckpointKeys = None,
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
    processor_of: Annotated[
        str | None,
        typer.Option(
            help="Whose tokenizer, processor and generation config a written directory gets: the "
            "model's name; default that which gives the structure.",
            metavar="NAME",
        ),
    ] = None,
    vocabulary: Annotated[
        str,
        typer.Option(
            help="What to do about directories with unlike vocabularies: same refuses them, "
            "intersection moves common entries and keeps the first model's others.",
            metavar="same|intersection",
        ),
    ] = "same",
    device: Device = "cpu",
    memory_limit: MemoryLimit = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what it would take (time, memory, size); fuse nothing."
        ),
    ] = False,
    out_dtype: Annotated[
        str | None,
        typer.Option(
            help="The type of the written weights: float32, bfloat16 or float16; default the "
            "models' own.",
            metavar="TYPE",
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    plot: Plot = None,
    as_json: AsJson = False,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Fuse two or more models; write the fused weights, or a Hugging Face directory.

    Weights load into the architecture of the deepest model; with --target shallower into that of
    the shallowest, with --target like into that of --target-template. clafusion.load reads the file
    in any case; a record of how it was made lies beside it.
    """
    from clafusion.assessment.evaluation import checked_labels
    from clafusion.cli.inputs import (
        DataOptions,
        archs_of,
        check_plot,
        data_of,
        keys_of,
        labels_of,
        load_models,
        memory_limit_of,
        model_files,
        named_files,
        try_models,
    )
    from clafusion.cli.parsing import merge_weights_of
    from clafusion.cli.settings import read_config
    from clafusion.estimates import calibration_cost, estimate
    from clafusion.execution.call import usable_device
    from clafusion.fusion import fuse
    from clafusion.interop.huggingface import weight_files
    from clafusion.interop.programs import PROGRAM
    from clafusion.interop.records import check_companions
    from clafusion.interop.saving import save_result
    from clafusion.interop.vocabulary import VOCABULARIES
    from clafusion.memory import check_limit
    from clafusion.profiling.batches import num_rows
    from clafusion.reports import plot as draw
    from clafusion.reports import summary
    from clafusion.stages import expected_work
    from clafusion.weights.state_files import WRITABLE, check_weights_output, weight_type

    files = named_files(weights)
    archs = archs_of(arch, files)
    keys = keys_of(checkpoint_key, list(files))
    given = merge_weights_of("--weights", merge_weights, list(files))
    base = None if config is None else read_config(config, "--config")
    settings = configured(options, base)
    usable_device(device, "--device")
    folder = _folder(out, files, processor_of)
    if not folder:
        read = [one for file in files.values() for one in weight_files(file)]
        check_weights_output(out, "--out", read, (data,), (*WRITABLE, PROGRAM))
        check_companions(out, "--out")
    check_plot(plot)
    written_type = None if out_dtype is None else weight_type(out_dtype, "--out-dtype")
    at_most = memory_limit_of(memory_limit, device)
    if vocabulary not in VOCABULARIES:
        raise InputError(f"--vocabulary must be same or intersection; got {vocabulary}")
    if settings.outputs == "both":
        _check_both(folder=folder, has_limit=at_most is not None, vocabulary=vocabulary)
    if vocabulary != "same" and at_most is not None:
        raise InputError("--vocabulary intersection does not go with --memory-limit")
    known = model_files(files, archs, keys, vocabulary)
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    samples = data_of(data, limit, reading, files)
    known_labels = labels_of(data, labels, limit)
    if known_labels is not None:
        known_labels = checked_labels(known_labels, samples)
    if dry_run:
        with messages_by_flags():
            found = estimate(known, samples, settings)
            if at_most is not None:
                check_limit(at_most, found.memory)
        print_json(asdict(found)) if as_json else print_text(str(found))
        return
    work = expected_work(num_rows(samples), settings, len(files))
    cost = calibration_cost(settings, 1.0, 1.0 / len(files))
    with progress(work, cost) as report, messages_by_flags():
        if at_most is not None:
            result = fuse(
                known,
                samples,
                given,
                settings,
                memory_limit=at_most,
                labels=known_labels,
                progress=report,
            )
        else:
            models = load_models(known)
            if vocabulary == "same":  # else the data are of the first model's tokens
                try_models(models, samples)
            result = fuse(
                models,
                samples,
                given,
                settings,
                device=device,
                labels=known_labels,
                vocabulary=vocabulary,
                progress=report,
            )
    with output_by_flag("--out"):
        built_by = save_result(
            result,
            out,
            processor_of=processor_of,
            dtype=written_type,
            max_shard_size=max_shard_size,
            command=typed_command(),
        )
    if plot is not None:
        draw(result, plot)
    if as_json:
        shown = {"out": str(out), "plot": plot and str(plot), "architecture": built_by}
        print_json({**shown, **result.to_dict()})
        return
    print_text(summary(result))
    print_line("written", out if folder else f"{out}, weights of {built_by}")
    print_line("picture", plot)


def _check_both(*, folder: bool, has_limit: bool, vocabulary: str) -> None:
    """Refuse what ``--outputs both`` does not go with."""
    if folder:
        raise InputError(
            "--outputs both makes a network that is none of transformers: give a file as --out, "
            "such as both.pt2"
        )
    if has_limit or vocabulary != "same":
        other = "--memory-limit" if has_limit else f"--vocabulary {vocabulary}"
        raise InputError(f"--outputs both does not go with {other}: leave one out")


def _folder(out: Path, files: Mapping[str, Path], processor_of: str | None) -> bool:
    """Say whether the result becomes a Hugging Face directory; refuse one that cannot be made."""
    from clafusion.interop.programs import PROGRAM
    from clafusion.interop.saving import check_directory
    from clafusion.weights.state_files import WRITABLE

    is_folder = all(one.is_dir() for one in files.values()) and not out.name.lower().endswith(
        (*WRITABLE, PROGRAM)
    )
    if is_folder:
        check_directory(out, "--out")
    if processor_of is None:
        return is_folder
    if not is_folder:
        raise InputError(f"--processor-of is for a directory as --out; {str(out)!r} is a file")
    if processor_of not in files:
        raise InputError(f"--processor-of {processor_of} is none of the models, {', '.join(files)}")
    return True
