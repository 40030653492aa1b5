"""A file that says which models are fused, on which data and how."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clafusion.batch.named_tasks import NamedTask
from clafusion.cli.entries import data_entry, entries_of
from clafusion.cli.manifest_tasks import tasks_of
from clafusion.cli.settings import configs_of, read_mapping, rooted
from clafusion.config import FusionConfig
from clafusion.errors import InputError
from clafusion.interop.resolver import factory_of, holds_itself, model_file
from clafusion.stages import merge_weights
from clafusion.weights.factories import ModelFile

__all__ = ["KEYS", "Manifest", "read_manifest"]

KEYS = (
    "models",
    "factory",
    "pairs",
    "merges",
    "reassemblies",
    "data",
    "weights",
    "settings",
    "out",
)


@dataclass(frozen=True)
class Manifest:
    """What a manifest says; relative paths in it are relative to the file itself.

    Attributes
    ----------
    models
        Name -> model.
    pairs
        Pairs of names, or ``"all"``; an empty list where there are merges or reassemblies only.
    data
        Arguments of :func:`clafusion.profiling.samples.load_samples`, and how texts are read;
        empty where nothing needs data.
    weights
        Weights of the first and the second model of each pair, or None for equal ones.
    configs
        The options, see :class:`clafusion.FusionConfig`; several where entries are lists.
    out
        Directory for the results, or None.
    tasks
        The merges and reassemblies, one for each combination of settings. Their data are
        :class:`clafusion.cli.entries.DataEntry`, which are not read yet.
    """

    models: Mapping[str, ModelFile]
    pairs: list[tuple[str, str]] | str
    data: Mapping[str, Any]
    weights: tuple[float, float] | None
    configs: tuple[FusionConfig, ...]
    out: Path | None
    tasks: tuple[NamedTask, ...] = ()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a ``.yaml``, ``.yml`` or ``.json`` file.

    Its entries: ``models`` maps names to ``{factory: MODULE:FACTORY, weights: FILE, key: KEY}``,
    the key only for a file of several state dicts, or to ``FILE`` alone where ``factory`` gives the
    factory of all, or to a Hugging Face directory; ``pairs`` is ``all`` (the default where there
    are no merges and reassemblies), a list of pairs of names, or ``{base: NAME}`` for every model
    with that one first; ``merges`` maps names of results to ``{base: NAME, models: [..], weights:
    [..], data: .., settings: {..}, memory_limit: SIZE}``, with settings of
    :class:`clafusion.MergeConfig`; ``reassemblies`` to ``{models: [..], data: .., settings: {..}}``
    with those of :class:`clafusion.ReassemblyConfig`; ``data`` is a file or
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
    entries = entries_of(found, "it", KEYS)
    if not isinstance(entries.get("models"), Mapping) or not entries["models"]:
        raise InputError("models must map names to weights")
    common = entries.get("factory")
    models = {
        name: _model(f"models, {name}", one, common, root)
        for name, one in entries["models"].items()
    }
    given = None if entries.get("data") is None else data_entry(entries["data"], root)
    tasks = tasks_of(entries.get("merges"), entries.get("reassemblies"), models, given, root)
    pairs = _pairs(entries.get("pairs", [] if tasks else "all"), models)
    if (not pairs and not tasks) or (pairs == "all" and len(models) < 2):
        raise InputError("pairs has no pair: name two models at least")
    if pairs and given is None:
        raise InputError("data must name a file of inputs")
    for name in ("settings", "weights"):
        if not pairs and entries.get(name) is not None:
            raise InputError(
                f"{name} are those of pairs, and there is no pair: merges and reassemblies have "
                f"their own, as merges: {{NAME: {{{name}: ..}}}}"
            )
    weights = _weights(entries.get("weights"))
    settings = entries.get("settings")
    configs = configs_of({} if settings is None else settings, "settings", root)
    out = entries.get("out")
    if out is not None and not isinstance(out, str):
        raise InputError(f"out must be a directory; got {out!r}")
    return Manifest(
        models,
        pairs,
        {} if given is None else given.settings,
        weights,
        configs,
        None if out is None else root / out,
        tasks,
    )


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


def _model(where: str, found: Any, common: Any, root: Path) -> ModelFile:
    if isinstance(found, str) and holds_itself(root / found):
        whole = model_file(root / found)
        assert whole is not None, "it holds itself"
        return _checked(where, whole)
    one = {"weights": found} if isinstance(found, str) else found
    one = entries_of(one, where, ("factory", "weights", "key"))
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
        base = entries_of(found, "pairs", ("base",)).get("base")
        if not isinstance(base, str) or base not in models:
            raise InputError(f"pairs, base names {base!r}, which models does not have")
        return [(base, name) for name in models if name != base]
    if not isinstance(found, list) or not all(isinstance(p, list) and len(p) == 2 for p in found):
        raise InputError(f"pairs must be all, a list of pairs or base: NAME; got {found!r}")
    for name in chain.from_iterable(found):
        if not isinstance(name, str):
            raise InputError(f"pairs has {name!r}, which is no name: put it in quotes")
    return [(first, second) for first, second in found]
