"""A model is a text: a directory, a factory with a file, a name of timm or torchvision."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from clafusion.errors import InputError
from clafusion.interop.huggingface import ModelDirectory
from clafusion.weights.factories import ModelFile, build_model, load_model
from clafusion.weights.messages import one_line
from clafusion.weights.state_files import file_digest

__all__ = ["ExportedProgram", "factory_of", "holds_itself", "load", "model_file"]

_EXPORTED = ".pt2"
_NAMED = re.compile(r"(?P<library>timm|torchvision):(?P<name>[\w./-]+)")
_MAKERS = {"timm": "timm:create_model({!r})", "torchvision": "torchvision.models:get_model({!r})"}


@dataclass(frozen=True)
class ExportedProgram(ModelFile):
    """A network in a file of ``torch.export.save``, which is read when the network is needed.

    Attributes
    ----------
    factory
        What errors call its architecture: the file.
    path
        The file, ``.pt2``.
    key
        None.
    """

    def load(self) -> nn.Module:
        """Return the network with its weights."""
        return _exported(self.path)

    def open(self) -> tuple[nn.Module, frozenset[str]]:
        """Return the network, whose weights are all in memory."""
        return self.load(), frozenset()

    def build(self) -> nn.Module:
        """Return a network of the same architecture; it has the same weights."""
        return self.load()

    def check(self) -> None:
        """Refuse a file that is not there."""
        if not Path(self.path).is_file():
            raise InputError(f"{os.fspath(self.path)!r} does not exist")

    def digest(self) -> str:
        """Return the SHA-256 of the file."""
        return file_digest(Path(self.path))


def holds_itself(path: str | os.PathLike[str]) -> bool:
    """Say whether a path says what the network is: a directory, or an exported program."""
    return Path(path).is_dir() or Path(path).suffix.lower() == _EXPORTED


def load(
    spec: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    key: str | None = None,
) -> nn.Module:
    """Return a trained network, in eval mode. Nothing is downloaded.

    Parameters
    ----------
    spec
        A Hugging Face directory (its ``config.json``, its weights in one or more files, perhaps an
        adapter, which is merged); or a factory ``MODULE:FACTORY``, as ``nets.py:make(depth=20)``;
        or ``timm:NAME`` or ``torchvision:NAME``; or a file that ``torch.export.save`` wrote
        (``.pt2``), whose batch size must be free.
    weights
        The file of the weights, for all but a directory. Without it a factory of your own gives
        the network its weights.
    key
        Which state dict of a file that holds several; see :class:`clafusion.ModelFile`.

    Raises
    ------
    InputError
        There is no such model, its library is missing, or its weights are missing or do not fit;
        the message says what to do.

    Examples
    --------
    >>> model = clafusion.load("./bert-6")  # doctest: +SKIP
    >>> model = clafusion.load("nets.py:resnet(depth=20)", "resnet20.safetensors")  # doctest: +SKIP
    """
    if weights is not None and not holds_itself(spec):
        return load_model(factory_of(_factory_text(spec)), weights, key)
    found = model_file(spec, weights, key)
    if found is not None:
        return found.load()
    text = _factory_text(spec)
    if key is not None:
        raise InputError(f"key={key!r} chooses from a file of weights, and none is given")
    if _NAMED.fullmatch(text):
        raise InputError(
            f"{text!r} is an architecture without weights: give their file, too, as nothing is "
            "downloaded"
        )
    return build_model(text)


def _exported(path: str | os.PathLike[str]) -> nn.Module:
    """Return the module of an exported program, which holds its weights."""
    if not Path(path).is_file():
        raise InputError(f"{os.fspath(path)!r} does not exist")
    try:
        loaded: nn.Module = torch.export.load(path).module()
    except Exception as error:
        raise InputError(
            f"{os.fspath(path)!r} is no program that torch.export.save wrote, or of another "
            f"release: {one_line(error)}"
        ) from error
    # They refuse to be called: a program has one mode, and it stays as it is.
    for name in ("train", "eval"):
        vars(loaded).pop(name, None)
    return loaded


def model_file(
    spec: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    key: str | None = None,
) -> ModelFile | None:
    """Return a model that is read when it is needed; None for a factory without weights.

    Raises
    ------
    InputError
        A directory or an exported program is given with a file of weights or a key.
    """
    if holds_itself(spec):
        if weights is not None or key is not None:
            what = "weights" if weights is not None else "key"
            raise InputError(f"{os.fspath(spec)!r} holds its own weights: leave out {what}")
        kind = ModelDirectory if Path(spec).is_dir() else ExportedProgram
        return kind(os.fspath(spec), spec)
    if weights is None:
        return None
    return ModelFile(factory_of(_factory_text(spec)), weights, key)


def factory_of(text: str) -> str:
    """Return a factory ``MODULE:FACTORY``, also for a name of timm or torchvision."""
    named = _NAMED.fullmatch(text.strip())
    return text if named is None else _MAKERS[named["library"]].format(named["name"])


def _factory_text(spec: str | os.PathLike[str]) -> str:
    """Return a factory's text; refuse what is a path of another kind, or nothing known."""
    text = os.fspath(spec)
    if ":" not in text or Path(text).exists():
        kind = "is a file, whose architecture is unknown" if Path(text).exists() else "is not there"
        raise InputError(
            f"{text!r} {kind}: give a Hugging Face directory, or a factory MODULE:FACTORY and a "
            "file of weights. Nothing is downloaded: of a model on a hub fetch the directory first"
        )
    return text
