"""The parameters that commands have in common. Nothing heavy is imported: help comes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Arch",
    "Archs",
    "AsJson",
    "CheckpointKey",
    "CheckpointKeys",
    "ConfigFile",
    "DataFile",
    "DataKey",
    "Device",
    "Labels",
    "Limit",
    "MaxLength",
    "MaxShardSize",
    "Mean",
    "MemoryLimit",
    "NamedFiles",
    "Plot",
    "Scale",
    "Shape",
    "Std",
    "TextColumn",
]

_FACTORY = (
    "MODULE:FACTORY, for example 'package.module:Net', 'file.py:make' or 'file.py:make(depth=20)'"
)

NamedFiles = Annotated[
    list[str],
    typer.Argument(
        help="Two or more models: Hugging Face directories, exported programs (.pt2), or weights "
        "(.safetensors, .pt, .pth, .th, .bin, .ckpt, or the .index.json of several files). They "
        "are called first, second, third and so on, or as NAME=FILE says.",
        metavar="WEIGHTS",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        help=f"What makes the model: {_FACTORY}, timm:NAME or torchvision:NAME. A Hugging Face "
        "directory needs none.",
        metavar="MODULE:FACTORY",
    ),
]
Archs = Annotated[
    list[str] | None,
    typer.Option(
        "--arch",
        help=f"What makes the models: {_FACTORY}, timm:NAME or torchvision:NAME. Once for all, or "
        "once for each, in their order. Hugging Face directories need none.",
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
    typer.Option(
        "--data",
        help="Unlabelled inputs (.npy, .npz, .pt, .pth, .safetensors), or for Hugging Face "
        "directories texts (.txt, .jsonl, .csv, .parquet) or a folder of images.",
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        help="Which entry of a row is the text; default text, sentence or content.", metavar="NAME"
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="How many tokens of a text count; default what the tokenizer says, at most 512.",
        metavar="N",
    ),
]
DataKey = Annotated[
    str | None,
    typer.Option(help="Which array of the data file; default x_train, images, x or data."),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Which array of the data file holds labels: they are compared with, not learnt from.",
        metavar="KEY",
    ),
]
Limit = Annotated[
    int,
    typer.Option(
        help="Use this many samples, chosen at random with a fixed seed; of texts from the "
        "beginning."
    ),
]
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
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="Stay within this much memory, as 6GB: weights stay in files, those made in temporary "
        "ones (see TMPDIR).",
        metavar="AMOUNT",
    ),
]
MaxShardSize = Annotated[
    str, typer.Option(help="From which size on a directory gets several files.", metavar="SIZE")
]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw the alignment into this file (.png, .svg, .pdf).", metavar="FILE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
