"""``clafusion fuse``: two or more models into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from clafusion.alignment.models import AlignedModels
from clafusion.cli.facts import fusion_facts
from clafusion.cli.inputs import (
    Archs,
    AsJson,
    CheckpointKeys,
    ConfigFile,
    DataFile,
    DataKey,
    DataOptions,
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
    archs_of,
    check_plot,
    data_of,
    keys_of,
    load_models,
    model_files,
    named_files,
    try_models,
)
from clafusion.cli.options import configured, messages_by_flags
from clafusion.cli.parsing import merge_weights_of
from clafusion.cli.settings import read_config
from clafusion.cli.show import print_json, print_line, progress, typed_command
from clafusion.config import FusionConfig, Iterative, Like
from clafusion.errors import InputError, StructureError
from clafusion.estimates import estimate
from clafusion.execution.call import usable_device
from clafusion.execution.lazy import LazyState
from clafusion.fusion import align, fuse, fuse_aligned
from clafusion.interop.huggingface import weight_files
from clafusion.interop.resolver import holds_itself, model_file
from clafusion.interop.saving import check_directory
from clafusion.interop.vocabulary import VOCABULARIES, with_one_vocabulary
from clafusion.memory import bytes_of, check_limit
from clafusion.profiling.batches import Data, Progress, num_rows
from clafusion.reports import plot as draw
from clafusion.reports import summary
from clafusion.results import FusionResult
from clafusion.stages import expected_inputs, traced_template
from clafusion.tracing.copies import copied
from clafusion.weights.factories import ModelFile, build_model, model_without_weights
from clafusion.weights.round_trip import check_round_trip
from clafusion.weights.state_files import (
    WRITABLE,
    check_weights_output,
    in_type,
    save_model,
    weight_type,
)

__all__ = ["fuse_command"]

_TEMPLATE = "the template"  # what messages call one that a file of settings names


def fuse_command(
    weights: NamedFiles,
    data: DataFile,
    out: Annotated[
        Path,
        typer.Option(
            help="Where to write the fused weights (.safetensors, .pt, .pth; in several files: "
            ".safetensors.index.json); of Hugging Face directories a new directory."
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
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Stay within this much memory, as 6GB: weights stay in files, those made in "
            "temporary ones (see TMPDIR).",
            metavar="AMOUNT",
        ),
    ] = None,
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
    plot: Plot = None,
    as_json: AsJson = False,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Fuse two or more models; write the fused weights, or a Hugging Face directory.

    Weights load into the architecture of the deepest model; with --target shallower into that of
    the shallowest, with --target like into that of --target-template.
    """
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
        check_weights_output(out, "--out", read, (data,))
    check_plot(plot)
    written_type = None if out_dtype is None else weight_type(out_dtype, "--out-dtype")
    at_most = None if memory_limit is None else bytes_of(memory_limit, "--memory-limit")
    if at_most is not None and device != "cpu":
        raise InputError(f"--memory-limit is for the CPU; --device is {device}: leave one out")
    if vocabulary not in VOCABULARIES:
        raise InputError(f"--vocabulary must be same or intersection; got {vocabulary}")
    if vocabulary != "same" and at_most is not None:
        raise InputError("--vocabulary intersection does not go with --memory-limit")
    known = model_files(files, archs, keys, vocabulary)
    reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
    samples = data_of(data, limit, reading, files)
    if dry_run:
        with messages_by_flags():
            found = estimate(known, samples, settings)
            if at_most is not None:
                check_limit(at_most, found.memory)
        print_json(asdict(found)) if as_json else print(found)
        return
    count = num_rows(samples)
    check = partial(_check_depths, config=settings, is_folder=folder)
    with progress(count, expected_inputs(count, settings)) as report, messages_by_flags():
        if at_most is not None:
            result = _fused_within(at_most, known, samples, given, settings, report, check)
        else:
            result = _fused(known, samples, given, settings, device, report, vocabulary, check)
    built_by = type(result.model).__name__ if folder else _architecture(result, archs, options)
    if folder:
        result.save(out, processor_of=processor_of, dtype=written_type, command=typed_command())
    else:
        _write_weights(result, out, built_by, archs, written_type, at_most is not None)
    if plot is not None:
        draw(result, plot)
    if as_json:
        shown = {"out": str(out), "plot": plot and str(plot), "architecture": built_by}
        print_json({**shown, **fusion_facts(result)})
        return
    print(summary(result))
    print_line("written", out if folder else f"{out}, weights of {built_by}")
    print_line("picture", plot)


