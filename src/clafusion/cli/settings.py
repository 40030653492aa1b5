"""Files of settings: the nested mapping of :class:`clafusion.FusionConfig`, as YAML or JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from clafusion.batch.grid import expanded
from clafusion.cli.options import changed, setting_at
from clafusion.config import FusionConfig, Settings, options_of
from clafusion.errors import InputError
from clafusion.presets import preset_of
from clafusion.settings import Module
from clafusion.stages import config_from
from clafusion.weights.state_files import check_input

__all__ = [
    "ENDINGS",
    "config_of",
    "configs_of",
    "plain_settings",
    "read_config",
    "read_mapping",
    "rooted",
]

S = TypeVar("S", bound=Settings)
ENDINGS = (".yaml", ".yml", ".json")


def read_config(path: str | os.PathLike[str], option: str) -> FusionConfig:
    """Read settings from a file; errors name the ``option`` by which it was given.

    Raises
    ------
    InputError
        The file is missing or cannot be read, or a setting is unknown or out of its range.
    """
    found = read_mapping(path, option)
    try:
        return config_of(found, "", Path(path).resolve().parent)
    except InputError as error:
        raise InputError(f"{option} {str(path)!r}: {error}") from error


def plain_settings(kind: type[S], file: Path | None, options: Mapping[str, str | bool]) -> S:
    """Return the settings of a kind that the file of ``--config`` and options say.

    Raises
    ------
    InputError
        As for :func:`read_config`, or for :func:`clafusion.cli.options.changed`.
    """
    try:
        base = kind() if file is None else kind.parse(read_mapping(file, "--config"), "")
    except InputError as error:
        raise InputError(f"--config {str(file)!r}: {error}") from error
    return changed(base, options)


def config_of(found: Any, where: str, root: Path) -> FusionConfig:
    """Return the settings that a mapping holds; files of factories in it are relative to ``root``.

    Errors name the setting with its path, which begins with ``where``.

    Raises
    ------
    InputError
        A setting is unknown or out of its range, or a template cannot be built.
    """
    if not isinstance(found, Mapping):
        known = ", ".join(one.name for one in fields(FusionConfig))
        raise InputError(f"{where or 'it'} must be a mapping of {known}; got {found!r}")
    names = {one.name for one in fields(FusionConfig)}
    base: dict[str, Any] = {}
    if "preset" in found:
        try:
            preset = preset_of(found["preset"])
        except InputError as error:
            raise InputError(f"{where}.{error}" if where else str(error)) from error
        base = {name: getattr(preset, name) for name in names}
        found = {name: value for name, value in found.items() if name != "preset"}
    for name in found:
        if name not in names:
            try:
                config_from(None, {str(name): None})  # which has hints
            except InputError as error:
                raise InputError(f"{where}: {error}" if where else str(error)) from error
    config = FusionConfig.parse({**base, **found}, where)
    for option in options_of(FusionConfig):
        value = setting_at(config, option.path)
        if option.rule.get("also") is Module and isinstance(value, str) and value:
            config = changed(config, {option.path: rooted(value, root)})
    return config


def configs_of(found: Any, where: str, root: Path) -> tuple[FusionConfig, ...]:
    """Return the settings that a mapping with lists in it holds: every combination.

    Parameters and errors are those of :func:`config_of`.
    """
    every = expanded(found, where) if isinstance(found, Mapping) else [({}, found)]
    return tuple(config_of(given, where, root) for _, given in every)


def rooted(factory: str, root: Path) -> str:
    """Return a factory ``MODULE:FACTORY`` of which a file's path is relative to ``root``."""
    module, colon, call = factory.partition(":")
    return f"{root / module}{colon}{call}" if module.endswith(".py") else factory


# --- YAML and JSON ------------------------------------------------------------------------------


def read_mapping(path: str | os.PathLike[str], what: str) -> Any:
    """Read a ``.yaml``, ``.yml`` or ``.json`` file; errors call it ``what``.

    Raises
    ------
    InputError
        The file is missing or cannot be read, an entry is there twice, or a name is no text.
    """
    file = check_input(path, ENDINGS, what)
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, _Loader)
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        shown = " ".join(str(error).split())
        raise InputError(f"{what} {str(path)!r} cannot be read: {shown}") from error


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


# YAML 1.1 takes 1e-3 for text, JSON and YAML 1.2 for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entries:
        if name in found:
            raise ValueError(f"the entry {name!r} is there twice")
        found[name] = value
    return found
