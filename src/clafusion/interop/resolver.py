"""A model is a text: a directory, a factory with a file, a name of timm or torchvision."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from clafusion.errors import InputError, kind_of
from clafusion.interop.huggingface import ModelDirectory
from clafusion.interop.programs import PROGRAM, load_program
from clafusion.interop.rebuilding import built_again, filled_copy
from clafusion.interop.records import read_record
from clafusion.weights.atomic import path_of
from clafusion.weights.factories import ModelFile, build_model, load_model
from clafusion.weights.state_files import file_digest

__all__ = ["ExportedProgram", "factory_of", "holds_itself", "load", "model_file"]

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
        return load_program(self.path)

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
    return Path(path).is_dir() or Path(path).suffix.lower() == PROGRAM


def load(
    spec: str | os.PathLike[str] | nn.Module,
    weights: str | os.PathLike[str] | None = None,
    *,
    key: str | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """Return a trained network, in eval mode. Nothing is downloaded.

    Parameters
    ----------
    spec
        A Hugging Face directory (its ``config.json``, its weights in one or more files, perhaps an
        adapter, which is merged); or a factory ``MODULE:FACTORY``, as ``nets.py:make(depth=20)``;
        or ``timm:NAME`` or ``torchvision:NAME``; or a file that ``torch.export.save`` wrote
        (``.pt2``), whose batch size must be free; or a file that ``result.save`` wrote; or a module
        whose structure the network has, perhaps in other widths: a copy of it gets the weights.
    weights
        The file of the weights, for all but a directory. Without it a factory of your own gives
        the network its weights.
    key
        Which state dict of a file that holds several; see :class:`clafusion.ModelFile`.
    trust_code
        Whether a factory of yours may be run because a file of ``result.save`` names it. No other
        code of a file is ever run.

    Raises
    ------
    InputError
        There is no such model, its library is missing, or its weights are missing or do not fit;
        the message says what to do.

    Examples
    --------
    >>> model = clafusion.load("./bert-6")  # doctest: +SKIP
    >>> model = clafusion.load("fused.safetensors")  # doctest: +SKIP
    >>> model = clafusion.load("nets.py:resnet(depth=20)", "resnet20.safetensors")  # doctest: +SKIP
    >>> model = clafusion.load(Net(20), "fused/a+b.safetensors")  # doctest: +SKIP
    """
    if isinstance(spec, nn.Module):
        if weights is None or key is not None:
            raise InputError(
                f"load({type(spec).__name__}, weights) takes a file of weights that clafusion "
                "wrote, and no key"
            )
        return filled_copy(spec, path_of(weights, "weights"))
    if weights is not None:
        path_of(weights, "weights")
    if not isinstance(spec, (str, os.PathLike)):
        raise InputError(
            "load takes a directory, a file, a factory MODULE:FACTORY or a module; got "
            f"{kind_of(spec)}"
        )
    if weights is None and Path(spec).is_file() and not holds_itself(spec):
        record = read_record(Path(spec))
        if record is not None:
            return built_again(Path(spec), record["architecture"], trust_code=trust_code)
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
        there = Path(text).exists()
        kind = "is a file, whose architecture is unknown" if there else "is not there"
        raise InputError(
            f"{text!r} {kind}: give a Hugging Face directory, or a factory MODULE:FACTORY and a "
            "file of weights. Nothing is downloaded: of a model on a hub fetch the directory first"
        )
    return text
