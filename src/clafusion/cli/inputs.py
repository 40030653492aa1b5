"""What commands have in common: data, memory and pictures, and the checks of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clafusion.cli.parsing import numbers_of
from clafusion.errors import InputError
from clafusion.interop.huggingface import input_names
from clafusion.interop.images import image_files, processed
from clafusion.interop.tokenizers import tokenised
from clafusion.memory import bytes_of
from clafusion.profiling.samples import load_graph, load_labels, load_named_samples, load_samples
from clafusion.profiling.texts import TEXT_ENDINGS, read_texts
from clafusion.weights.atomic import check_output

__all__ = ["DataOptions", "check_plot", "data_of", "labels_of", "memory_limit_of", "read_data"]

_BATCH_SIZE = 64  # samples of several inputs
_SEED = 0  # of the choice of samples where there are more than are wanted


@dataclass(frozen=True)
class DataOptions:
    """How a data file is read, as typed."""

    key: str | None
    shape: str | None
    scale: float | None
    mean: str | None
    std: str | None
    text_column: str | None = None
    max_length: int | None = None


def data_of(
    data: Path, limit: int, options: DataOptions, files: Mapping[str, Path]
) -> Tensor | list[dict[str, Tensor]]:
    """Return what is in a data file, for models in ``files``, as the flags say.

    Raises
    ------
    InputError
        As :func:`read_data`; or a number is not what its flag takes.
    """
    numbers = {
        "key": options.key,
        "shape": numbers_of("--shape", options.shape, int),
        "scale": options.scale,
        "mean": numbers_of("--mean", options.mean, float),
        "std": numbers_of("--std", options.std, float),
    }
    return read_data(
        data,
        next((file for file in files.values() if file.is_dir()), None),
        numbers,
        limit=limit,
        text_column=options.text_column,
        max_length=options.max_length,
        called=lambda name: {"key": "--data-key"}.get(name, f"--{name.replace('_', '-')}"),
    )


def read_data(
    data: Path,
    folder: Path | None,
    numbers: Mapping[str, Any],
    *,
    limit: int | None = None,
    text_column: str | None = None,
    max_length: int | None = None,
    called: Callable[[str], str],
) -> Tensor | list[dict[str, Tensor]]:
    """Return what is in a data file: texts as tokens, several inputs by name, or one tensor.

    A graph, which has an ``edge_index``, is whole, whatever the limit.

    Parameters
    ----------
    data
        The file.
    folder
        A Hugging Face directory, if one of the models is one.
    numbers
        The settings of :func:`clafusion.profiling.samples.load_samples`, None where not given.
    limit
        Take this many samples, of arrays chosen at random, for they may be sorted by class.
    text_column, max_length
        How texts are read.
    called
        What an error calls a setting.

    Raises
    ------
    InputError
        As ``load_samples`` and ``read_texts``; or there is no tokenizer, or a setting is for data
        of another kind.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{called('limit')} must be at least 1; got {limit}")
    is_text = data.suffix.lower() in TEXT_ENDINGS and not data.is_dir()
    of_texts = {"text_column": text_column, "max_length": max_length}
    unfitting = {**numbers, **of_texts} if data.is_dir() else numbers if is_text else of_texts
    wrong = next((name for name, value in unfitting.items() if value is not None), None)
    if wrong is not None:
        kind = "images" if data.is_dir() else "texts" if is_text else "no texts"
        raise InputError(f"{called(wrong)} does not fit the data {str(data)!r}, which holds {kind}")
    if data.is_dir():
        if folder is None:
            raise InputError(
                f"the data {str(data)!r} is a folder of images, and how they are prepared is known "
                "of Hugging Face directories only: give arrays (.npy, .npz)"
            )
        return processed(image_files(data, limit), folder)
    if is_text:
        if folder is None:
            raise InputError(
                f"the data {str(data)!r} holds texts, and a tokenizer is known of Hugging Face "
                "directories only: give tokens (.npy, .npz)"
            )
        if max_length is not None and max_length < 1:
            raise InputError(f"{called('max_length')} must be at least 1; got {max_length}")
        return tokenised(read_texts(data, text_column, limit), folder, max_length)
    graph = load_graph(data)
    if graph is not None:
        wrong = next((name for name, value in numbers.items() if value is not None), None)
        if wrong is not None:
            raise InputError(
                f"{called(wrong)} does not fit the data {str(data)!r}, which holds a graph: its "
                "arrays are taken as they are"
            )
        return [graph]
    if folder is not None and all(one is None for one in numbers.values()):
        named = load_named_samples(data, input_names(folder), limit, _SEED)
        if named:
            parts = [value.split(_BATCH_SIZE) for value in named.values()]
            return [dict(zip(named, one, strict=True)) for one in zip(*parts, strict=True)]
    return load_samples(data, limit=limit, seed=_SEED, **numbers)


def labels_of(data: Path, key: str | None, limit: int | None) -> Tensor | None:
    """Return the labels of the samples that :func:`data_of` reads; None for no key.

    Raises
    ------
    InputError
        As :func:`clafusion.profiling.samples.load_labels`, or the data are texts.
    """
    if key is None:
        return None
    if data.suffix.lower() in TEXT_ENDINGS:
        raise InputError(
            f"--labels {key}: the data {str(data)!r} holds texts, of which labels are not read: "
            "give tokens and labels as arrays (.npz)"
        )
    is_whole = not data.is_dir() and load_graph(data) is not None
    return load_labels(data, key, None if is_whole else limit, _SEED)


def memory_limit_of(given: str | None, device: str) -> int | None:
    """Return the bytes of ``--memory-limit``, which is for the CPU.

    Raises
    ------
    InputError
        It is no amount, or the device is another one.
    """
    limit = None if given is None else bytes_of(given, "--memory-limit")
    if limit is not None and device != "cpu":
        raise InputError(f"--memory-limit is for the CPU; --device is {device}: leave one out")
    return limit


def check_plot(plot: Path | None) -> None:
    """Refuse a picture that cannot be written."""
    if plot is not None:
        from clafusion.reports.plots import ENDINGS

        check_output(plot, ENDINGS, "--plot")
