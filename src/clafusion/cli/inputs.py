"""What commands have in common: models, data and the device, and the checks of these."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from clafusion.cli.parsing import numbers_of
from clafusion.errors import InputError
from clafusion.profiling.samples import load_samples
from clafusion.weights.atomic import check_output
from clafusion.weights.factories import load_model
from clafusion.weights.messages import one_line

__all__ = [
    "Arch",
    "Archs",
    "AsJson",
    "CheckpointKey",
    "CheckpointKeys",
    "ConfigFile",
    "DataFile",
    "DataKey",
    "DataOptions",
    "Device",
    "Limit",
    "Mean",
    "NamedFiles",
    "Plot",
    "Scale",
    "Shape",
    "Std",
    "archs_of",
    "check_plot",
    "keys_of",
    "load_models",
    "named_files",
    "samples_of",
    "try_models",
]

_FACTORY = (
    "MODULE:FACTORY, for example 'package.module:Net', 'file.py:make' or 'file.py:make(depth=20)'"
)

NamedFiles = Annotated[
    list[str],
    typer.Argument(
        help="Weights of two or more models (.safetensors, .pt, .pth, .th, .bin, .ckpt, or the "
        ".index.json of several files). They are called first, second, third and so on, or as "
        "NAME=FILE says.",
        metavar="WEIGHTS",
    ),
]
Arch = Annotated[
    str, typer.Option(help=f"What makes the model: {_FACTORY}.", metavar="MODULE:FACTORY")
]
Archs = Annotated[
    list[str],
    typer.Option(
        "--arch",
        help=f"What makes the models: {_FACTORY}. Once for all, or once for each, in their order.",
        metavar="MODULE:FACTORY",
    ),
]
_KEY = (
    "Which state dict of a checkpoint that holds several: its key, for example model_ema, or keys "
    "and a prefix of its names, as state_dict.teacher."
)
CheckpointKey = Annotated[str | None, typer.Option(help=_KEY, metavar="KEY")]
CheckpointKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint-key",
        help=f"{_KEY} Once for all, or once for each, in their order; empty for the usual one.",
        metavar="KEY",
    ),
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
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Settings from a YAML or JSON file, as in a manifest; options here come first.",
        metavar="FILE",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw the alignment into this file (.png, .svg, .pdf).", metavar="FILE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


# --- models -------------------------------------------------------------------------------------

_ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
)
_NAMED = re.compile(r"(?P<name>[\w.@-]+)=(?P<file>.+)", re.DOTALL)


def named_files(texts: Sequence[str]) -> dict[str, Path]:
    """Return each model's file by the model's name: as ``NAME=FILE`` says, or by its place.

    Raises
    ------
    InputError
        There are fewer than two, or two of one name.
    """
    if len(texts) < 2:
        raise InputError(f"give the weights of at least two models; got {len(texts)}")
    found: dict[str, Path] = {}
    for i, text in enumerate(texts):
        name = _ORDINALS[i] if i < len(_ORDINALS) else f"model{i + 1}"
        file = Path(text)
        matched = None if file.exists() else _NAMED.fullmatch(text)
        if matched is not None:
            name, file = matched["name"], Path(matched["file"])
        if name in found:
            raise InputError(f"two models are called {name!r}: name them by NAME=FILE")
        found[name] = file
    return found


def archs_of(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return each model's factory by the model's name.

    Raises
    ------
    InputError
        There are neither one nor as many as models.
    """
    if len(given) not in (1, len(names)):
        raise InputError(
            f"give --arch once, or once for each of the {len(names)} models "
            f"({', '.join(names)}); got {len(given)}"
        )
    every = given if len(given) > 1 else [given[0]] * len(names)
    return dict(zip(names, every, strict=True))


def keys_of(given: Sequence[str] | None, names: Sequence[str]) -> dict[str, str | None]:
    """Return the key of each model's checkpoint by the model's name; None for the usual one.

    Raises
    ------
    InputError
        There are neither one nor as many as models.
    """
    if not given:
        return dict.fromkeys(names)
    if len(given) not in (1, len(names)):
        raise InputError(
            f"give --checkpoint-key once, or once for each of the {len(names)} models "
            f"({', '.join(names)}); got {len(given)}"
        )
    every = given if len(given) > 1 else [given[0]] * len(names)
    return {name: key or None for name, key in zip(names, every, strict=True)}


def load_models(
    files: Mapping[str, Path], archs: Mapping[str, str], keys: Mapping[str, str | None]
) -> dict[str, nn.Module]:
    """Return the models with their weights; errors are those of ``load_model``."""
    return {name: load_model(archs[name], file, keys[name]) for name, file in files.items()}


def try_models(models: Mapping[str, nn.Module], samples: Tensor) -> None:
    """Run each model once, so that unfitting data shows before anything takes long.

    Raises
    ------
    InputError
        A model does not run on the data.
    """
    for name, model in models.items():
        try:
            with torch.no_grad():
                model(samples[:2])
        except Exception as error:
            called = f"model {name!r}" if name else "the model"
            raise InputError(
                f"{called} does not run on the data (a sample has shape "
                f"{tuple(samples.shape[1:])}, {samples.dtype}): {one_line(error)}"
            ) from error


# --- data, device and pictures ------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """How a data file is read, as typed."""

    key: str | None
    shape: str | None
    scale: float | None
    mean: str | None
    std: str | None


def samples_of(data: Path, limit: int, options: DataOptions) -> Tensor:
    """Return the samples in a data file; errors are those of ``load_samples``."""
    return load_samples(
        data,
        key=options.key,
        limit=limit,
        shape=numbers_of("--shape", options.shape, int),
        scale=options.scale,
        mean=numbers_of("--mean", options.mean, float),
        std=numbers_of("--std", options.std, float),
    )


def check_plot(plot: Path | None) -> None:
    """Refuse a picture that cannot be written."""
    if plot is not None:
        from clafusion.reports.plots import ENDINGS

        check_output(plot, ENDINGS, "--plot")