def _folder(out: Path, files: Mapping[str, Path], processor_of: str | None) -> bool:
    """Say whether the result becomes a Hugging Face directory; refuse one that cannot be made."""
    is_folder = all(one.is_dir() for one in files.values()) and not out.name.lower().endswith(
        WRITABLE
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


def _write_weights(
    result: FusionResult,
    out: Path,
    built_by: str,
    archs: Mapping[str, str],
    dtype: torch.dtype | None,
    in_files: bool,
) -> None:
    """Write a file of weights that loads and computes what the result computes."""
    if dtype is not None:
        result = _rounded(result, dtype)
    save_model(result.model, out, _round_trip(result, built_by, archs, in_files), dtype=dtype)


def _fused(
    files: Mapping[str, ModelFile],
    samples: Data,
    weights: list[float] | None,
    config: FusionConfig,
    device: str,
    report: Progress | None,
    vocabulary: str,
    check: Callable[[AlignedModels], None],
) -> FusionResult:
    """Fuse; refuse what no architecture could load as soon as the alignment shows it."""
    models = load_models(files)
    own_entries = None
    if vocabulary != "same":
        moved, own_entries = with_one_vocabulary(models, vocabulary)
        models = {name: one for name, one in moved.items() if isinstance(one, nn.Module)}
    try_models(models, samples)
    if isinstance(config.merging.strategy, Iterative) and len(models) > 2:
        result = fuse(models, samples, weights, config, device=device, progress=report)
        for step in result.steps:
            check(step.aligned)
        return result
    aligned = align(models, samples, config, device=device, progress=report)
    check(aligned)
    template = None
    if isinstance(config.target, Like):
        like = aligned.profiles[0].traced
        template = traced_template(config, like.model, like.example_inputs)
    return fuse_aligned(
        aligned,
        samples,
        weights,
        config,
        template=template,
        own_entries=own_entries,
        progress=report,
    )


def _fused_within(
    limit: int,
    models: Mapping[str, ModelFile],
    samples: Data,
    weights: list[float] | None,
    config: FusionConfig,
    report: Progress | None,
    check: Callable[[AlignedModels], None],
) -> FusionResult:
    """Fuse with a limit of memory; refuse what no architecture could load."""
    result = fuse(models, samples, weights, config, memory_limit=limit, progress=report)
    for step in result.steps or (result,):
        check(step.aligned)
    return result


def _rounded(result: FusionResult, dtype: torch.dtype) -> FusionResult:
    """Return a result with the weights that the written ones will be, in the models' own types."""
    model = result.model
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    narrow = in_type({name: one.detach() for name, one in own.items()}, dtype)
    state = LazyState(own, lambda name: narrow[name].to(own[name].dtype))
    return replace(result, model=result.problem.storage.model(model, state, {}))


def _check_depths(aligned: AlignedModels, config: FusionConfig, is_folder: bool) -> None:
    """Refuse weights for which nobody has an architecture; a directory's config describes one."""
    gaps = any(one.alignment.unmatched_shallow for one in aligned.pairs)
    if gaps and not (is_folder or isinstance(config.target, Like)):
        # messages_by_flags says how the target is typed
        raise StructureError(
            "of two models each is the deeper one somewhere, and so the fused weights load into "
            "nobody's architecture; give target=Like(module), which has the layers of all"
        )


def _architecture(
    result: FusionResult, archs: Mapping[str, str], options: Mapping[str, str | bool]
) -> str:
    """Say into which architecture the fused weights load."""
    if isinstance(result.config.target, Like):
        return str(options.get("target.template", _TEMPLATE))
    shapes = _shapes(result.model)
    aligned = (result.steps or (result,))[0].aligned
    reference = aligned.names[aligned.reference]
    owners = [
        name
        for name, profile in zip(aligned.names, aligned.profiles, strict=True)
        if _shapes(profile.traced.model) == shapes
    ]
    if owners:
        return archs[reference if reference in owners else owners[0]]
    return f"{archs[reference]} with other widths"


def _round_trip(
    result: FusionResult, built_by: str, archs: Mapping[str, str], in_files: bool
) -> Callable[[Mapping[str, Any]], None] | None:
    """Return the check of what is written; None where no factory builds such a model.

    With ``in_files`` the model that it builds holds no weights of its own.
    """
    target = result.config.target
    build: Callable[[], nn.Module]
    whole = {one for one in archs.values() if holds_itself(one)}
    if isinstance(target, Like) and built_by == _TEMPLATE:
        assert isinstance(target.template, nn.Module), "else nothing would have been fused"
        build = partial(copied, target.template)
    elif built_by in whole and (file := model_file(built_by)) is not None:
        build, in_files = file.build, False
    elif isinstance(target, Like) or built_by in archs.values():
        build = partial(model_without_weights if in_files else build_model, built_by)
    else:
        return None
    aligned = (result.steps or (result,))[0].aligned
    example = aligned.profiles[aligned.reference].traced

    def check(state: Mapping[str, Any]) -> None:
        inputs, names = example.example_inputs, example.keywords
        called = repr(built_by)
        check_round_trip(result.model, state, build, inputs, names, called=called, assign=in_files)

    return check


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
