"""Checkpoints in several files: the index says which tensor lies where."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clafusion.errors import InputError
from clafusion.weights.atomic import remove_left_behind, replacing
from clafusion.weights.digests import add_tensor
from clafusion.weights.messages import listed, one_line

__all__ = ["INDEX", "SHARDED", "is_index", "is_shard_of", "shards_of", "write_shards"]

INDEX = ".index.json"
"""How the name of an index ends."""
SHARDED = ".safetensors.index.json"
"""How the name of an index ends that :func:`write_shards` writes."""
_ENDING = ".safetensors"
_SIZE = 1 << 29  # bytes of a shard; while one is written, twice as many are in memory


def is_index(path: Path) -> bool:
    """Return whether a file is called as the index of a checkpoint in several files."""
    return path.name.lower().endswith(INDEX)


def shards_of(path: Path, what: str) -> dict[Path, list[str]]:
    """Return the files that an index names, and which tensors are read from each.

    Raises
    ------
    InputError
        The index is none, or a file that it names is missing. The message calls it ``what``.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {one_line(error)}") from error
    names = found.get("weight_map") if isinstance(found, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise InputError(
            f"{what} {str(path)!r} is no index of a checkpoint: it has no 'weight_map', which says "
            "the file of each tensor"
        )
    shards: dict[Path, list[str]] = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{what} {str(path)!r}: the file of {name!r} must be a name in the same folder; "
                f"got {file!r}"
            )
        shards.setdefault(path.with_name(file), []).append(name)
    gone = [shard.name for shard in shards if not shard.is_file()]
    if gone:
        raise InputError(
            f"{what} {str(path)!r} names files that are not beside it: "
            f"{listed(map(repr, gone))}; fetch them into its folder"
        )
    return shards


def write_shards(
    state: Mapping[str, Tensor],
    path: Path,
    check: Callable[[Mapping[str, Path]], None] | None = None,
    size: int = _SIZE,
) -> None:
    """Write tensors to safetensors files of about ``size`` bytes, and an index of them to ``path``.

    A tensor is read from ``state`` when its file is written. Files are named after what they hold.
    The index gets its name when all of them are there, and files that only the old one names go
    after that: whenever the process is killed, the index that is there is of whole files.

    Parameters
    ----------
    state
        Tensors by name.
    path
        The index, which ends with ``.safetensors.index.json``.
    check
        Called with each tensor's file, before the index gets its name. If it raises, the old files
        stay as they are.
    size
        How large a file may become. A larger tensor has a file of its own.

    Raises
    ------
    InputError
        A file cannot be written, for example on a full disk.
    """
    path = path.resolve()  # shards lie beside the file that a link points to
    if not path.name.lower().endswith(SHARDED):
        raise InputError(f"the index is a link to {str(path)!r}, which does not end with {SHARDED}")
    stem = path.name[: -len(SHARDED)]
    written: list[Path] = []
    places: dict[str, Path] = {}
    total = 0
    parts = _parts(state, size)
    try:
        for i, names in enumerate(parts, 1):
            tensors = {name: state[name].detach().cpu().contiguous() for name in names}
            total += sum(one.nbytes for one in tensors.values())
            shard = path.with_name(
                f"{stem}-{i:05d}-of-{len(parts):05d}-{_digest(tensors)}{_ENDING}"
            )
            is_new = not shard.exists()
            _write(tensors, shard)
            written += [shard] if is_new else []
            places |= dict.fromkeys(names, shard)
        if check is not None:
            check(places)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: shard.name for name, shard in places.items()},
        }
        with replacing(path, "path") as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        for shard in written:
            shard.unlink(missing_ok=True)
        raise
    _remove_others(path, set(places.values()))


def _parts(state: Mapping[str, Tensor], size: int) -> list[list[str]]:
    """Return the names that go to each file, in order."""
    parts: list[list[str]] = [[]]
    left = size
    for name in state:
        needed = state[name].nbytes
        if needed > left and parts[-1]:
            parts.append([])
            left = size
        parts[-1].append(name)
        left -= needed
    return parts


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        add_tensor(digest, name, tensor)
    return digest.hexdigest()[:8]


def _write(tensors: dict[str, Tensor], shard: Path) -> None:
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses names that share memory
        if tensor.untyped_storage().data_ptr() in storages:
            tensors[name] = tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
    with replacing(shard, "path") as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(None, one_line(error)) from error


def is_shard_of(index: Path, path: Path) -> bool:
    """Return whether a file is called as those that :func:`write_shards` writes for an index."""
    is_ours = index.name.lower().endswith(SHARDED) and path.resolve().parent == (
        index.resolve().parent
    )
    return is_ours and re.fullmatch(_shard_pattern(index), path.resolve().name) is not None


def _shard_pattern(index: Path) -> str:
    stem = re.escape(index.name[: -len(SHARDED)])
    return rf"{stem}-\d{{5}}-of-\d{{5}}-[0-9a-f]{{8}}\.safetensors"


def _remove_others(index: Path, kept: set[Path]) -> None:
    """Remove what earlier indices of this name had, and what killed runs have left."""
    shard = _shard_pattern(index)
    remove_left_behind(index, shard)
    ours = re.compile(shard)
    for path in index.parent.iterdir():
        if ours.fullmatch(path.name) and path not in kept:
            with contextlib.suppress(OSError):
                path.unlink()
