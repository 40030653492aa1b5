"""Factories of models, written ``MODULE:FACTORY``, and models whose weights lie in files."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from clafusion.errors import InputError, check_type
from clafusion.weights.atomic import path_of
from clafusion.weights.fitting import model_with
from clafusion.weights.mapped import file_backed, parameters_on_meta
from clafusion.weights.messages import listed, one_line
from clafusion.weights.state_files import READABLE, check_input, stored_content, weights_digest

__all__ = [
    "Model",
    "ModelFile",
    "Origin",
    "build_model",
    "keep_origin",
    "load_model",
    "model_without_weights",
    "origin_of",
    "source_of",
]

_SPEC = re.compile(r"(?P<module>.+?):(?P<call>[A-Za-z_]\w*(\.\w+)*\s*(\(.*\))?)", re.DOTALL)


@dataclass(frozen=True)
class Origin:
    """Where a module comes from: the factory that made it, and the file of its weights, if any."""

    factory: str
    path: str | None = None
    key: str | None = None


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def origin_of(model: nn.Module) -> Origin | None:
    """Return where a module comes from; None for one that nobody here has made."""
    return _ORIGINS.get(model)


def keep_origin(copy: nn.Module, model: nn.Module) -> nn.Module:
    """Return a copy of a module, whose origin is the module's."""
    found = origin_of(model)
    if found is not None:
        _ORIGINS[copy] = found
    return copy


def build_model(factory: str) -> nn.Module:
    """Return a new model, in eval mode, from a factory ``MODULE:FACTORY``.

    Parameters
    ----------
    factory
        ``package.module:name`` or ``path/to/file.py:name``, where ``name`` is a function or class
        that returns the model. Literal arguments may follow: ``resnet.py:make(depth=20)``.

    Raises
    ------
    InputError
        The module cannot be imported, the name is missing or cannot be called, or calling it
        fails or returns no module.
    """
    matched = _matched(factory)
    name, positional, keywords = _call(factory, matched["call"])
    maker: Any = _import(factory, matched["module"])
    for part in name.split("."):
        if not hasattr(maker, part):
            raise InputError(
                f"factory {factory!r}: {matched['module']!r} has no {part!r}"
                f"{_alternatives(part, vars(maker))}"
            )
        maker = getattr(maker, part)
    if isinstance(maker, nn.Module) or not callable(maker):
        raise InputError(
            f"factory {factory!r} is a {type(maker).__name__}; it must be a function or class "
            "that returns a new model when it is called"
        )
    try:
        model = maker(*positional, **keywords)
    except Exception as error:
        raise InputError(f"factory {factory!r} failed: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"factory {factory!r} must return a torch.nn.Module; it returned {type(model).__name__}"
        )
    _ORIGINS[model] = Origin(factory)
    return model.eval()


def model_without_weights(factory: str) -> nn.Module:
    """Return what :func:`build_model` does, its parameters on the meta device."""
    with parameters_on_meta():
        return build_model(factory)


def load_model(factory: str, path: str | os.PathLike[str], key: str | None = None) -> nn.Module:
    """Return a new model, in eval mode, with the weights in a file.

    A prefix that all or some names in the file have is taken off where the rest then fits the
    model, and of several state dicts that one is taken that fits. A warning says what was left.

    Parameters
    ----------
    factory
        As for :func:`build_model`.
    path, key
        As for :func:`clafusion.weights.checkpoints.load_state`.

    Raises
    ------
    InputError
        As for these two functions; or the file does not fit the model. Then the message lists the
        missing names, the unexpected names, and the shapes and kinds of numbers that differ. Or the
        model is lazy or on the meta device.
    """
    content = stored_content(path)
    model = model_with(lambda: build_model(factory), content, key, str(path), factory)
    _ORIGINS[model] = Origin(factory, str(path), key)
    return model


def open_model(
    factory: str, path: str | os.PathLike[str], key: str | None = None
) -> tuple[nn.Module, frozenset[str]]:
    """Return what :meth:`ModelFile.open` does."""
    content = stored_content(path, mapped=True)
    build = partial(model_without_weights, factory)
    try:
        model = model_with(build, content, key, str(path), factory, assign=True)
    except InputError:  # of the model, which needs memory, or of the file, which load_model tells
        return load_model(factory, path, key), frozenset()
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    others = [value for one in model.modules() for value in vars(one).values()]
    if any(one.is_meta for one in (*tensors.values(), *others) if isinstance(one, Tensor)):
        return load_model(factory, path, key), frozenset()
    _ORIGINS[model] = Origin(factory, str(path), key)
    return model, file_backed(tensors)


