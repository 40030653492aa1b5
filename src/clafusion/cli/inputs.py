"""What commands have in common: models and data, and the checks of these."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment.models import label
from clafusion.cli.parsing import numbers_of
from clafusion.errors import InputError
from clafusion.interop.huggingface import input_names
from clafusion.interop.images import image_files, processed
from clafusion.interop.inputs import readable
from clafusion.interop.resolver import factory_of, holds_itself, load, model_file
from clafusion.interop.tokenizers import tokenised
from clafusion.interop.vocabulary import check_alike
from clafusion.memory import bytes_of
from clafusion.profiling.batches import Data, first_batch
from clafusion.profiling.graphs import is_graph
from clafusion.profiling.samples import load_graph, load_labels, load_named_samples, load_samples
from clafusion.profiling.texts import TEXT_ENDINGS, read_texts
from clafusion.weights.atomic import check_output
from clafusion.weights.factories import ModelFile
from clafusion.weights.messages import one_line

__all__ = [
    "DataOptions",
    "LoadedFile",
    "archs_of",
    "check_plot",
    "data_of",
    "keys_of",
    "labels_of",
    "load_models",
    "loaded_files",
    "memory_limit_of",
    "model_files",
    "named_files",
    "read_data",
    "task_files",
    "try_models",
]

_BATCH_SIZE = 64  # samples of several inputs
_SEED = 0  # of the choice of samples where there are more than are wanted
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


def named_files(texts: Sequence[str], least: int = 2) -> dict[str, Path]:
    """Return each model's file by the model's name: as ``NAME=FILE`` says, or by its place.

    Raises
    ------
    InputError
        There are fewer than ``least``, or two of one name.
    """
    if len(texts) < least:
        raise InputError(f"give the weights of at least two models; got {len(texts)}")
    found: dict[str, Path] = {}
    for i, text in enumerate(texts):
        name = _ORDINALS[i] if i < len(_ORDINALS) else f"model{i + 1}"
        given, file = _name_and_file(text)
        name = given or name
        if name in found:
            raise InputError(f"two models are called {name!r}: name them by NAME=FILE")
        found[name] = file
    return found


def task_files(texts: Sequence[str], names: Iterable[str]) -> dict[str, Path]:
    """Return the file of each model's own task by the model's name, or one for all by "".

    Raises
    ------
    InputError
        There are several, and not one as ``NAME=FILE`` for each model.
    """
    given = [_name_and_file(one) for one in texts]
    if not given:
        return {}
    if len(given) == 1 and given[0][0] is None:
        return {"": given[0][1]}
    found = {str(name): file for name, file in given if name is not None}
    known = list(names)
    if len(found) < len(given) or found.keys() != set(known):
        raise InputError(
            "give --data once, or once for each model as NAME=FILE, with the models' names "
            f"({', '.join(known)}); got {', '.join(texts)}"
        )
    return found


def _name_and_file(text: str) -> tuple[str | None, Path]:
    """Return what ``NAME=FILE`` says; a file that is there may have "=" in its own name."""
    matched = None if Path(text).exists() else _NAMED.fullmatch(text)
    return (None, Path(text)) if matched is None else (matched["name"], Path(matched["file"]))


@dataclass(frozen=True)
class LoadedFile:
    """A network in a file that says what builds it, or with a factory."""

    path: Path
    factory: str | None

    def load(self, key: str | None, *, trust_code: bool) -> nn.Module:
        """Return the network; errors name ``--arch`` and ``--trust-code``."""
        if self.factory is not None:
            return ModelFile(factory_of(self.factory), self.path, key).load()
        try:
            return load(self.path, key=key, trust_code=trust_code)
        except InputError as error:
            told = str(error).partition(", or name it yourself")[0]
            raise InputError(
                told.replace("give trust_code=True", "give --trust-code, or name it by --arch")
            ) from error


def loaded_files(texts: Sequence[str], archs: Sequence[str] | None) -> dict[str, LoadedFile]:
    """Return networks by name: as ``NAME=FILE`` says, or as their files are called.

    One factory for all is that of the files of weights: a directory or .pt2 file is its own.

    Raises
    ------
    InputError
        Two have one name, or there are neither one factory nor as many as files.
    """
    found: dict[str, Path] = {}
    for text in texts:
        given, file = _name_and_file(text)
        name = given or text
        if name in found:
            raise InputError(f"two networks are called {name!r}: name them by NAME=FILE")
        found[name] = file
    if archs and len(archs) not in (1, len(found)):
        raise InputError(f"give --arch once, or once for each of the {len(found)} files")
    every: Sequence[str | None] = [None] * len(found)
    if archs:
        once = [None if holds_itself(file) else archs[0] for file in found.values()]
        every = archs if len(archs) == len(found) else once
    return {
        name: LoadedFile(file, factory)
        for (name, file), factory in zip(found.items(), every, strict=True)
    }


def archs_of(given: Sequence[str] | None, files: Mapping[str, Path]) -> dict[str, str]:
    """Return each model's factory by the model's name; a directory or .pt2 file is its own.

    Raises
    ------
    InputError
        There are neither one nor as many as models, or a file of weights has none.
    """
    of_files = [name for name, file in files.items() if not holds_itself(file)]
    if not given and of_files:
        raise InputError(
            f"{str(files[of_files[0]])!r} is no directory: give what makes that model, "
            "--arch MODULE:FACTORY"
        )
    if given and not of_files:
        raise InputError(f"these models say themselves what they are: leave --arch {given[0]} out")
    given = given or []
    if of_files and len(given) not in (1, len(files)):
        raise InputError(
            f"give --arch once, or once for each of the {len(files)} models "
            f"({', '.join(files)}); got {len(given)}"
        )
    every = given if len(given) == len(files) else [*given[:1]] * len(files)
    factories = dict(zip(files, map(factory_of, every), strict=False))
    return {
        name: factories[name] if name in of_files else str(file) for name, file in files.items()
    }


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


def model_files(
    files: Mapping[str, Path],
    archs: Mapping[str, str],
    keys: Mapping[str, str | None],
    vocabulary: str = "same",
) -> dict[str, ModelFile]:
    """Return the models by name; each is read when it is needed.

    Directories must have the same labels, and the same tokens if ``vocabulary`` says so.
    """
    found: dict[str, ModelFile] = {}
    for name, file in files.items():
        whole = model_file(file) if holds_itself(file) else None
        if whole is not None:
            found[name] = whole
            try:
                whole.check()
            except InputError as error:
                raise InputError(f"{label(name)}: {error}") from error
        else:
            found[name] = ModelFile(archs[name], file, keys[name])
    check_alike(found, vocabulary)
    return found


def load_models(models: Mapping[str, ModelFile]) -> dict[str, nn.Module]:
    """Return the models with their weights; errors are those of ``ModelFile.load``."""
    return {name: one.load() for name, one in models.items()}


def try_models(models: Mapping[str, nn.Module], samples: Data) -> None:
    """Run each model once, so that unfitting data shows before anything takes long.

    Raises
    ------
    InputError
        A model does not run on the data.
    """
    inputs = first_batch(readable(samples, models))
    for name, model in models.items():
        try:
            with torch.no_grad():
                if isinstance(inputs, Mapping):
                    is_whole = is_graph(inputs)
                    model(**{name: one if is_whole else one[:2] for name, one in inputs.items()})
                else:
                    model(inputs[:2])
        except Exception as error:
            called = f"model {name!r}" if name else "the model"
            shown = (
                ", ".join(f"{name} {tuple(one.shape[1:])}" for name, one in inputs.items())
                if isinstance(inputs, Mapping)
                else f"{tuple(samples.shape[1:])}, {samples.dtype}"
                if isinstance(samples, Tensor)
                else "unknown"
            )
            raise InputError(
                f"{called} does not run on the data (a sample has shape {shown}): {one_line(error)}"
                f"{_fitting_shape(model, samples)}"
            ) from error


@torch.no_grad()
def _fitting_shape(model: nn.Module, samples: Data) -> str:
    """Return the end of a message: in which shape of the samples a model runs; "" for none."""
    if not isinstance(samples, Tensor) or samples.dim() < 2:
        return ""
    size = tuple(samples.shape[1:])
    side = math.isqrt(size[0])
    possible = [(1, *size), (math.prod(size),), (*size[:1], 1, *size[1:])]
    if len(size) == 1 and side * side == size[0]:
        possible.append((1, side, side))
    for shape in possible:
        try:
            model(samples[:2].reshape(-1, *shape))
        except Exception:
            continue
        return f". It runs with --shape {','.join(map(str, shape))}"
    if len(size) == 3 and size[-1] in (1, 3, 4):
        try:
            model(samples[:2].permute(0, 3, 1, 2))
        except Exception:
            return ""
        return ". It runs where the channels come first: write the data as (samples, channels, ...)"
    return ""


# --- data, device and pictures ------------------------------------------------------------------


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
