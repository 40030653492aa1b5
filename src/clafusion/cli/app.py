"""The command line. Everything that can be checked is checked before the first long step."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from clafusion._native import build_info, cuda_devices
from clafusion.batch.run import fuse_many
from clafusion.calibration.least_squares import Lean
from clafusion.cli.manifest import Manifest, read_manifest
from clafusion.errors import ClafusionError, FusionWarning, InputError, StructureError
from clafusion.fusion import (
    AlignedPair,
    FusionConfig,
    FusionResult,
    align,
    fuse_aligned,
    traced_template,
)
from clafusion.profiling.batches import first_batch
from clafusion.profiling.samples import load_samples
from clafusion.reports.tables import (
    alignment_summary,
    fusion_summary,
    many_summary,
    model_summary,
    total_seconds,
)
from clafusion.tracing.model import TracedModel
from clafusion.tracing.trace import trace
from clafusion.weights.atomic import check_output
from clafusion.weights.files import WRITABLE, build_model, load_model, save_model

__all__ = ["main"]

app = typer.Typer(
    add_completion=False,
    help="Fuse trained PyTorch networks of different depth and width into one, without training.",
    epilog="After an error, --debug at the end of any command shows where it arose.",
    rich_markup_mode=None,
)

# The base of typer's usage errors, whichever release of click it builds on.
_UsageError: Any = typer.BadParameter.__mro__[2]

_FIRST = typer.Argument(help="Weights of the first model (.safetensors, .pt, .pth, .th, .bin).")
_SECOND = typer.Argument(help="Weights of the second model.")

Arch = Annotated[
    str,
    typer.Option(
        help="What makes the model: MODULE:FACTORY, for example 'package.module:Net', "
        "'file.py:make' or 'file.py:make(depth=20)'.",
        metavar="MODULE:FACTORY",
    ),
]
ArchB = Annotated[
    str | None,
    typer.Option(help="The same for the second model; default: --arch.", metavar="MODULE:FACTORY"),
]
DataFile = Annotated[
    Path,
    typer.Option("--data", help="Unlabelled inputs (.npy, .npz, .pt, .pth, .safetensors)."),
]
DataKey = Annotated[
    str | None,
    typer.Option(help="Which array of the data file; default x_train, images, x or data."),
]
Limit = Annotated[int, typer.Option(help="Use this many samples from the beginning.")]
Shape = Annotated[
    str | None, typer.Option(help="Reshape each sample, for example 1,28,28.", metavar="N,N,...")
]
Scale = Annotated[
    float | None, typer.Option(help="Divide the data by this number, for example 255 for bytes.")
]
Mean = Annotated[
    str | None,
    typer.Option(help="Then subtract: one number, or one for each channel.", metavar="X,X,..."),
]
Std = Annotated[
    str | None,
    typer.Option(help="Then divide: one number, or one for each channel.", metavar="X,X,..."),
]
Weight = Annotated[float, typer.Option(help="The second model's share, from 0 to 1.")]
LayerCostName = Annotated[
    str,
    typer.Option(
        help="The cost of matching two layers: cka, cka_unbiased, cca, wasserstein, "
        "wasserstein_entropic, neurons, index."
    ),
]
AlignmentName = Annotated[str, typer.Option(help="layer (exact), or a baseline: chain, random.")]
NeuronCostName = Annotated[
    str,
    typer.Option(help="The cost of matching two channels: correlation, euclidean, weight, dual."),
]
ImportanceName = Annotated[
    str,
    typer.Option(
        help="Each channel's mass in the matching: uniform, or by norm, activation, sensitivity."
    ),
]
LayerWeightsName = Annotated[
    str,
    typer.Option(
        help="Whether every layer has the weight (uniform), or each matched layer a share of its "
        "own, by the outputs' sensitivity to it (sensitivity)."
    ),
]
SolverName = Annotated[
    str, typer.Option(help="How channels are matched: auto, assignment, exact, sinkhorn, zip.")
]
ZipBudget = Annotated[
    float,
    typer.Option(help="Share of channels that the solver zip may merge within one model, 0 to 1."),
]
Epsilon = Annotated[float, typer.Option(help="Regularisation of the solver sinkhorn.")]
CalibrationName = Annotated[str, typer.Option(help="repair, least_squares, batchnorm or none.")]
LeanText = Annotated[
    str,
    typer.Option(help="How far least squares leans inside towards one parent: 0 to 1, or auto."),
]
BalanceName = Annotated[
    str, typer.Option(help="As deep as the deeper model (add) or as the shallower (merge).")
]
MergeName = Annotated[
    str, typer.Option(help="How layers go: least_squares, or by signs: sum, majority, average.")
]
WidthName = Annotated[
    str, typer.Option(help="Whose widths: own (of the depth), first, second, narrow, wide.")
]
AlignmentSamples = Annotated[
    int, typer.Option(help="Inputs over which layers are compared; held in memory at once.")
]
MatchingRows = Annotated[
    int, typer.Option(help="Pairs of input and position over which channels are compared.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Prove the analysis by permuting a copy.")
]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw the alignment into this file (.png, .svg, .pdf).", metavar="FILE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

_DEFAULTS = FusionConfig()


@app.command("fuse")
def _fuse(
    first: Annotated[Path, _FIRST],
    second: Annotated[Path, _SECOND],
    arch: Arch,
    data: DataFile,
    out: Annotated[
        Path, typer.Option(help="Where to write the fused weights (.safetensors, .pt, .pth).")
    ],
    arch_b: ArchB = None,
    data_key: DataKey = None,
    limit: Limit = 2000,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    weight: Weight = _DEFAULTS.weight,
    layer_weights: LayerWeightsName = _DEFAULTS.layer_weights,
    layer_cost: LayerCostName = _DEFAULTS.layer_cost,
    alignment: AlignmentName = _DEFAULTS.alignment,
    channel_cost: NeuronCostName = _DEFAULTS.channel_cost,
    importance: ImportanceName = _DEFAULTS.importance,
    solver: SolverName = _DEFAULTS.solver,
    zip_budget: ZipBudget = _DEFAULTS.zip_budget,
    epsilon: Epsilon = _DEFAULTS.epsilon,
    calibration: CalibrationName = _DEFAULTS.calibration,
    lean: LeanText = str(_DEFAULTS.lean),
    balance: BalanceName = _DEFAULTS.balance,
    merge: MergeName = _DEFAULTS.merge,
    width: WidthName = _DEFAULTS.width,
    alignment_samples: AlignmentSamples = _DEFAULTS.alignment_samples,
    matching_rows: MatchingRows = _DEFAULTS.matching_rows,
    seed: Seed = _DEFAULTS.seed,
    device: Device = "cpu",
    verify: Verify = True,
    plot: Plot = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="What makes the module whose architecture the result is to have, as for --arch; "
            "needed where each model is the deeper one somewhere.",
            metavar="MODULE:FACTORY",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fuse two models; write the fused weights.

    They load into the deeper model's architecture; with --balance merge into the shallower one's,
    with --into into that.
    """
    config = _config(
        weight=weight,
        layer_weights=layer_weights,
        layer_cost=layer_cost,
        alignment=alignment,
        channel_cost=channel_cost,
        importance=importance,
        solver=solver,
        zip_budget=zip_budget,
        epsilon=epsilon,
        calibration=calibration,
        lean=_lean(lean),
        balance=balance,
        merge=merge,
        width=width,
        alignment_samples=alignment_samples,
        matching_rows=matching_rows,
        verify=verify,
        seed=seed,
    )
    _check_device(device)
    check_output(out, WRITABLE, "--out", (first, second, data))
    _check_plot(plot)
    archs = (arch, arch if arch_b is None else arch_b)
    models = [load_model(one, path) for one, path in zip(archs, (first, second), strict=True)]
    samples = _samples(data, data_key, limit, shape, scale, mean, std)
    _try_models(models, samples)
    template = None
    if into is not None:
        template = traced_template(build_model(into), models[0], first_batch(samples), device)
    with _progress(len(samples)) as report:
        pair = align(models[0], models[1], samples, config=config, device=device, progress=report)
        if template is None and pair.alignment.unmatched_shallow:
            raise StructureError(
                "each model is the deeper one somewhere, and so the weights load into neither's "
                "architecture; give --into MODULE:FACTORY, which has the layers of both"
            )
        result = fuse_aligned(pair, samples, config=config, into=template, progress=report)
    save_model(result.model, out)
    if plot is not None:
        result.plot(plot)
    if as_json:
        _print_json(_fusion_facts(result, out, plot))
        return
    built_by = into or _arch_of(result, archs)
    print(f"{fusion_summary(result)}\n{'written':<12} {out}, weights of {built_by}")
    _print_plot(plot)