@dataclass(frozen=True)
class ModelFile:
    """A model whose weights lie in a file until they are needed.

    Attributes
    ----------
    factory
        The factory of the model, ``MODULE:FACTORY``, as for
        :func:`clafusion.weights.factories.build_model`.
    path
        The file of its weights: ``.safetensors``, ``.pt``, ``.pth``, ``.th``, ``.bin``, ``.ckpt``,
        or the ``.index.json`` of a checkpoint in several files.
    key
        Which of the state dicts in the file, as for
        :func:`clafusion.weights.checkpoints.load_state`: ``"model_ema"``, or with a prefix of its
        names ``"state_dict.teacher"``. Default: the one that fits the model; of several the one in
        a known place, with a warning.

    Raises
    ------
    InputError
        The factory is no text, or the path no path.
    """

    factory: str
    path: str | os.PathLike[str]
    key: str | None = None

    def __post_init__(self) -> None:
        check_type(self.factory, str, "factory", "text, as 'nets.py:make'")
        path_of(self.path, "path")

    def load(self) -> nn.Module:
        """Return the model with its weights, in eval mode; errors are :func:`load_model`'s."""
        return load_model(self.factory, self.path, self.key)

    def open(self) -> tuple[nn.Module, frozenset[str]]:
        """Return the model, in eval mode, and the names of what stays in the file until it is read.

        The others are in memory: all of them where the model cannot be built without memory for its
        parameters. Nobody may change the model's tensors. Errors are :func:`load_model`'s.
        """
        return open_model(self.factory, self.path, self.key)

    def build(self) -> nn.Module:
        """Return the model, in eval mode, with the weights that the factory gives it."""
        return build_model(self.factory)

    def check(self) -> None:
        """Check what can be checked without running code or reading weights.

        Raises
        ------
        InputError
            The factory is malformed, or its file or that of the weights is missing or may not be
            read.
        """
        matched = _matched(self.factory)
        _call(self.factory, matched["call"])
        _check_code(self.factory, matched["module"])
        check_input(self.path, READABLE, "checkpoint")

    def digest(self) -> str:
        """Return the SHA-256 of the weights, the factory's text and the file that defines it.

        Where that file and the weights lie does not enter, nor what the file imports.

        Raises
        ------
        InputError
            The file is missing or may not be read.
        """
        matched = _SPEC.fullmatch(self.factory.strip())
        module = "" if matched is None else matched["module"]
        text = self.factory.strip().removeprefix(module) if module.endswith(".py") else self.factory
        digest = hashlib.sha256(text.encode())
        digest.update(weights_digest(self.path).encode())
        if self.key is not None:
            digest.update(f"key {self.key}".encode())
        code = _source(module) if module else None
        if code is not None and code.is_file():
            digest.update(code.read_bytes())
        return digest.hexdigest()


Model: TypeAlias = nn.Module | ModelFile
"""A module, or one whose weights lie in a file."""


def source_of(model: Model) -> str:
    """Return in words where a model comes from: its factory and its file, or its class."""
    if isinstance(model, nn.Module):
        return f"a module of class {type(model).__qualname__}"
    path = os.fspath(model.path)
    key = "" if model.key is None else f", {model.key}"
    return path if model.factory == path else f"{model.factory}, {path}{key}"


def _matched(factory: str) -> re.Match[str]:
    """Return the parts of ``MODULE:FACTORY``; raise InputError for any other text."""
    matched = _SPEC.fullmatch(factory.strip())
    if matched is None:
        raise InputError(
            f"{factory!r} is no factory: write MODULE:FACTORY, for example "
            "'package.module:make_model', 'file.py:Model' or 'file.py:make_model(depth=20)'"
        )
    return matched


def _check_code(factory: str, name: str) -> bool:
    """Return whether the module is given by its file; refuse a file that is missing."""
    is_file = name.endswith(".py")
    if is_file and not Path(name).is_file():
        raise InputError(f"factory {factory!r}: the file {name!r} does not exist")
    return is_file


def _call(factory: str, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return name, arguments and keywords of ``name(1, key=2)``, without running anything."""
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call):
            return ast.unparse(node), [], {}
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("** is not possible here")
        return (
            ast.unparse(node.func),
            [ast.literal_eval(argument) for argument in node.args],
            {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords},
        )
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"factory {factory!r}: the arguments must be literals, as in make(depth=20); "
            f"{one_line(error)}"
        ) from error


def _import(factory: str, name: str) -> ModuleType:
    """Import the module or the file of a factory; raise InputError where that fails."""
    is_file = _check_code(factory, name)
    # As `python file.py` and `python -m module` do, so that the module can import its neighbours.
    directory = str(Path(name).resolve().parent) if is_file else str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        return _import_file(Path(name).resolve()) if is_file else importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"factory {factory!r}: there is no module {error.name!r}; install it, or run from "
                "the directory that contains it"
            ) from error
        raise InputError(
            f"factory {factory!r}: importing {name!r} failed: {one_line(error)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(
            f"factory {factory!r}: importing {name!r} failed: {one_line(error)}"
        ) from error


def _source(name: str) -> Path | None:
    """Return the file of a module, or the file that ``name`` is; import nothing."""
    if name.endswith(".py"):
        return Path(name)
    directories: Sequence[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    parts = name.split(".")
    try:
        for i in range(len(parts)):
            spec = PathFinder.find_spec(".".join(parts[: i + 1]), directories)
            if spec is None:
                return None
            directories = spec.submodule_search_locations
    except (ImportError, KeyError, ValueError):  # in a package without a file of its own
        return None
    return None if spec is None or not spec.has_location else Path(str(spec.origin))


def _import_file(path: Path) -> ModuleType:
    # Files of the same name in different directories are different modules.
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "the ending is .py"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _alternatives(wanted: str, names: Mapping[str, Any]) -> str:
    """Return the end of a message: which other callables a module has, near ones if any."""
    callables: list[str] = [
        name
        for name, value in names.items()
        if callable(value) and not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    near = [name for name in callables if name.lower().startswith(wanted[:3].lower())]
    return f"; it has {listed(near or callables)}" if callables else ""
