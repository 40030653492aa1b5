"""A file that says which models are fused, on which data and how."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clafusion.cli.settings import configs_of, read_mapping, rooted
from clafusion.config import FusionConfig
from clafusion.errors import InputError
from clafusion.interop.resolver import factory_of, holds_itself, model_file
from clafusion.stages import merge_weights
from clafusion.weights.factories import ModelFile

__all__ = ["DATA_KEYS", "KEYS", "Manifest", "read_manifest"]

KEYS = ("models", "factory", "pairs", "data", "weights", "settings", "out")
DATA_KEYS = (
    "file",
    "key",
    "limit",
    "shape",
    "scale",
    "mean",
    "std",
    "text_column",
    "max_length",
    "labels",
)


@dataclass(frozen=True)
class Manifest:
    """What a manifest says; relative paths in it are relative to the file itself.

    Attributes
    ----------
    models
        Name -> model.
    pairs
        Pairs of names, or ``"all"``.
    data
        Arguments of :func:`clafusion.profiling.samples.load_samples`, and how texts are read.
    weights
        Weights of the first and the second model of each pair, or None for equal ones.
    configs
        The options, see :class:`clafusion.FusionConfig`; several where entries are lists.
    out
        Directory for the results, or None.
    """

    models: Mapping[str, ModelFile]
    pairs: list[tuple[str, str]] | str
    data: Mapping[str, Any]
    weights: tuple[float, float] | None
    configs: tuple[FusionConfig, ...]
    out: Path | None


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a ``.yaml``, ``.yml`` or ``.json`` file.

    Its entries: ``models`` maps names to ``{factory: MODULE:FACTORY, weights: FILE, key: KEY}``,
    the key only for a file of several state dicts, or to ``FILE`` alone where ``factory`` gives the
    factory of all, or to a Hugging Face directory; ``pairs`` is ``all`` (the default), a list of
    pairs of names, or ``{base: NAME}`` for every model with that one first; ``data`` is a file or
    ``{file: FILE, limit: N, shape: [..], scale: X, mean: [..], std: [..], key: NAME}``,
    of texts with ``text_column: NAME, max_length: N``, and with ``labels: NAME`` for the array of
    that file that holds labels;
    ``weights`` are two numbers, of the first and the second model; ``settings`` is the nested
    mapping of :class:`clafusion.FusionConfig`, in which a list stands for several values, so that
    the pairs are fused by every combination; ``out`` is the directory for the results.

    Raises
    ------
    InputError
        The file is missing or cannot be read, an entry is unknown, missing, there twice or of
        another form, or a file that it names is missing.
    """
    found = read_mapping(path, "manifest")
    try:
        return _manifest(found, Path(path).resolve().parent)
    except InputError as error:
        raise InputError(f"manifest {str(path)!r}: {error}") from error


def _manifest(found: Any, root: Path) -> Manifest:
    entries = _entries(found, "it", KEYS)
    if not isinstance(entries.get("models"), Mapping) or not entries["models"]:
        raise InputError("models must map names to weights")
    common = entries.get("factory")
    models = {
        name: _model(f"models, {name}", one, common, root)
        for name, one in entries["models"].items()
    }
    data = _data(entries.get("data"), root)
    weights = _weights(entries.get("weights"))
    settings = entries.get("settings")
    configs = configs_of({} if settings is None else settings, "settings", root)
    out = entries.get("out")
    if out is not None and not isinstance(out, str):
        raise InputError(f"out must be a directory; got {out!r}")
    pairs = _pairs(entries.get("pairs", "all"), models)
    if not pairs or (pairs == "all" and len(models) < 2):
        raise InputError("pairs has no pair: name two models at least")
    return Manifest(models, pairs, data, weights, configs, None if out is None else root / out)


def _data(found: Any, root: Path) -> dict[str, Any]:
    """Return the arguments of ``load_samples``."""
    data: dict[str, Any]
    data = {"file": found} if isinstance(found, str) else _entries(found, "data", DATA_KEYS)
    if not isinstance(data.get("file"), str):
        raise InputError("data must name a file of inputs")
    for key in ("mean", "std", "shape"):
        value = data.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) or key == "shape" else [value]
        is_right = _is_whole if key == "shape" else _is_number
        if not (isinstance(values, list) and values and all(map(is_right, values))):
            raise InputError(f"data, {key} must be a list of finite numbers; got {value!r}")
        data[key] = values
    for key, is_right in (
        ("limit", _is_whole),
        ("scale", _is_number),
        ("key", _is_text),
        ("labels", _is_text),
        ("text_column", _is_text),
        ("max_length", _is_whole),
    ):
        if data.get(key) is not None and not is_right(data[key]):
            raise InputError(f"data, {key} is not possible as {data[key]!r}")
    return {**data, "file": root / data["file"]}


def _weights(found: Any) -> tuple[float, float] | None:
    if found is None:
        return None
    if not isinstance(found, list):
        raise InputError(
            "weights must be two numbers, of the first and the second model of each pair; got "
            f"{found!r}"
        )
    merge_weights(found, ("first", "second"))  # which refuses what are no weights
    return float(found[0]), float(found[1])


def _entries(found: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where} must be a mapping of {', '.join(known)}; got {found!r}")
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise InputError(f"{where} has an unknown entry {unknown[0]!r}; known: {', '.join(known)}")
    return dict(found)


def _model(where: str, found: Any, common: Any, root: Path) -> ModelFile:
    if isinstance(found, str) and holds_itself(root / found):
        whole = model_file(root / found)
        assert whole is not None, "it holds itself"
        return _checked(where, whole)
    one = {"weights": found} if isinstance(found, str) else found
    one = _entries(one, where, ("factory", "weights", "key"))
    factory = one.get("factory", common)
    if factory is None:
        raise InputError(f"{where}: factory is missing; write MODULE:FACTORY")
    if not isinstance(factory, str):
        raise InputError(f"{where}: factory must be MODULE:FACTORY; got {factory!r}")
    if not isinstance(one.get("weights"), str):
        raise InputError(f"{where}: weights must name a file")
    key = one.get("key")
    if key is not None and not isinstance(key, str):
        raise InputError(f"{where}: key must be a text; got {key!r}")
    return _checked(where, ModelFile(rooted(factory_of(factory), root), root / one["weights"], key))


def _checked(where: str, file: ModelFile) -> ModelFile:
    try:
        file.check()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return file


def _pairs(found: Any, models: Mapping[str, ModelFile]) -> list[tuple[str, str]] | str:
    if found == "all":
        return "all"
    if isinstance(found, Mapping):
        base = _entries(found, "pairs", ("base",)).get("base")
        if not isinstance(base, str) or base not in models:
            raise InputError(f"pairs, base names {base!r}, which models does not have")
        return [(base, name) for name in models if name != base]
    if not isinstance(found, list) or not all(isinstance(p, list) and len(p) == 2 for p in found):
        raise InputError(f"pairs must be all, a list of pairs or base: NAME; got {found!r}")
    for name in chain.from_iterable(found):
        if not isinstance(name, str):
            raise InputError(f"pairs has {name!r}, which is no name: put it in quotes")
    return [(first, second) for first, second in found]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
