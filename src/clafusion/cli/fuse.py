"""``clafusion fuse``: two or more models into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
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

if TYPE_CHECKING:
    from torch import Tensor

    from clafusion.config import FusionConfig
    from clafusion.profiling.batches import Data
    from clafusion.results import FusionResult
    from clafusion.weights.factories import Model, ModelFile

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
    from clafusion.cli.inputs import DataOptions, check_plot, data_of, labels_of, memory_limit_of
    from clafusion.cli.models import given_models
    from clafusion.cli.outputs import check_network_output, check_processor_of
    from clafusion.cli.parsing import merge_weights_of
    from clafusion.cli.settings import read_config
    from clafusion.execution.call import usable_device
    from clafusion.interop.saving import save_result
    from clafusion.reports import plot as draw
    from clafusion.weights.state_files import weight_type

    given = given_models(weights, arch, checkpoint_key)
    files = given.files
    shares = merge_weights_of("--weights", merge_weights, list(files))
    settings = configured(options, None if config is None else read_config(config, "--config"))
    usable_device(device, "--device")
    folder = check_network_output(out, files, (data,))
    check_processor_of(processor_of, files, out, folder=folder)
    check_plot(plot)
    written_type = None if out_dtype is None else weight_type(out_dtype, "--out-dtype")
    at_most = memory_limit_of(memory_limit, device)
    _check_vocabulary(vocabulary, has_limit=at_most is not None)
    if settings.outputs == "both":
        _check_both(folder=folder, has_limit=at_most is not None, vocabulary=vocabulary)
    known = given.opened(vocabulary)
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    samples = data_of(data, limit, reading, files)
    of_samples = labels_of(data, labels, limit)
    if of_samples is not None:
        of_samples = checked_labels(of_samples, samples)
    if dry_run:
        _show_estimate(known, samples, settings, at_most, as_json=as_json)
        return
    where = {"device": device} if at_most is None else {"memory_limit": at_most}
    result = _fused(known, samples, shares, settings, of_samples, vocabulary, where)
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
    _show(result, out, plot, built_by, folder=folder, as_json=as_json)


def _fused(
    known: Mapping[str, ModelFile],
    samples: Data,
    weights: Sequence[float] | None,
    settings: FusionConfig,
    labels: Tensor | None,
    vocabulary: str,
    where: Mapping[str, Any],
) -> FusionResult:
    """Fuse, and show how far it is. With a limit of memory the models are not loaded as wholes."""
    from clafusion.cli.models import load_models, try_models
    from clafusion.estimates import calibration_cost
    from clafusion.fusion import fuse
    from clafusion.profiling.batches import num_rows
    from clafusion.stages import expected_work

    work = expected_work(num_rows(samples), settings, len(known))
    cost = calibration_cost(settings, 1.0, 1.0 / len(known))
    with progress(work, cost) as report, messages_by_flags():
        models: Mapping[str, Model] = known
        if "memory_limit" not in where:
            models = loaded = load_models(known)
            if vocabulary == "same":  # else the data are of the first model's tokens
                try_models(loaded, samples)
        return fuse(
            models,
            samples,
            weights,
            settings,
            labels=labels,
            vocabulary=vocabulary,
            progress=report,
            **where,
        )


def _show_estimate(
    known: Mapping[str, ModelFile],
    samples: Data,
    settings: FusionConfig,
    at_most: int | None,
    *,
    as_json: bool,
) -> None:
    """Say what a fusion would take; refuse one that needs more memory than it may have."""
    from clafusion.estimates import estimate
    from clafusion.memory import check_limit

    with messages_by_flags():
        found = estimate(known, samples, settings)
        if at_most is not None:
            check_limit(at_most, found.memory)
    print_json(asdict(found)) if as_json else print_text(str(found))


def _show(
    result: FusionResult,
    out: Path,
    plot: Path | None,
    built_by: str,
    *,
    folder: bool,
    as_json: bool,
) -> None:
    from clafusion.reports import summary

    if as_json:
        shown = {"out": str(out), "plot": plot and str(plot), "architecture": built_by}
        print_json({**shown, **result.to_dict()})
        return
    print_text(summary(result))
    print_line("written", out if folder else f"{out}, weights of {built_by}")
    print_line("picture", plot)


def _check_vocabulary(vocabulary: str, *, has_limit: bool) -> None:
    """Refuse a word that ``--vocabulary`` does not have, or that goes with no limit of memory."""
    from clafusion.interop.vocabulary import VOCABULARIES

    if vocabulary not in VOCABULARIES:
        raise InputError(f"--vocabulary must be same or intersection; got {vocabulary}")
    if vocabulary != "same" and has_limit:
        raise InputError("--vocabulary intersection does not go with --memory-limit")


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
