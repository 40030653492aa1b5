"""``clafusion fuse``: two or more models into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from clafusion.alignment.models import AlignedModels
from clafusion.cli.facts import fusion_facts
from clafusion.cli.inputs import (
    Archs,
    AsJson,
    ConfigFile,
    DataFile,
    DataKey,
    DataOptions,
    Device,
    Limit,
    Mean,
    NamedFiles,
    Plot,
    Scale,
    Shape,
    Std,
    archs_of,
    check_plot,
    load_models,
    named_files,
    samples_of,
    try_models,
)
from clafusion.cli.options import configured, errors_by_flags
from clafusion.cli.parsing import merge_weights_of
from clafusion.cli.settings import read_config
from clafusion.cli.show import print_json, print_line, progress
from clafusion.config import FusionConfig, Iterative, Like
from clafusion.errors import StructureError
from clafusion.execution.call import usable_device
from clafusion.fusion import align, fuse, fuse_aligned
from clafusion.profiling.batches import Progress
from clafusion.reports import plot as draw
from clafusion.reports import summary
from clafusion.results import FusionResult
from clafusion.stages import traced_template
from clafusion.weights.atomic import check_output
from clafusion.weights.state_files import WRITABLE, save_model

__all__ = ["fuse_command"]


def fuse_command(
    weights: NamedFiles,
    arch: Archs,
    data: DataFile,
    out: Annotated[
        Path, typer.Option(help="Where to write the fused weights (.safetensors, .pt, .pth).")
    ],
    merge_weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Each model's weight in the average, as 2,1,1 or 2:1:1; default equal.",
            metavar="X,X,...",
        ),
    ] = None,
    config: ConfigFile = None,
    data_key: DataKey = None,
    limit: Limit = 2000,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "cpu",
    plot: Plot = None,
    as_json: AsJson = False,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Fuse two or more models; write the fused weights.

    They load into the architecture of the deepest model; with --target shallower into that of the
    shallowest, with --target like into that of --target-template.
    """
    files = named_files(weights)
    archs = archs_of(arch, list(files))
    given = merge_weights_of("--weights", merge_weights, list(files))
    base = None if config is None else read_config(config, "--config")
    settings = configured(options, base)
    usable_device(device, "--device")
    check_output(out, WRITABLE, "--out", (*files.values(), data))
    check_plot(plot)
    models = load_models(files, archs)
    samples = samples_of(data, limit, DataOptions(data_key, shape, scale, mean, std))
    try_models(models, samples)
    with progress(len(samples)) as report, errors_by_flags():
        result = _fused(models, samples, given, settings, device, report)
    save_model(result.model, out)
    if plot is not None:
        draw(result, plot)
    built_by = _architecture(result, archs, options)
    if as_json:
        shown = None if plot is None else str(plot)
        print_json(
            {"out": str(out), "plot": shown, "architecture": built_by, **fusion_facts(result)}
        )
        return
    print(summary(result))
    print_line("written", f"{out}, weights of {built_by}")
    print_line("picture", plot)


def _fused(
    models: Mapping[str, nn.Module],
    samples: Tensor,
    weights: list[float] | None,
    config: FusionConfig,
    device: str,
    report: Progress | None,
) -> FusionResult:
    """Fuse; refuse what no architecture could load as soon as the alignment shows it."""
    if isinstance(config.merging.strategy, Iterative) and len(models) > 2:
        result = fuse(models, samples, weights, config, device=device, progress=report)
        for step in result.steps:
            _check_depths(step.aligned, config)
        return result
    aligned = align(models, samples, config, device=device, progress=report)
    _check_depths(aligned, config)
    template = None
    if isinstance(config.target, Like):
        like = aligned.profiles[0].traced
        template = traced_template(config, like.model, like.example_inputs)
    return fuse_aligned(aligned, samples, weights, config, template=template, progress=report)


def _check_depths(aligned: AlignedModels, config: FusionConfig) -> None:
    gaps = any(one.alignment.unmatched_shallow for one in aligned.pairs)
    if gaps and not isinstance(config.target, Like):  # errors_by_flags says how that is typed
        raise StructureError(
            "of two models each is the deeper one somewhere, and so the fused weights load into "
            "nobody's architecture; give target=Like(module), which has the layers of all"
        )


def _architecture(
    result: FusionResult, archs: Mapping[str, str], options: Mapping[str, str | bool]
) -> str:
    """Say into which architecture the fused weights load."""
    if isinstance(result.config.target, Like):
        return str(options.get("target.template", "the template"))
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


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
