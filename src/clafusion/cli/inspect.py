"""``clafusion inspect``: a model's layers and channels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clafusion.cli.options import configured, messages_by_flags
from clafusion.cli.parameters import (
    Arch,
    AsJson,
    CheckpointKey,
    DataKey,
    MaxLength,
    Mean,
    Plot,
    Scale,
    Shape,
    Std,
    TextColumn,
)
from clafusion.cli.show import print_json, print_line, print_text
from clafusion.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["STAGES", "inspect_command"]

STAGES = ("verify", "seed")
"""The fields of the configuration that count for one model."""

_ROWS = 8
_MOST = 1 << 30  # numbers in the random samples


def inspect_command(
    weights: Annotated[
        Path | None,
        typer.Argument(
            help="Weights of the model, or its Hugging Face directory; default: as the factory "
            "sets them."
        ),
    ] = None,
    arch: Arch = None,
    checkpoint_key: CheckpointKey = None,
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
    text_column: TextColumn = None,
    max_length: MaxLength = None,
    plot: Plot = None,
    as_json: AsJson = False,
    *,
    options: dict[str, str | bool],
) -> None:
    """Show a model's layers and the channels that can be matched; of a result how it was made.

    What clafusion wrote tells how it was made without inputs, too.
    """
    from clafusion.cli.facts import model_facts
    from clafusion.cli.inputs import DataOptions, check_plot, data_of
    from clafusion.cli.models import try_models
    from clafusion.interop.inputs import example_of, readable
    from clafusion.reports import plot as draw
    from clafusion.reports import summary
    from clafusion.reports.records import record_summary
    from clafusion.tracing.trace import trace

    settings = configured(options)
    has_inputs = data is not None or input_shape is not None
    record = None if weights is None else _record(weights, is_all=not has_inputs)
    if record is not None and not has_inputs:
        _check_unused(arch, checkpoint_key, plot)
        print_json({"record": record}) if as_json else print_text(record_summary(record))
        return
    if weights is not None and not Path(weights).exists():
        raise InputError(f"{str(weights)!r} does not exist")
    if (data is None) == (input_shape is None):
        of_model = "give either --data FILE or --input-shape N,N,...: inputs to trace with"
        if weights is not None and not has_inputs:
            raise InputError(
                f"no record of how {str(weights)!r} was made. To see a model {of_model}"
            )
        raise InputError(of_model)
    check_plot(plot)
    model = _model(arch, weights, checkpoint_key)
    samples: Tensor | list[dict[str, Tensor]]
    if data is not None:
        reading = DataOptions(data_key, shape, scale, mean, std, text_column, max_length)
        folder = {"": weights} if weights is not None and weights.is_dir() else {}
        samples = data_of(data, _ROWS, reading, folder)
    else:
        samples = _random_samples(input_shape or "", settings.seed)
    try_models({"": model}, samples)
    with messages_by_flags():
        example = example_of(readable(samples, {"": model}), model)
        traced = trace(model, example, verify=settings.verify, seed=settings.seed)
    if plot is not None:
        draw(traced, plot)
    if as_json:
        facts = {**model_facts(traced), "plot": None if plot is None else str(plot)}
        print_json(facts if record is None else {**facts, "record": record})
        return
    print_text(summary(traced))
    if record is not None:
        print_text(f"\n{record_summary(record)}")
    print_line("picture", plot)


def _record(weights: Path, *, is_all: bool) -> dict[str, Any] | None:
    """Return the record of a file; one that cannot be read is an error where it is all there is."""
    from clafusion.interop.records import read_record

    try:
        return read_record(weights) if weights.is_file() else None
    except InputError:
        if is_all:
            raise
        return None


def _check_unused(arch: str | None, key: str | None, plot: Path | None) -> None:
    """Refuse what needs inputs, where none are given."""
    given = {"--arch": arch, "--checkpoint-key": key, "--plot": plot}
    unused = next((flag for flag, value in given.items() if value is not None), None)
    if unused is not None:
        raise InputError(
            f"{unused} needs inputs to run the model with: give --data FILE or --input-shape "
            "N,N,..."
        )


def _model(arch: str | None, weights: Path | None, key: str | None) -> nn.Module:
    from clafusion.interop.resolver import factory_of, holds_itself, load
    from clafusion.weights.factories import build_model, load_model

    if weights is not None and holds_itself(weights):
        if arch is not None or key is not None:
            given = "--arch" if arch is not None else "--checkpoint-key"
            raise InputError(f"{str(weights)!r} says itself what it holds: leave {given} out")
        return load(weights)
    if arch is None:
        raise InputError(
            "give what makes the model, --arch MODULE:FACTORY, or its Hugging Face directory"
        )
    factory = factory_of(arch)
    return build_model(factory) if weights is None else load_model(factory, weights, key)


def _random_samples(shape: str, seed: int) -> Tensor:
    """Return a few random samples of a shape, as typed."""
    import torch

    from clafusion.cli.parsing import numbers_of

    sizes = numbers_of("--input-shape", shape, int) or []
    if any(size < 1 for size in sizes):
        raise InputError(f"--input-shape takes numbers of at least 1; got {shape!r}")
    count = _ROWS * math.prod(sizes)
    if count > _MOST:
        raise InputError(
            f"--input-shape {shape}: {_ROWS} samples of {math.prod(sizes)} numbers would take "
            f"{4 * count / 1e9:.3g} GB; give the shape of one sample, without the batch axis"
        )
    return torch.randn(_ROWS, *sizes, generator=torch.Generator().manual_seed(seed))
