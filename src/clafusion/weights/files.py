"""Files of weights and factories of models: read, check that they fit, write."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import pickle
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.weights.atomic import check_output, replacing

__all__ = ["WRITABLE", "ModelFile", "build_model", "load_model", "load_state", "save_model"]

_TORCH_ENDINGS = (".pt", ".pth", ".th", ".bin")
_READABLE = (".safetensors", *_TORCH_ENDINGS)
WRITABLE = (".safetensors", ".pt", ".pth")
_WRAPPINGS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
_SPEC = re.compile(r"(?P<module>.+?):(?P<call>[A-Za-z_]\w*(\.\w+)*\s*(\(.*\))?)", re.DOTALL)
_LISTED = 5


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors``, ``.pt``, ``.pth``, ``.th`` or ``.bin`` file.

    Only weights are loaded: no code that a file may contain is run. A state dict that lies under
    ``state_dict``, ``model_state_dict`` or ``model`` is taken out, and a prefix ``module.`` or
    ``_orig_mod.`` that all names have is taken off.

    Raises
    ------
    InputError
        The file is missing, unreadable, corrupt, of another kind, or holds no state dict.
    """
    return _without_prefixes(_stored_state(path))


def build_model(factory: str) -> nn.Module:
    """Make a model, in eval mode, by a factory ``MODULE:FACTORY``.

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
    found: Any = _import(factory, matched["module"])
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"factory {factory!r}: {matched['module']!r} has no {part!r}"
                f"{_alternatives(part, vars(found))}"
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise InputError(
            f"factory {factory!r} is a {type(found).__name__}; it must be a function or class "
            "that returns a new model when it is called"
        )
    try:
        model = found(*positional, **keywords)
    except Exception as error:
        raise InputError(f"factory {factory!r} failed: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"factory {factory!r} returned a {type(model).__name__}; it must return a "
            "torch.nn.Module"
        )
    return model.eval()


def load_model(factory: str, path: str | os.PathLike[str]) -> nn.Module:
    """Make a model, in eval mode, with the weights in a file.

    Parameters
    ----------
    factory
        As for :func:`build_model`.
    path
        As for :func:`load_state`.

    Raises
    ------
    InputError
        As for :func:`build_model` and :func:`load_state`; or the file does not fit the model: the
        missing and the unexpected names are listed, and the shapes that differ.
    """
    stored = _stored_state(path)
    model = build_model(factory)
    own = model.state_dict()
    # A model may have a submodule that is itself called "module": take prefixes off if needed.
    state = stored if stored.keys() == own.keys() else _without_prefixes(stored)
    missing = [
        name
        for name in own
        if name not in state
        and not name.endswith("num_batches_tracked")  # old files lack it, and eval mode needs none
        and not _is_tied(model, name, state)
    ]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name!r} is {_shape(state[name])} in the file and {_shape(tensor)} in the model"
        for name, tensor in own.items()
        if name in state and isinstance(tensor, Tensor) and tensor.shape != state[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {_listed(shown)}"
        for what, names, shown in (
            ("missing from the file", missing, map(repr, missing)),
            ("not in the model", unexpected, map(repr, unexpected)),
            ("of another shape", reshaped, reshaped),
        )
        if names
    ]
    if problems:
        raise InputError(f"{str(path)!r} does not fit {factory!r}: {'; '.join(problems)}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"{str(path)!r} does not fit {factory!r}: {_one_line(error)}") from error
    return model


@dataclass(frozen=True)
class ModelFile:
    """A model that is loaded when it is needed.

    Attributes
    ----------
    factory
        What makes the model, as for :func:`build_model`.
    path
        Its weights, as for :func:`load_state`.
    """

    factory: str
    path: str | os.PathLike[str]

    def load(self) -> nn.Module:
        """Return the model with its weights, in eval mode; errors are :func:`load_model`'s."""
        return load_model(self.factory, self.path)

    def build(self) -> nn.Module:
        """Return the model, in eval mode, with the weights that the factory gives it."""
        return build_model(self.factory)

    def check(self) -> None:
        """Check what can be checked without running or reading anything.

        Raises
        ------
        InputError
            The factory is none, or its file or that of the weights is missing or may not be read.
        """
        matched = _matched(self.factory)
        _call(self.factory, matched["call"])
        _check_code(self.factory, matched["module"])
        check_input(self.path, _READABLE, "checkpoint")

    def digest(self) -> str:
        """Return the SHA-256 of the weights, the factory's text and the file that defines it.

        What that file imports is not looked at.

        Raises
        ------
        InputError
            The file is missing or may not be read.
        """
        digest = hashlib.sha256(self.factory.encode())
        digest.update(file_digest(check_input(self.path, _READABLE, "checkpoint")).encode())
        matched = _SPEC.fullmatch(self.factory.strip())
        code = _source(matched["module"]) if matched is not None else None
        if code is not None and code.is_file():
            digest.update(code.read_bytes())
        return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state dict to a ``.safetensors``, ``.pt`` or ``.pth`` file.

    The old file stays as it is until the new one is complete. Tied weights are written under each
    of their names, so that the file loads into the architecture with ``load_state_dict`` as it is.

    Raises
    ------
    InputError
        The ending is unknown, or the file cannot be written, for example on a full disk.
    """
    save_state(tensors_of(model), path)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a model's state dict, detached."""
    return {
        name: value.detach()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def save_state(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict, as :func:`save_model` does."""
    check_output(path, WRITABLE, "path")
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses memory that two names share
        if tensor.untyped_storage().data_ptr() in storages:
            tensors[name] = tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
    with replacing(path, "path") as temporary:
        try:
            if Path(path).suffix.lower() == ".safetensors":
                save_file(tensors, temporary, metadata={"format": "pt"})
            else:
                torch.save(tensors, temporary)
        except (SafetensorError, RuntimeError) as error:  # how both report a failed write
            raise OSError(None, _one_line(error)) from error


# --- reading ------------------------------------------------------------------------------------


def check_input(path: str | os.PathLike[str], endings: Sequence[str], what: str) -> Path:
    """Return ``path`` if a file of one of these kinds can be read there."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{what} {str(path)!r} does not exist")
    if not path.is_file():
        raise InputError(f"{what} {str(path)!r} is no file")
    if path.suffix.lower() not in endings:
        raise InputError(
            f"{what} {str(path)!r} has an unknown ending; known are {', '.join(endings)}"
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"{what} {str(path)!r} may not be read: check its permissions")
    if path.stat().st_size == 0:
        raise InputError(f"{what} {str(path)!r} is empty")
    return path


def read_torch(path: Path, what: str) -> Any:
    """Return what ``torch.save`` has written, weights only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise InputError(
                f"{what} {str(path)!r} holds Python objects beside tensors, and loading them "
                "could run any code; save the state dict alone: torch.save(model.state_dict(), ...)"
            ) from error
        raise InputError(_corrupt(what, path, error)) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"{what} {str(path)!r} is a TorchScript archive; save the state dict alone"
            ) from error
        raise InputError(_corrupt(what, path, error)) from error


def read_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:
        raise InputError(_corrupt(what, path, error)) from error
    return tensors


def _stored_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    what = "checkpoint"
    path = check_input(path, _READABLE, what)
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path, what)
    stored = read_torch(path, what)
    while isinstance(stored, Mapping):
        inner = [key for key in _WRAPPINGS if isinstance(stored.get(key), Mapping)]
        if not inner:
            break
        stored = stored[inner[0]]
    if not isinstance(stored, Mapping):
        raise InputError(
            f"{what} {str(path)!r} holds a {type(stored).__name__}, not a state dict (names and "
            "tensors)"
        )
    others = [str(key) for key, value in stored.items() if not isinstance(value, Tensor)]
    if others or not stored:
        raise InputError(
            f"{what} {str(path)!r} holds no state dict: "
            + (f"not tensors: {_listed(map(repr, others))}" if others else "it has no entries")
        )
    return {str(key): value for key, value in stored.items()}


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (*_PREFIXES, *_PREFIXES):  # either order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _is_tied(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> bool:
    """Return whether another name of the same tensor is in the file."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return any(other in state for other, one in tensors.items() if one is tensors.get(name))


def _corrupt(what: str, path: Path, error: Exception) -> str:
    return f"{what} {str(path)!r} is corrupt or not what its ending says: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


# --- factories ----------------------------------------------------------------------------------


def _matched(factory: str) -> re.Match[str]:
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
    """Take ``name(1, key=2)`` apart, without running anything."""
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call):
            return ast.unparse(node), [], {}
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("** is not possible here")
        return (
            ast.unparse(node.func),
            [ast.literal_eval(one) for one in node.args],
            {str(one.arg): ast.literal_eval(one.value) for one in node.keywords},
        )
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"factory {factory!r}: the arguments must be literals, as in make(depth=20); "
            f"{_one_line(error)}"
        ) from error


def _import(factory: str, name: str) -> ModuleType:
    is_file = _check_code(factory, name)
    # As `python file.py` and `python -m module` do, so that neighbours can be imported.
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
            f"factory {factory!r}: importing {name!r} failed: {_one_line(error)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(
            f"factory {factory!r}: importing {name!r} failed: {_one_line(error)}"
        ) from error


def _source(name: str) -> Path | None:
    """Return the file of a module or the file that is named; import nothing."""
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
    # Two files of one name in different directories are two modules.
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
    callables: list[str] = [
        name
        for name, value in names.items()
        if callable(value) and not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    near = [name for name in callables if name.lower().startswith(wanted[:3].lower())]
    return f"; it has {_listed(near or callables)}" if callables else ""
