"""Files of weights: read them, check that they are whole, write them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clafusion.errors import InputError, check_callable, check_type, kind_of
from clafusion.execution.lazy import LazyState
from clafusion.weights.atomic import check_output, replacing
from clafusion.weights.messages import listed, one_line
from clafusion.weights.recognition import (
    is_cut_short,
    is_shard,
    stands_for_another,
    unreadable_content,
    writer_of,
)
from clafusion.weights.shards import (
    INDEX,
    SHARDED,
    is_index,
    is_shard_of,
    shards_of,
    write_shards,
)

__all__ = [
    "EXTRA_STATE",
    "READABLE",
    "WEIGHT_TYPES",
    "WRITABLE",
    "check_extra_state",
    "check_input",
    "check_weights_output",
    "file_digest",
    "files_of",
    "in_type",
    "read_safetensors",
    "read_torch",
    "save_model",
    "save_state",
    "state_of",
    "stored_content",
    "tensors_of",
    "weight_type",
    "weights_digest",
]

_TORCH_ENDINGS = (".pt", ".pth", ".th", ".bin", ".ckpt")
READABLE = (".safetensors", *_TORCH_ENDINGS, INDEX)
"""The endings of files of weights that are read."""
WRITABLE = (".safetensors", ".pt", ".pth", SHARDED)
"""The endings of files that :func:`save_model` writes."""
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types in which :func:`save_model` writes floating weights on demand."""
EXTRA_STATE = "_extra_state"
"""How the name of an entry ends that a module's own ``get_extra_state`` returned."""


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    check: Callable[[Mapping[str, Any]], None] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model's state dict to a ``.safetensors``, ``.pt`` or ``.pth`` file, or to several.

    A path that ends with ``.safetensors.index.json`` is the index of several files, of about 500 MB
    each, which are written beside it one after another: see
    :func:`clafusion.weights.shards.write_shards`.

    The old file stays as it is until the new one is complete. The file holds tied weights under
    each of their names, so that ``load_state_dict`` of the same architecture takes it as it is.

    Parameters
    ----------
    model
        The model.
    path
        The file.
    check
        Called with what the new file holds, before the file gets its name. If it raises, no file
        is left behind, and an old one stays.
    dtype
        The type of all floating weights in the file: ``"float32"``, ``"bfloat16"``, ``"float16"``
        or the type of torch. Default: that which they have.
    metadata
        Texts by name for the header of a ``.safetensors`` file; other files have none.

    Raises
    ------
    InputError
        The model is no module, the ending or the type is unknown, a weight is too large for the
        type, the file cannot be written, for example on a full disk, or a module's
        ``get_extra_state`` returns what such a file cannot hold.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module; got {kind_of(model)}")
    check_callable(check, "check", ("state",))
    if metadata is not None:
        _check_metadata(metadata)
    state: Mapping[str, Any] = state_of(model)
    if dtype is not None:
        state = in_type(state, weight_type(dtype, "dtype"))
    save_state(state, path, check, metadata)


def _check_metadata(metadata: Any) -> None:
    check_type(metadata, Mapping, "metadata", "a mapping of names to texts")
    for name, value in metadata.items():
        check_type(name, str, f"metadata: the name {name!r}", "text")
        check_type(value, str, f"metadata[{name!r}]", "text")


def weight_type(given: str | torch.dtype, what: str) -> torch.dtype:
    """Return a type of weights by its name.

    Raises
    ------
    InputError
        There is no such type; the message calls it ``what``.
    """
    found = {str(one).removeprefix("torch."): one for one in WEIGHT_TYPES}
    name = str(given).removeprefix("torch.")
    if name not in found:
        raise InputError(f"{what} must be one of {', '.join(found)}; got {name!r}")
    return found[name]