@app.command("fuse-many")
def _fuse_many(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="YAML or JSON: models, factory, pairs, data, settings, out. Files in it are "
            "relative to it."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the results; default: the manifest's.", metavar="DIR"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many processes work on it.")] = 1,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="What models at hand may take in each process, for example 2GB or 500MB.",
            metavar="SIZE",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep pairs that are done already.")
    ] = True,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the HTML report; default: report.html beside the results.",
            metavar="FILE",
        ),
    ] = None,
    chosen: Annotated[
        str | None,
        typer.Option(help="The pair whose alignment the report shows.", metavar="FIRST,SECOND"),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fuse many pairs of models. Exit code 1 if some failed, the others are done all the same."""
    from clafusion.reports.page import write_report

    given = read_manifest(manifest)
    folder = out or given.out
    if folder is None:
        raise InputError(f"give --out DIR, or an entry out in {str(manifest)!r}")
    limit = None if memory_limit is None else _bytes("--memory-limit", memory_limit)
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1; got {jobs}")
    _check_device(device)
    page = report or folder / "report.html"
    if page.resolve().parent != folder.resolve():  # which need not be there yet
        check_output(page, (".html",), "--report")
    pair = None if chosen is None else _chosen(chosen, given)
    settings = {**given.data}
    samples = load_samples(settings.pop("file"), **settings)
    with _pair_progress() as tell:
        run = fuse_many(
            given.models,
            samples,
            given.pairs,
            executor=None if jobs == 1 else jobs,
            out_dir=folder,
            resume=resume,
            memory_limit=limit,
            device=None if device == "cpu" else device,
            progress=tell,
            **asdict(given.config),
        )
        check_output(page, (".html",), "--report")
        results = list(run)
    if not as_json:
        print(many_summary(results), flush=True)
    if any((one.first, one.second) == pair and one.error is not None for one in results):
        print(
            f"clafusion: warning: --chosen {chosen} was not fused, so the report shows another "
            "pair's alignment",
            file=sys.stderr,
        )
        pair = None
    write_report(results, page, chosen=pair)
    failed = sum(one.error is not None for one in results)
    if as_json:
        _print_json(
            {
                "out": str(folder),
                "report": str(page),
                "pairs": len(results),
                "failed": failed,
                "resumed": sum(one.resumed for one in results),
                "seconds": total_seconds(results),
            }
        )
    else:
        print(f"{'written':<12} {folder}\n{'report':<12} {page}")
    if failed:
        raise typer.Exit(1)


@app.command("align")
def _align(
    first: Annotated[Path, _FIRST],
    second: Annotated[Path, _SECOND],
    arch: Arch,
    data: DataFile,
    arch_b: ArchB = None,
    data_key: DataKey = None,
    limit: Limit = 400,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    layer_cost: LayerCostName = _DEFAULTS.layer_cost,
    alignment: AlignmentName = _DEFAULTS.alignment,
    alignment_samples: AlignmentSamples = _DEFAULTS.alignment_samples,
    seed: Seed = _DEFAULTS.seed,
    device: Device = "cpu",
    verify: Verify = True,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers of two models belong together, and what each pair costs. Fuse nothing."""
    config = _config(
        layer_cost=layer_cost,
        alignment=alignment,
        alignment_samples=alignment_samples,
        verify=verify,
        seed=seed,
    )
    _check_device(device)
    _check_plot(plot)
    models = [
        load_model(arch, first),
        load_model(arch if arch_b is None else arch_b, second),
    ]
    samples = _samples(data, data_key, limit, shape, scale, mean, std)
    _try_models(models, samples)
    with _progress(len(samples)) as report:
        pair = align(models[0], models[1], samples, config=config, device=device, progress=report)
    if plot is not None:
        from clafusion.reports.plots import plot_alignment

        plot_alignment(pair, plot)
    if as_json:
        _print_json({**_alignment_facts(pair, plot), "seconds": dict(pair.timings)})
        return
    print(alignment_summary(pair))
    _print_plot(plot)


@app.command("inspect")
def _inspect(
    arch: Arch,
    weights: Annotated[
        Path | None, typer.Argument(help="Weights of the model; default: as the factory sets them.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Inputs of the model: a few samples are used.")
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of data: random inputs of this shape, without the batch axis, for "
            "example 3,32,32.",
            metavar="N,N,...",
        ),
    ] = None,
    data_key: DataKey = None,
    shape: Shape = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = _DEFAULTS.seed,
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Show a model's layers and the channels that can be matched."""
    if (data is None) == (input_shape is None):
        raise InputError("give either --data FILE or --input-shape N,N,...: inputs to trace with")
    model = build_model(arch) if weights is None else load_model(arch, weights)
    if data is not None:
        samples = _samples(data, data_key, 8, shape, scale, mean, std)
    else:
        sizes = _numbers("--input-shape", input_shape, int)
        generator = torch.Generator().manual_seed(seed)
        samples = torch.randn(8, *cast(list[int], sizes), generator=generator)
    _try_models([model], samples)
    graph = trace(model, samples, verify=verify, seed=seed)
    if as_json:
        _print_json(_model_facts(graph))
    else:
        print(model_summary(graph))


@app.command("demo")
def _demo(
    out_dir: Annotated[
        Path, typer.Option(help="Where to write the picture and the fused weights.")
    ] = Path("demo-output"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train two small networks of different depth on handwritten digits, and fuse them."""
    from clafusion.demo import run_demo

    outcome = run_demo(out_dir, seed=seed, say=_say)
    if as_json:
        _print_json(outcome.facts())
    else:
        print(outcome.summary())


@app.command("doctor")
def _doctor(as_json: AsJson = False) -> None:
    """Tell what is installed, and whether and why a GPU is used or not."""
    facts = _installation()
    if as_json:
        _print_json(facts)
        return
    cuda = "none in this build"
    if facts["cuda"]:
        cuda = f"for GPUs {facts['cuda_architectures']}, CUDA runtime {facts['cuda_runtime']}"
    lines = {
        "clafusion": f"{facts['clafusion']}, Python {facts['python']}",
        "PyTorch": f"{facts['torch']}, CUDA {facts['torch_cuda'] or 'not built in'}",
        "CPU kernels": f"{facts['compiler']}, {facts['simd']}, threads {facts['threads']}",
        "CUDA kernels": cuda,
        "GPUs": ", ".join(facts["gpus"]) or "none usable",
        "device=cuda": "works" if facts["cuda_usable"] else "; ".join(facts["cuda_reasons"]),
    }
    for name, value in lines.items():
        print(f"{name:<12} {value}")


# --- checks before anything takes long ----------------------------------------------------------


def _config(**settings: Any) -> FusionConfig:
    try:
        return FusionConfig(**settings)
    except InputError as error:  # name the option as it is typed
        name, _, rest = str(error).partition(" ")
        raise InputError(f"--{name.replace('_', '-')} {rest}") from error


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device!r} cannot be used here: {reason}") from error


def _check_plot(plot: Path | None) -> None:
    if plot is not None:
        from clafusion.reports.plots import ENDINGS

        check_output(plot, ENDINGS, "--plot")


def _samples(
    data: Path,
    key: str | None,
    limit: int,
    shape: str | None,
    scale: float | None,
    mean: str | None,
    std: str | None,
) -> Tensor:
    return load_samples(
        data,
        key=key,
        limit=limit,
        shape=cast("list[int] | None", _numbers("--shape", shape, int)),
        scale=scale,
        mean=_numbers("--mean", mean, float),
        std=_numbers("--std", std, float),
    )


def _numbers(option: str, text: str | None, kind: type[int] | type[float]) -> list[float] | None:
    if text is None:
        return None
    try:
        return [kind(one) for one in text.strip("()[] ").split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} takes {what} between commas; got {text!r}") from error


def _chosen(text: str, manifest: Manifest) -> tuple[str, str]:
    first, _, second = (part.strip() for part in text.partition(","))
    pairs = manifest.pairs
    if isinstance(pairs, str):
        pairs = list(itertools.combinations(manifest.models, 2))
    if (first, second) in pairs:
        return first, second
    hint = f"; it has {second},{first}" if (second, first) in pairs else ""
    raise InputError(f"--chosen {text!r} is none of the manifest's pairs FIRST,SECOND{hint}")


def _bytes(option: str, text: str) -> int:
    matched = re.fullmatch(
        r"(\d+(?:\.\d+)?(?:e\+?\d\d?)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower()
    )
    if matched is None:
        raise InputError(f"{option} takes a size such as 500MB, 2GB or 2GiB; got {text!r}")
    size = (1024 if matched[3] else 1000) ** " kmgt".index(matched[2] or " ")
    found = int(float(matched[1]) * size)
    if found < 1:
        raise InputError(f"{option} must be at least 1 byte; got {text!r}")
    return found


def _try_models(models: Sequence[nn.Module], samples: Tensor) -> None:
    """Run each model once, so that unfitting data shows before anything takes long."""
    names = ["the model"] if len(models) == 1 else ["the first model", "the second model"]
    for name, model in zip(names, models, strict=True):
        try:
            with torch.no_grad():
                model(samples[:2])
        except Exception as error:
            raise InputError(
                f"{name} does not run on the data (a sample has shape "
                f"{tuple(samples.shape[1:])}, {samples.dtype}): {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error


# --- what is shown ------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Show on stderr how far the long steps are; nothing where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    following = {"profile": "aligning and matching", "calibrate": "finishing"}
    with bar:
        task = bar.add_task("tracing and verifying", total=None)

        def report(stage: str, done: int) -> None:
            if done < total:
                bar.update(task, description=stage, completed=done, total=total)
            else:  # until the next stage reports
                bar.update(task, description=following.get(stage, stage), total=None)

        yield report


@contextlib.contextmanager
def _pair_progress() -> Iterator[Any]:
    """Show on stderr how many pairs are done, how fast it goes and how long it will take."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    started = time.monotonic()
    before: list[int] = []  # what an earlier run had done says nothing of the speed
    with bar:
        task = bar.add_task("fusing", total=None, rate="")

        def tell(done: int, total: int) -> None:
            if not before:
                before.append(done)
            rate = (done - before[0]) / max(time.monotonic() - started, 1e-9)
            shown = f"{rate:.2f} pairs/s" if done > before[0] else ""
            bar.update(task, completed=done, total=total, rate=shown)

        yield tell


def _say(line: str) -> None:
    """Tell a person at a terminal what goes on."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _print_plot(plot: Path | None) -> None:
    if plot is not None:
        print(f"{'picture':<12} {plot}")


def _installation() -> dict[str, Any]:
    gpus, reason = cuda_devices()
    reasons = []
    if torch.version.cuda is None:
        reasons.append("PyTorch is built without CUDA: install a build with it")
    elif not torch.cuda.is_available():
        reasons.append("PyTorch finds no GPU: check the driver with nvidia-smi")
    if reason:
        reasons.append(f"clafusion's kernels: {reason}")
    return {
        "clafusion": importlib.metadata.version("clafusion"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        **build_info(),
        "gpus": gpus,
        "cuda_usable": not reasons,
        "cuda_reasons": reasons,
    }


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, allow_nan=False))


def _alignment_facts(pair: AlignedPair, plot: Path | None) -> dict[str, Any]:
    alignment = pair.alignment
    deep, shallow = pair.deep.traced.layers, pair.shallow.traced.layers
    return {
        "deep_model": "first" if pair.deep_is_first else "second",
        "deep_layers": [layer.name for layer in deep],
        "shallow_layers": [layer.name for layer in shallow],
        "deep_to_shallow": [k if k >= 0 else None for k in alignment.deep_to_shallow],
        "costs": [
            [float(cost) if math.isfinite(cost) else None for cost in row] for row in alignment.cost
        ],
        "total_cost": alignment.matched_cost,
        "forced": alignment.forced,
        "samples": pair.deep.num_inputs,
        "plot": None if plot is None else str(plot),
    }


def _lean(text: str) -> Lean:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--lean must be a number from 0 to 1, or auto; got {text!r}") from None


def _arch_of(result: FusionResult, archs: tuple[str, str]) -> str:
    """Say into which architecture the fused weights load."""
    pair = result.pair
    first = pair.deep if pair.deep_is_first else pair.shallow
    second = pair.shallow if pair.deep_is_first else pair.deep
    for profile, arch in zip((first, second), archs, strict=True):
        if result.lifting.deep.model is profile.traced.model:
            return arch
    is_deep = result.config.balance == "add"
    arch = archs[0 if pair.deep_is_first == is_deep else 1]
    return f"{arch} with the other model's widths"


def _fusion_facts(result: FusionResult, out: Path, plot: Path | None) -> dict[str, Any]:
    shallow = result.lifting.shallow
    return {
        "out": str(out),
        **_alignment_facts(result.pair, plot),
        "config": asdict(result.config),
        "groups": [
            {"name": one.name, "channels": None if plan is None else list(plan.shape)}
            for one, plan in zip(result.lifting.deep.groups, result.plans, strict=True)
        ],
        "shares": [result.shares.get(pair) for pair in result.alignment.pairs],
        "head_orders": [
            {"layer": shallow.layers[shallow.heads[index].layer].name, "order": list(order)}
            for index, order in result.head_orders.items()
        ],
        "heads": [
            {
                "layer": result.lifting.deep.layers[to.layer].name,
                "source": of.count,
                "target": to.count,
            }
            for of, to in zip(shallow.united_heads, result.lifting.deep.united_heads, strict=True)
        ],
        "seconds": dict(result.timings),
    }


def _model_facts(graph: TracedModel) -> dict[str, Any]:
    return {
        "parameters": sum(one.numel() for one in graph.model.parameters()),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "output_shape": list(layer.output_shape),
                "insertable": layer.insertable,
                "parameters": list(layer.parameters),
            }
            for layer in graph.layers
        ],
        "groups": [
            {
                "name": one.name,
                "channels": one.size,
                "axes": [
                    {
                        "parameter": group_axis.use.parameter,
                        "axis": group_axis.axis,
                        "direction": group_axis.direction,
                    }
                    for group_axis in one.axes
                ],
            }
            for one in graph.groups
        ],
        "heads": [
            {
                "layer": graph.layers[one.layer].name,
                "groups": [list(block) for block in one.members],
            }
            for one in graph.heads
        ],
    }


# --- entry --------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if some of many pairs failed, 2 after bad input.

    After an interruption it is 130, after SIGTERM 143 and after SIGHUP 129.

    Every refusal is one line on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    arguments = [one for one in given if one != "--debug"] or ["--help"]
    kept = "finished pairs are kept" if "fuse-many" in given else "no output was written"
    signals: list[int] = []
    try:
        with warnings.catch_warnings(), _signals_interrupt(signals):
            warnings.showwarning = _show_warning
            code = app(arguments, prog_name="clafusion", standalone_mode=False)
            sys.stdout.flush()
        if code == 130:  # typer turns an interruption into this exit code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _refuse(f"interrupted; {kept}", 128 + (signals or [signal.SIGINT])[0], debug)
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ClafusionError as error:
        return _refuse(str(error), 2, debug)
    except _UsageError as error:
        return _refuse(f"{error.format_message()} Try 'clafusion --help'.", 2, debug)
    except MemoryError as error:
        return _refuse(f"not enough memory: {error}; use fewer samples (--limit)", 2, debug)


@contextlib.contextmanager
def _signals_interrupt(seen: list[int]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does; append what came to ``seen``."""

    def interrupt(number: int, _: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            one = getattr(signal, name, None)
            if one is not None and signal.getsignal(one) == signal.SIG_DFL:  # not with nohup
                before[one] = signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _refuse(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"clafusion: {' '.join(message.split())}", file=sys.stderr)
    return code


_show_any_warning = warnings.showwarning


def _show_warning(
    message: Warning | str, category: type[Warning], *where: Any, **more: Any
) -> None:
    if issubclass(category, FusionWarning):
        print(f"clafusion: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        _show_any_warning(message, category, *where, **more)


if __name__ == "__main__":
    sys.exit(main())
