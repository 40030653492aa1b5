"""Files of weights: read them, check that they are whole, write them."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.weights.atomic import check_output, replacing
from clafusion.weights.messages import listed, one_line

__all__ = [
    "READABLE",
    "WRITABLE",
    "check_input",
    "file_digest",
    "load_state",
    "read_safetensors",
    "read_torch",
    "save_model",
    "save_state",
    "stored_state",
    "tensors_of",
    "without_prefixes",
]

_TORCH_ENDINGS = (".pt", ".pth", ".th", ".bin")
READABLE = (".safetensors", *_TORCH_ENDINGS)
"""The endings of files that :func:`load_state` reads."""
WRITABLE = (".safetensors", ".pt", ".pth")
"""The endings of files that :func:`save_model` writes."""
_WRAPPINGS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors``, ``.pt``, ``.pth``, ``.th`` or ``.bin`` file.

    It loads weights only: it runs no code that a file may contain. A state dict may lie under
    ``state_dict``, ``model_state_dict`` or ``model``. A prefix ``module.`` or ``_orig_mod.`` that
    all names have is taken off.

    Raises
    ------
    InputError
        The file is missing, unreadable, corrupt, of another kind, or holds no state dict.
    """
    return without_prefixes(stored_state(path))


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state dict to a ``.safetensors``, ``.pt`` or ``.pth`` file.

    The old file stays as it is until the new one is complete. The file holds tied weights under
    each of their names, so that ``load_state_dict`` of the same architecture takes it as it is.

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
    """Write a state dict, as :func:`save_model` does, with the same errors."""
    check_output(path, WRITABLE, "path")
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses names that share memory
        if tensor.untyped_storage().data_ptr() in storages:
            tensors[name] = tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
    with replacing(path, "path") as temporary:
        try:
            if Path(path).suffix.lower() == ".safetensors":
                save_file(tensors, temporary, metadata={"format": "pt"})
            else:
                torch.save(tensors, temporary)
        except (SafetensorError, RuntimeError) as error:  # so safetensors and torch report it
            raise OSError(None, one_line(error)) from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_input(path: str | os.PathLike[str], endings: Sequence[str], what: str) -> Path:
    """Return ``path`` if a file with one of these endings can be read there.

    Raises
    ------
    InputError
        There is no such file, or it is empty or may not be read. The message calls it ``what``.
    """
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
    """Return what ``torch.save`` has written to a file, loading weights only.

    Raises
    ------
    InputError
        The file is corrupt, or holds Python objects or code. The message calls it ``what``.
    """
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
    """Return the tensors in a safetensors file.

    Raises
    ------
    InputError
        The file is corrupt. The message calls it ``what``.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:
        raise InputError(_corrupt(what, path, error)) from error
    return tensors


def stored_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict as :func:`load_state` does, with the names as the file has them."""
    what = "checkpoint"
    path = check_input(path, READABLE, what)
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
            + (f"not tensors: {listed(map(repr, others))}" if others else "it has no entries")
        )
    return {str(key): value for key, value in stored.items()}


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes ``module.`` and ``_orig_mod.``, where all names have them."""
    for prefix in (*_PREFIXES, *_PREFIXES):  # either order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _corrupt(what: str, path: Path, error: Exception) -> str:
    return f"{what} {str(path)!r} is corrupt or not what its ending says: {one_line(error)}"
