"""A data file -> a tensor of model inputs."""

from __future__ import annotations

import gzip
import io
import lzma
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clafusion.errors import InputError
from clafusion.tracing.graphs import EDGES
from clafusion.weights.messages import one_line
from clafusion.weights.state_files import check_input, read_safetensors, read_torch

__all__ = ["ENDINGS", "load_graph", "load_labels", "load_named_samples", "load_samples"]

ENDINGS = (".npy", ".npz", ".pt", ".pth", ".safetensors")
_PACKERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_KEYS = ("x_train", "images", "x", "data")


def load_samples(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    shape: Sequence[int] | None = None,
    scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Read model inputs from a ``.npy``, ``.npz``, ``.pt``, ``.pth`` or ``.safetensors`` file.

    A ``.npy`` or ``.npz`` file may also be packed (``.gz``, ``.xz``). The result is
    ``(x / scale - mean) / std`` in float32. Without these three settings, whole numbers (tokens)
    keep their type.

    Parameters
    ----------
    path
        The file.
    key
        Which array of a file that holds several; default the first of ``x_train``, ``images``,
        ``x`` and ``data`` that the file has, or its only array.
    limit
        Take this many samples.
    seed
        Choose them at random with this seed, in the file's order: data may be sorted. Default: from
        the beginning.
    shape
        Reshape each sample, for example ``(1, 28, 28)``.
    scale
        Divide by this number, for example 255 for bytes.
    mean, std
        Normalise: a single number, or one for each channel (the first axis of a sample).

    Returns
    -------
    Tensor
        ``(num_samples, ...)``.

    Raises
    ------
    InputError
        The file is missing, corrupt or of another kind, a setting does not fit it, as a key does
        not fit one array, or it holds bytes and no setting says how they were scaled in training.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise InputError(f"limit must be at least 1; got {limit}")
    if scale is not None and not (_is_number(scale) and scale > 0):
        raise InputError(f"scale must be positive, it divides the data; got {scale}")
    if mean is not None and not all(map(_is_number, mean)):
        raise InputError(f"mean must be finite numbers; got {', '.join(map(str, mean))}")
    if std is not None and not all(_is_number(number) and number > 0 for number in std):
        raise InputError(f"std must be positive; got {', '.join(map(str, std))}")
    file = Path(path)
    packed = file.suffix.lower() in _PACKERS
    check_input(file, (*ENDINGS, *_PACKERS), "data file")
    inner = Path(file.stem).suffix.lower() if packed else file.suffix.lower()
    if packed and inner not in (".npy", ".npz"):
        raise InputError(f"data file {str(path)!r}: only .npy and .npz files may be packed")
    alone = f"one array, and key={key!r} (--data-key) chooses one of several: leave it out"
    samples = _read(file, inner, key, alone)
    if samples.dim() == 0 or samples.size(0) == 0:
        raise InputError(f"data file {str(path)!r} holds no samples")
    samples = samples[_rows(samples.size(0), limit, seed)].clone()
    if shape is not None:
        try:
            samples = samples.reshape(samples.size(0), *shape)
        except RuntimeError as error:
            raise InputError(
                f"shape {'x'.join(map(str, shape))} does not fit: a sample of {str(path)!r} has "
                f"shape {tuple(samples.shape[1:])}"
            ) from error
    is_scaled = any(setting is not None for setting in (scale, mean, std))
    if samples.dtype == torch.uint8 and not is_scaled:
        raise InputError(
            f"data file {str(path)!r} holds bytes (uint8), and models take real numbers: say how "
            "they were scaled in training, for example scale=255 (--scale 255)"
        )
    if samples.is_complex() or samples.dtype == torch.bool:
        raise InputError(f"data file {str(path)!r} holds {samples.dtype}; real numbers are needed")
    if samples.is_floating_point() or is_scaled:
        samples = samples.float()
    if scale is not None:
        samples /= scale
    if mean is not None:
        samples -= _by_channel("mean", mean, samples)
    if std is not None:
        samples /= _by_channel("std", std, samples)
    return samples


def load_labels(
    path: str | os.PathLike[str], key: str, limit: int | None = None, seed: int | None = None
) -> Tensor:
    """Read the labels that a file of several arrays holds beside the inputs, of the same rows.

    Parameters
    ----------
    path, limit, seed
        As for :func:`load_samples`.
    key
        The array of the labels. Whole numbers become int64, others float32.

    Raises
    ------
    InputError
        The file is missing or corrupt, has no such array, or holds one array, the inputs.
    """
    file = check_input(path, (*ENDINGS, *_PACKERS), "data file")
    packed = file.suffix.lower() in _PACKERS
    alone = (
        f"one array, the inputs, and no {key!r} beside it: give inputs and labels in one file of "
        "several arrays (.npz), and the name of the labels"
    )
    found = _read(file, Path(file.stem if packed else file).suffix.lower(), key, alone)
    if found.dim() == 0:
        raise InputError(f"data file {str(path)!r}: {key!r} is a single number, not labels")
    found = found[_rows(len(found), limit, seed)]
    return found.float() if found.is_floating_point() else found.long()


def load_named_samples(
    path: str | os.PathLike[str],
    names: Collection[str],
    limit: int | None = None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Read those arrays of a ``.npz``, ``.safetensors``, ``.pt`` or ``.pth`` file that have a name.

    Parameters
    ----------
    path
        The file.
    names
        The names of a network's inputs.
    limit, seed
        As for :func:`load_samples`.

    Returns
    -------
    dict
        Whole numbers in int64, others in float32; empty where the file has no such name.

    Raises
    ------
    InputError
        The file is missing or corrupt, or its arrays have unlike numbers of samples.
    """
    found: dict[str, Tensor] = {}
    for name, value in _named(path, names).items():
        rows = value[_rows(len(value), limit, seed)] if value.dim() else value
        found[name] = rows.float() if value.is_floating_point() else rows.long()
    sizes = {name: len(value) if value.dim() else 0 for name, value in found.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        shown = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise InputError(
            f"data file {str(path)!r}: every input needs as many samples as the others; {shown}"
        )
    return found


def load_graph(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """Read a graph: all arrays of a file that has an ``edge_index``, as a whole; None for others.

    The file is one of those of :func:`load_named_samples`; whole numbers come in int64, others in
    float32.

    Raises
    ------
    InputError
        The file is missing or corrupt.
    """
    found = _named(path, None)
    if EDGES not in found:
        return None
    return {
        name: value.float() if value.is_floating_point() else value.long()
        for name, value in found.items()
    }


def _named(path: str | os.PathLike[str], names: Collection[str] | None) -> dict[str, Tensor]:
    """Return the tensors of some names in a file that holds several; None for all, of a graph."""
    file = check_input(path, (*ENDINGS, *_PACKERS), "data file")
    ending = file.suffix.lower()
    stored: Any = {}
    if ending == ".npz":
        held = _names_in(file)
        wanted = names if names is not None else held if EDGES in held else ()
        stored = {name: _read_numpy(file, name) for name in held if name in wanted}
    elif ending == ".safetensors":
        stored = read_safetensors(file, "data file")
    elif ending in (".pt", ".pth"):
        stored = read_torch(file, "data file")
    if not isinstance(stored, Mapping):
        return {}
    return {
        str(name): value
        for name, value in stored.items()
        if isinstance(value, Tensor) and (names is None or name in names)
    }


def _rows(count: int, limit: int | None, seed: int | None) -> slice | Tensor:
    """Return which of ``count`` rows are taken."""
    if limit is None or seed is None or limit >= count:
        return slice(limit)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:limit].sort().values


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and math.isfinite(value)


def _by_channel(name: str, values: Sequence[float], samples: Tensor) -> Tensor:
    """Return numbers in a shape that broadcasts over the channels of samples."""
    tensor = torch.tensor(values, dtype=samples.dtype)
    if len(values) == 1:
        return tensor
    if samples.dim() < 2 or samples.size(1) != len(values):
        raise InputError(
            f"{name} has {len(values)} numbers, but a sample has shape "
            f"{tuple(samples.shape[1:])}: give one, or one for each channel (first axis)"
        )
    return tensor.view(-1, *[1] * (samples.dim() - 2))


def _read(path: Path, ending: str, key: str | None, alone: str) -> Tensor:
    """Return the tensor ``key`` of a file whose ending, unpacked, is ``ending``.

    ``alone`` is what an error says that the file holds, where it has a single array and no names.
    """
    what = "data file"
    if ending in (".npy", ".npz"):
        return _read_numpy(path, key, alone)
    stored = read_safetensors(path, what) if ending == ".safetensors" else read_torch(path, what)
    if isinstance(stored, Mapping):
        stored = stored[_chosen(path, [str(name) for name in stored], key)]
    elif isinstance(stored, Tensor) and key is not None:
        raise InputError(f"{what} {str(path)!r} holds {alone}")
    if not isinstance(stored, Tensor):
        raise InputError(
            f"{what} {str(path)!r} holds a {type(stored).__name__}; a tensor, or tensors by name, "
            "are needed"
        )
    return stored


def _names_in(path: Path) -> list[str]:
    """Return the names of the arrays in a ``.npz`` file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except Exception as error:
        raise InputError(f"data file {str(path)!r} cannot be read: {one_line(error)}") from error


def _read_numpy(path: Path, key: str | None, alone: str = "") -> Tensor:
    opened = _PACKERS.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            # Unpack the whole file first: reading an archive jumps about in it, and every jump
            # would unpack from the start.
            whole = io.BytesIO(file.read()) if opened is not open else file
            stored = np.load(whole, allow_pickle=False)
            if isinstance(stored, np.lib.npyio.NpzFile):
                stored = stored[_chosen(path, stored.files, key)]
            elif key is not None:
                raise InputError(f"data file {str(path)!r} holds {alone}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"data file {str(path)!r} cannot be read: {one_line(error)}") from error
    try:
        return torch.from_numpy(np.asarray(stored, stored.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise InputError(
            f"data file {str(path)!r} holds {stored.dtype}; numbers are needed"
        ) from error


def _chosen(path: Path, names: Sequence[str], key: str | None) -> str:
    """Return the name of the array to read; raise InputError where none is the obvious choice."""
    if key is not None:
        if key not in names:
            raise InputError(f"data file {str(path)!r} has no {key!r}; it has {', '.join(names)}")
        return key
    if len(names) == 1:
        return names[0]
    for known in _KEYS:
        if known in names:
            return known
    raise InputError(
        f"data file {str(path)!r} holds several arrays ({', '.join(names) or 'none'}): say which "
        "by its key"
    )
