"""Models as commands are given them: files, factories and keys -> networks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clafusion.alignment.models import label
from clafusion.cli.inputs import DataOptions, data_of
from clafusion.errors import InputError
from clafusion.interop.inputs import readable
from clafusion.interop.resolver import factory_of, holds_itself, load, model_file
from clafusion.interop.vocabulary import check_alike
from clafusion.profiling.batches import Data, first_batch
from clafusion.profiling.graphs import is_graph
from clafusion.weights.factories import ModelFile
from clafusion.weights.messages import one_line

__all__ = [
    "GivenModels",
    "LoadedFile",
    "given_models",
    "keys_of",
    "load_models",
    "loaded_files",
    "task_files",
    "try_models",
]

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


@dataclass(frozen=True)
class GivenModels:
    """Models as a command gets them: files, what makes them, and which key of a file counts.

    Attributes
    ----------
    files, archs, keys
        By the models' names: see :func:`named_files`, :func:`archs_of` and :func:`keys_of`.
    """

    files: Mapping[str, Path]
    archs: Mapping[str, str]
    keys: Mapping[str, str | None]

    def opened(self, vocabulary: str = "same") -> dict[str, ModelFile]:
        """Return the models by name; each is read when it is needed: see :func:`model_files`."""
        return model_files(self.files, self.archs, self.keys, vocabulary)

    def with_data(
        self, data: Path, limit: int, options: DataOptions
    ) -> tuple[dict[str, nn.Module], Data]:
        """Return the models with their weights, and the data, on which each of them ran once.

        Raises
        ------
        InputError
            As for :func:`model_files`, :func:`data_of`, ``ModelFile.load`` and :func:`try_models`.
        """
        known = self.opened()
        samples = data_of(data, limit, options, self.files)
        models = load_models(known)
        try_models(models, samples)
        return models, samples


def given_models(
    weights: Sequence[str],
    archs: Sequence[str] | None,
    keys: Sequence[str] | None,
    base: str | None = None,
) -> GivenModels:
    """Return what a command was given as models, checked as far as nothing is read.

    Parameters
    ----------
    weights
        The models' files, as ``[NAME=]FILE``; two at least, or one besides a base.
    archs, keys
        What ``--arch`` and ``--checkpoint-key`` say.
    base
        The file of the network that a merge's models were trained from. It comes first.

    Raises
    ------
    InputError
        As for :func:`named_files`, :func:`archs_of` and :func:`keys_of`; or a model is called as
        the base is.
    """
    files = named_files(weights, least=2 if base is None else 1)
    if base is not None:
        from clafusion.one_origin.result import BASE

        if BASE in files:
            raise InputError(
                f"no model can be called {BASE!r}, as the base is: name it by NAME=FILE"
            )
        files = {BASE: Path(base), **files}
    return GivenModels(files, archs_of(archs, files), keys_of(keys, list(files)))


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
