"""The merges and reassemblies of a manifest, each by a name of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clafusion.batch.grid import expanded
from clafusion.batch.named_tasks import MergeTask, NamedTask, ReassemblyTask
from clafusion.cli.entries import DataEntry, data_entry, entries_of, names_of
from clafusion.config import MergeConfig, ReassemblyConfig, Settings
from clafusion.errors import InputError
from clafusion.memory import bytes_of

__all__ = ["tasks_of"]

_MERGE_KEYS = ("base", "models", "weights", "data", "settings", "memory_limit")
_REASSEMBLY_KEYS = ("models", "data", "settings")
_NAME = re.compile(r"(?!\.)[\w.,=@-]+")  # what is safe in a file's name
_TAKEN = ("profiles",)  # folders that pairs make


def tasks_of(
    merges: Any,
    reassemblies: Any,
    models: Mapping[str, Any],
    data: DataEntry | None,
    root: Path,
) -> tuple[NamedTask, ...]:
    """Return all tasks, one for each combination of settings; their data are not read yet.

    Parameters
    ----------
    merges, reassemblies
        The entries: names -> mappings, or None.
    models
        The manifest's models.
    data
        Its data, for tasks that name none.
    root
        Files are relative to it.

    Raises
    ------
    InputError
        An entry is unknown, missing or of another form, names something that is not there, or asks
        for what cannot be.
    """
    found: list[NamedTask] = []
    names = set[str]()
    for where, entry, make in (
        ("merges", merges, _merges),
        ("reassemblies", reassemblies, _reassemblies),
    ):
        if entry is None:
            continue
        if not isinstance(entry, Mapping) or not entry:
            raise InputError(f"{where} must map names of results to what they are made of")
        for name, one in entry.items():
            if not (isinstance(name, str) and _NAME.fullmatch(name)) or name in _TAKEN:
                raise InputError(
                    f"{where}: the name {name!r} is not possible, as it becomes a file's name; use "
                    "letters, digits and _.,=@-"
                )
            if name in names:
                raise InputError(f"{where}: {name!r} is the name of a merge, too")
            names.add(name)
            found += make(f"{where}, {name}", name, one, models, data, root)
    return tuple(found)


def _merges(
    where: str,
    name: str,
    found: Any,
    models: Mapping[str, Any],
    data: DataEntry | None,
    root: Path,
) -> Iterator[NamedTask]:
    one = entries_of(found, where, _MERGE_KEYS)
    base = one.get("base")
    if not isinstance(base, str) or base not in models:
        raise InputError(
            f"{where}, base must name a model that the others were trained from; got {base!r}"
        )
    others = [other for other in models if other != base]
    own = names_of(one.get("models", others), f"{where}, models", models)
    weights = _weights(one.get("weights"), where)
    inputs = _inputs(one["data"], root, where, own) if "data" in one else data
    limit = one.get("memory_limit")
    if limit is not None:
        bytes_of(str(limit), f"{where}, memory_limit")
    return _with_settings(
        lambda config: MergeTask(name, own, inputs, base, weights, config, limit),
        MergeConfig,
        one.get("settings"),
        where,
    )


def _reassemblies(
    where: str,
    name: str,
    found: Any,
    models: Mapping[str, Any],
    data: DataEntry | None,
    root: Path,
) -> Iterator[NamedTask]:
    one = entries_of(found, where, _REASSEMBLY_KEYS)
    own = names_of(one.get("models", list(models)), f"{where}, models", models)
    inputs = _file(one["data"], root, f"{where}, data") if one.get("data") is not None else data
    return _with_settings(
        lambda config: ReassemblyTask(name, own, inputs, config),
        ReassemblyConfig,
        one.get("settings"),
        where,
    )


def _with_settings(
    make: Callable[[Any], NamedTask], kind: type[Settings], found: Any, where: str
) -> Iterator[NamedTask]:
    """Yield a task for every combination of its settings; errors say where it stands."""
    for config in _configs(kind, found, f"{where}, settings"):
        try:
            yield make(config)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _configs(kind: type[Settings], found: Any, where: str) -> Iterator[Any]:
    """Yield the settings that a mapping with lists in it holds: every combination."""
    given = {} if found is None else found
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping; got {given!r}")
    for _, one in expanded(given, where):
        yield kind.parse(one, where)


def _weights(found: Any, where: str) -> tuple[float, ...] | None:
    """Return the weights, which the task checks."""
    if found is not None and not isinstance(found, list):
        raise InputError(f"{where}, weights must be a list, of a number for each model")
    return None if found is None else tuple(found)


def _inputs(
    found: Any, root: Path, where: str, models: tuple[str, ...]
) -> DataEntry | dict[str, DataEntry] | None:
    """Return the data of a merge: of all tasks together, of each model's own, or none."""
    if found is None:
        return None
    if isinstance(found, Mapping) and set(found) & set(models):
        if set(found) != set(models):
            raise InputError(
                f"{where}, data must have an entry for each model, {', '.join(models)}; got "
                f"{', '.join(map(str, found))}"
            )
        return {name: _file(found[name], root, f"{where}, data, {name}") for name in models}
    return _file(found, root, f"{where}, data")


def _file(found: Any, root: Path, where: str) -> DataEntry:
    """Return data of a task, whose file must be there: it is read when others are done."""
    entry = data_entry(found, root, where)
    if entry.settings.get("labels") is not None:
        raise InputError(f"{where}, labels is for pairs: a merge or a reassembly is not evaluated")
    if not Path(entry.settings["file"]).exists():
        raise InputError(f"{where}: {str(entry.settings['file'])!r} does not exist")
    return entry
