"""A file that says which models are fused, on which data and how."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from clafusion.checkpoints import ModelFile, check_input
from clafusion.errors import InputError
from clafusion.pipeline import FusionConfig

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
        Arguments of :func:`clafusion.samples.load_samples`.
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
        The file is missing or cannot be read, or an entry is unknown, missing or of another form.
    """
    file = check_input(path, (".yaml", ".yml", ".json"), "manifest")
    try:
        text = file.read_text(encoding="utf-8")
        # YAML's own reading of numbers differs from JSON's, for example of 1e-3.
        found = json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        shown = " ".join(str(error).split())
        raise InputError(f"manifest {str(path)!r} cannot be read: {shown}") from error
    root = file.resolve().parent
    try:
        return _manifest(found, root)
    except InputError as error:
        raise InputError(f"manifest {str(path)!r}: {error}") from error


def _manifest(found: Any, root: Path) -> Manifest:
    entries = _entries(found, "it", _KEYS)
    if not isinstance(entries.get("models"), Mapping) or not entries["models"]:
        raise InputError("models must map names to weights")
    common = entries.get("factory")
    models = {
        str(name): _model(f"models, {name}", one, common, root)
        for name, one in entries["models"].items()
    }
    data = entries.get("data")
    data = {"file": data} if isinstance(data, str) else _entries(data, "data", _DATA_KEYS)
    if not isinstance(data.get("file"), str):
        raise InputError("data must name a file of inputs")
    for key in ("mean", "std"):
        if isinstance(data.get(key), (int, float)):
            data[key] = [data[key]]
    for key in ("mean", "std", "shape"):
        value = data.get(key)
        if value is not None and not (
            isinstance(value, list)
            and all(isinstance(one, int if key == "shape" else (int, float)) for one in value)
        ):
            raise InputError(f"data, {key} must be a list of numbers; got {value!r}")
    for key, kind in (("limit", int), ("scale", (int, float)), ("key", str)):
        if data.get(key) is not None and not isinstance(data[key], kind):
            raise InputError(f"data, {key} is not possible as {data[key]!r}")
    known = [one.name for one in fields(FusionConfig)]
    settings = _entries(entries.get("settings") or {}, "settings", known)
    for name in ("weight", "epsilon"):
        if isinstance(settings.get(name), str):  # YAML 1.1 takes 1e-3 for text
            settings[name] = _number(settings[name], name)
    out = entries.get("out")
    if out is not None and not isinstance(out, str):
        raise InputError(f"out must be a directory; got {out!r}")
    return Manifest(
        models,
        _pairs(entries.get("pairs", "all"), models),
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
    if not isinstance(factory, str):
        raise InputError(f"{where}: factory is missing; write MODULE:FACTORY")
    if not isinstance(one.get("weights"), str):
        raise InputError(f"{where}: weights must name a file")
    module, colon, call = factory.partition(":")
    if module.endswith(".py"):
        factory = f"{root / module}{colon}{call}"
    return ModelFile(factory, root / one["weights"])


def _pairs(found: Any, models: Mapping[str, ModelFile]) -> list[tuple[str, str]] | str:
    if found in ("all", "all-pairs"):
        return "all"
    if isinstance(found, Mapping):
        base = str(_entries(found, "pairs", ("base",)).get("base"))
        if base not in models:
            raise InputError(f"pairs, base names {base!r}, which models does not have")
        return [(base, name) for name in models if name != base]
    if not isinstance(found, list) or not all(isinstance(p, list) and len(p) == 2 for p in found):
        raise InputError(f"pairs must be all, a list of pairs or base: NAME; got {found!r}")
    return [(str(first), str(second)) for first, second in found]


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"settings, {name} must be a number; got {text!r}") from error