def in_type(state: Mapping[str, Any], dtype: torch.dtype) -> LazyState[str]:
    """Return a state whose floating tensors have another type; each is made when it is read.

    Raises
    ------
    InputError
        When a tensor is read that has a value too large for the type.
    """

    def make(name: str) -> Any:
        value = state[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        made = value.to(dtype)
        if not bool(made.isfinite().all()) and bool(value.isfinite().all()):
            raise InputError(
                f"{name!r} has values up to {float(value.abs().max()):.3g}, and {dtype} ends at "
                f"{torch.finfo(dtype).max:.3g}: take bfloat16, which has the range of float32"
            )
        return made

    return LazyState(state, make)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return a model's state dict: tensors, detached, and what ``get_extra_state`` returns."""
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a model's state dict, detached."""
    return {name: value for name, value in state_of(model).items() if isinstance(value, Tensor)}


def save_state(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    check: Callable[[Mapping[str, Any]], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict, as :func:`save_model` does, with the same errors."""
    path = check_output(path, WRITABLE, "path")
    if path.name.lower().endswith(SHARDED):
        check_extra_state(state, ".safetensors")

        def check_files(places: Mapping[str, Path]) -> None:
            if check is not None:
                shards = dict.fromkeys(places.values())
                check({k: v for one in shards for k, v in read_safetensors(one, "path").items()})

        write_shards(state, path, check_files)
        return
    ending = path.suffix.lower()
    check_extra_state(state, ending)
    others = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses names that share memory
        if tensor.untyped_storage().data_ptr() in storages:
            tensors[name] = tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
    with replacing(path, "path") as temporary:
        try:
            if ending == ".safetensors":
                save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
                _sort_metadata(temporary)
            else:
                _torch_save({**tensors, **others}, temporary)
        except (SafetensorError, RuntimeError) as error:  # so safetensors and torch report it
            raise OSError(None, one_line(error)) from error
        if check is not None:
            check(_content(temporary, ending, "path"))


def _sort_metadata(path: Path) -> None:
    """Sort what the header of a safetensors file says: the library writes it in any order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        entries = json.loads(header)
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the same entries in another order"
        file.seek(8)
        file.write(text.ljust(size))


def _torch_save(content: Mapping[str, Any], path: Path) -> None:
    """Write a file of torch.save; on a full disk raise the error that says so, which torch hides.

    Written to an open file it has the same bytes whatever its name is.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def check_extra_state(state: Mapping[str, Any], ending: str) -> None:
    """Refuse what a module's ``get_extra_state`` returned if a file cannot give it back.

    Raises
    ------
    InputError
        It is no tensor, and the file is to end with ``.safetensors``; or it is an object that only
        code could make again.
    """
    for name, value in state.items():
        if isinstance(value, Tensor):
            continue
        kind = type(value).__name__
        if ending == ".safetensors":
            raise InputError(
                f"{name!r} is a {kind} (from get_extra_state), and a .safetensors file holds "
                "tensors only: write a .pt file"
            )
        memory = io.BytesIO()
        try:
            torch.save(value, memory)
            memory.seek(0)
            torch.load(memory, weights_only=True)
        except Exception as error:
            raise InputError(
                f"{name!r} is a {kind} (from get_extra_state) that cannot be read back without "
                "running code: let get_extra_state return tensors, numbers, texts, and lists or "
                "dicts of them"
            ) from error


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
        There is no such file, it is empty or may not be read, or it is a pointer of Git LFS or a
        web page. The message calls it ``what``.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{what} {str(path)!r} does not exist")
    if not path.is_file():
        raise InputError(f"{what} {str(path)!r} is no file")
    if not path.name.lower().endswith(tuple(endings)):
        raise InputError(
            f"{what} {str(path)!r} has an unknown ending; known are {', '.join(endings)}"
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"{what} {str(path)!r} may not be read: check its permissions")
    if path.stat().st_size == 0:
        raise InputError(f"{what} {str(path)!r} is empty")
    replaced = stands_for_another(path)
    if replaced is not None:
        raise InputError(f"{what} {str(path)!r} {replaced}")
    return path


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return a file of weights, and of an index also the files that it names, if it can be read."""
    path = Path(path)
    if not is_index(path):
        return [path]
    try:
        return [path, *shards_of(path, "checkpoint")]
    except InputError:  # which reading it tells
        return [path]


def check_weights_output(
    path: str | os.PathLike[str],
    argument: str,
    inputs: Sequence[str | os.PathLike[str]],
    others: Sequence[str | os.PathLike[str]] = (),
    endings: Sequence[str] = WRITABLE,
) -> Path:
    """Return ``path`` if weights can be written there, and no input is lost by that.

    Parameters
    ----------
    path, argument
        As for :func:`clafusion.weights.atomic.check_output`.
    inputs
        Files of weights, or indices of several, that are read.
    others
        Other files that are read.
    endings
        How the file may end.

    Raises
    ------
    InputError
        As for that function; or a file that an input's index names would be replaced or removed.
    """
    files = [file for one in inputs for file in files_of(one)]
    path = check_output(path, endings, argument, (*files, *others))
    lost = next((one for one in files if is_shard_of(path, one)), None)
    if lost is not None:
        raise InputError(
            f"{argument} {str(path)!r}: the input {str(lost)!r} is called as the parts of that "
            "checkpoint, which are replaced, and would be lost: choose another name"
        )
    return path


def read_torch(path: Path, what: str, *, mapped: bool = False) -> Any:
    """Return what ``torch.save`` has written to a file, loading weights only.

    With ``mapped`` the tensors stay in the file until they are read, where its format allows that.

    Raises
    ------
    InputError
        The file is corrupt, or holds Python objects or code. The message calls it ``what``.
    """
    try:
        with warnings.catch_warnings():  # of formats that the errors below name
            warnings.simplefilter("ignore")
            lazily = mapped and is_zipfile(path)  # older files cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:
        if is_cut_short(path, error):
            raise InputError(
                f"{what} {str(path)!r} is corrupt: it is cut short, at {path.stat().st_size} "
                "bytes. Copy, download or save it again"
            ) from error
        found = unreadable_content(path, error)
        if found is not None:
            raise InputError(
                f"{what} {str(path)!r} holds more than tensors: {found}. Loading that could run "
                "any code. In the program that made it, save the state dict alone: "
                "torch.save(model.state_dict(), 'weights.pt')"
            ) from error
        if "TorchScript" in str(error):
            raise InputError(
                f"{what} {str(path)!r} is a TorchScript archive; in the program that made it, save "
                "the state dict alone: torch.save(model.state_dict(), 'weights.pt')"
            ) from error
        told: BaseException = error
        if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
            told = error.__context__  # torch's message is advice to load the file without a check
        raise InputError(_corrupt(what, path, told, "torch.save")) from error


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
        raise InputError(_corrupt(what, path, error, "safetensors")) from error
    return tensors


def stored_content(
    path: str | os.PathLike[str], what: str = "checkpoint", *, mapped: bool = False
) -> Any:
    """Return what a file of weights holds, as it is; of an index what its files hold.

    With ``mapped`` the tensors stay in the files until they are read, where formats allow that.

    Raises
    ------
    InputError
        The file is missing, unreadable, corrupt, of another kind or one part of several. The
        message calls it ``what``.
    """
    path = check_input(path, READABLE, what)
    if is_index(path):
        return _sharded(path, what, mapped=mapped)
    part = is_shard(path)
    if part is not None:
        raise InputError(f"{what} {str(path)!r} {part}")
    return _content(path, path.suffix.lower(), what, mapped=mapped)


def weights_digest(path: str | os.PathLike[str], what: str = "checkpoint") -> str:
    """Return the SHA-256 of a file of weights; of an index that of all its files.

    Raises
    ------
    InputError
        The file is missing or may not be read. The message calls it ``what``.
    """
    path = check_input(path, READABLE, what)
    if not is_index(path):
        return file_digest(path)
    every = [path, *shards_of(path, what)]
    return hashlib.sha256("".join(map(file_digest, every)).encode()).hexdigest()


def _content(path: Path, ending: str, what: str, *, mapped: bool = False) -> Any:
    if ending == ".safetensors":
        return read_safetensors(path, what)
    return read_torch(path, what, mapped=mapped)


def _sharded(path: Path, what: str, *, mapped: bool) -> dict[str, Any]:
    """Return the tensors of a checkpoint in several files."""
    state: dict[str, Any] = {}
    for shard, names in shards_of(path, what).items():
        check_input(shard, READABLE, what)
        content = _content(shard, shard.suffix.lower(), what, mapped=mapped)
        gone = [name for name in names if not isinstance(content, Mapping) or name not in content]
        if gone:
            raise InputError(
                f"{what} {str(shard)!r} lacks {listed(map(repr, gone))}, which "
                f"{str(path)!r} says it holds: fetch both again"
            )
        state.update({name: content[name] for name in names})
    return state


def _corrupt(what: str, path: Path, error: BaseException, wanted: str) -> str:
    """Return what to say of a file that ``wanted`` should have written."""
    writer = writer_of(path)
    if writer == wanted:
        return (
            f"{what} {str(path)!r} is corrupt: {one_line(error)}. Copy, download or save it again"
        )
    begins = f"it does not begin as a file of {wanted}. Copy, download or save it again"
    if writer is not None:
        begins = f"it begins as a file of {writer}, not of {wanted}: give it the ending of that"
    return f"{what} {str(path)!r} is corrupt or not what its ending says: {begins}"
