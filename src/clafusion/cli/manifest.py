"""A file that says which models are fused, on which data and how."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from clafusion.errors import InputError
from clafusion.fusion import FusionConfig
from clafusion.weights.files import ModelFile, check_input

__all__ = ["Manifest", "read_manifest"]

_KEYS = ("models", "factory", "pairs", "data", "settings", "out")
_DATA_KEYS = ("file", "key", "limit", "shape", "scale", "mean", "std")


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
        Arguments of :func:`clafusion.profiling.samples.load_samples`.
    config
        Settings of :func:`clafusion.fuse`.
    out
        Directory for the results, or None.
    """

    models: Mapping[str, ModelFile]
    pairs: list[tuple[str, str]] | str
    data: Mapping[str, Any]
    config: FusionConfig
    out: Path | None


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a ``.yaml``, ``.yml`` or ``.json`` file.

    Its entries: ``models`` maps names to ``{factory: MODULE:FACTORY, weights: FILE}``, or to
    ``FILE`` alone where ``factory`` gives the factory of all; ``pairs`` is ``all`` (the default),
    a list of pairs of names, or ``{base: NAME}`` for every model with that one first; ``data`` is
    a file or ``{file: FILE, limit: N, shape: [..], scale: X, mean: [..], std: [..], key: NAME}``;
    ``settings`` are those of :func:`clafusion.fuse`; ``out`` is the directory for the results.

    Raises
    ------
    InputError
        The file is missing or cannot be read, an entry is unknown, missing, there twice or of
        another form, or a file that it names is missing.
    """
    file = check_input(path, (".yaml", ".yml", ".json"), "manifest")
    try:
        text = file.read_text(encoding="utf-8-sig")
        # YAML's own reading of numbers differs from JSON's, for example of 1e-3.
        if file.suffix.lower() == ".json":
            found = json.loads(text, object_pairs_hook=_unique)
        else:
            found = yaml.load(text, _Loader)
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        shown = " ".join(str(error).split())
        raise InputError(f"manifest {str(path)!r} cannot be read: {shown}") from error
    root = file.resolve().parent
    try:
        return _manifest(found, root)
    except InputError as error:
        raise InputError(f"manifest {str(path)!r}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses what YAML takes silently: an entry that is there twice, a name that is no text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                problem = f"the name {key.value} is read as {name!r}: put it in quotes"
            elif name in names:
                problem = f"the entry {name!r} is there twice"
            else:
                names.add(name)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entries:
        if name in found:
            raise ValueError(f"the entry {name!r} is there twice")
        found[name] = value
    return found


def _manifest(found: Any, root: Path) -> Manifest:
    entries = _entries(found, "it", _KEYS)
    if not isinstance(entries.get("models"), Mapping) or not entries["models"]:
        raise InputError("models must map names to weights")
    common = entries.get("factory")
    models = {
        name: _model(f"models, {name}", one, common, root)
        for name, one in entries["models"].items()
    }
    data = entries.get("data")
    data = {"file": data} if isinstance(data, str) else _entries(data, "data", _DATA_KEYS)
    if not isinstance(data.get("file"), str):
        raise InputError("data must name a file of inputs")
    for key in ("mean", "std", "shape"):
        value = data.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) or key == "shape" else [value]
        is_right = _is_whole if key == "shape" else _is_number
        values = values if key == "shape" else _numbers(values)
        if not (isinstance(values, list) and values and all(map(is_right, values))):
            raise InputError(f"data, {key} must be a list of finite numbers; got {value!r}")
        data[key] = values
    (data["scale"],) = _numbers([data.get("scale")])
    for key, is_right in (("limit", _is_whole), ("scale", _is_number), ("key", _is_text)):
        if data.get(key) is not None and not is_right(data[key]):
            raise InputError(f"data, {key} is not possible as {data[key]!r}")
    known = [one.name for one in fields(FusionConfig)]
    settings = _entries(entries.get("settings") or {}, "settings", known)
    for name in ("weight", "epsilon", "zip_budget", "lean"):
        value = settings.get(name)
        (number,) = _numbers([value])
        if isinstance(number, str) and not (name == "lean" and value == "auto"):
            raise InputError(f"settings, {name} must be a number; got {value!r}")
        if name in settings:
            settings[name] = number
    out = entries.get("out")
    if out is not None and not isinstance(out, str):
        raise InputError(f"out must be a directory; got {out!r}")
    pairs = _pairs(entries.get("pairs", "all"), models)
    if not pairs or (pairs == "all" and len(models) < 2):
        raise InputError("pairs has no pair: name two models at least")
    return Manifest(
        models,
        pairs,
        {**data, "file": root / data["file"]},
        FusionConfig(**settings),
        None if out is None else root / out,
    )


def _entries(found: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where} must be a mapping of {', '.join(known)}; got {found!r}")
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise InputError(f"{where} has an unknown entry {unknown[0]!r}; known: {', '.join(known)}")
    return dict(found)


def _model(where: str, found: Any, common: Any, root: Path) -> ModelFile:
    one = {"weights": found} if isinstance(found, str) else found
    one = _entries(one, where, ("factory", "weights"))
    factory = one.get("factory", common)
    if factory is None:
        raise InputError(f"{where}: factory is missing; write MODULE:FACTORY")
    if not isinstance(factory, str):
        raise InputError(f"{where}: factory must be MODULE:FACTORY; got {factory!r}")
    if not isinstance(one.get("weights"), str):
        raise InputError(f"{where}: weights must name a file")
    module, colon, call = factory.partition(":")
    if module.endswith(".py"):
        factory = f"{root / module}{colon}{call}"
    file = ModelFile(factory, root / one["weights"])
    try:
        file.check()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return file


def _pairs(found: Any, models: Mapping[str, ModelFile]) -> list[tuple[str, str]] | str:
    if found in ("all", "all-pairs"):
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


def _numbers(values: list[Any]) -> list[Any]:
    """Return the values, those as numbers that YAML 1.1 takes for text, such as 1e-3."""
    found = []
    for one in values:
        try:
            found.append(float(one) if isinstance(one, str) else one)
        except ValueError:
            found.append(one)
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
