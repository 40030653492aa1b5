"""Exported programs: a network with its weights in one file, which needs none of its code."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.tracing.copies import evaluation_copy
from clafusion.tracing.export import export_model
from clafusion.weights.atomic import replacing
from clafusion.weights.messages import one_line

__all__ = ["PROGRAM", "load_program", "save_program"]

PROGRAM = ".pt2"
"""How the file of an exported program ends."""

_PLAIN = re.compile(
    r"(archive_format|archive_version|byteorder|\.data/\w+|\.format_version|version"
    r"|models/[^/]+\.json|data/(weights|constants)/[^/]+\.json)"
)
_TENSORS = re.compile(r"data/(weights/weight_\d+|constants/tensor_\d+)")
_PICKLED = re.compile(r"data/(weights|constants|sample_inputs)/[^/]+\.pt")


def save_program(
    model: nn.Module, inputs: tuple[Tensor, ...], keywords: tuple[str, ...], path: Path
) -> None:
    """Write a network as ``torch.export.save`` does, in eval mode; the old file stays till then.

    Parameters
    ----------
    model
        The network. It stays as it is.
    inputs, keywords
        Example inputs and their names, as those of a traced model.
    path
        The file.

    Raises
    ------
    UnsupportedOpError
        The network cannot be exported.
    InputError
        The file cannot be written.
    """
    named = dict(zip(keywords, inputs, strict=True)) if keywords else {}
    # A loaded program takes inputs by place in the order in which it was exported with them.
    order = [*inspect.signature(model.forward).parameters, *named]
    named = {name: named[name] for name in dict.fromkeys(order) if name in named}
    program = export_model(evaluation_copy(model), () if keywords else inputs, named)
    with replacing(path, "path") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = io.BytesIO()
        torch.export.save(program, memory)
        temporary.write_bytes(memory.getbuffer())


def load_program(path: str | os.PathLike[str]) -> nn.Module:
    """Return the module of an exported program. It computes as in eval mode.

    One that was exported with inputs by name takes them by place, too, in the order in which the
    network's forward had them.

    Raises
    ------
    InputError
        The file is missing, is no exported program, or holds objects that only code could make
        again: ``torch.export.load`` would run it.
    """
    if not Path(path).is_file():
        raise InputError(f"{os.fspath(path)!r} does not exist")
    try:
        found = next(_unsafe(Path(path)), None)
    except (BadZipFile, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{os.fspath(path)!r} is no program that torch.export.save wrote: {one_line(error)}"
        ) from error
    if found is not None:
        raise InputError(
            f"{os.fspath(path)!r} holds more than a graph and tensors: {found}. Loading that could "
            "run any code"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            loaded: nn.Module = program.module()
    except Exception as error:
        raise InputError(
            f"{os.fspath(path)!r} is no program that torch.export.save wrote, or of another "
            f"release: {one_line(error)}"
        ) from error
    # They refuse to be called: a program has one mode, and it stays as it is.
    for name in ("train", "eval"):
        vars(loaded).pop(name, None)
    names = _keywords(program)
    if names:
        loaded.register_forward_pre_hook(partial(_named, names), with_kwargs=True, prepend=True)
    return loaded


def _keywords(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Return the names of a program's inputs where it takes all of them by name."""
    signature = program.module_call_graph[0].signature
    if signature is None:
        return ()
    places, names = signature.in_spec.children()
    return () if places.num_children else tuple(names.context)


def _named(
    names: tuple[str, ...], _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs by their names."""
    if len(given) > len(names):
        return given, named  # which the program refuses
    return (), {**dict(zip(names, given, strict=False)), **named}


def _unsafe(path: Path) -> Iterator[str]:
    """Yield what torch would unpickle without a check; torch falls back to that by itself."""
    with ZipFile(path) as archive:
        names = Counter(one.filename for one in archive.infolist())
        for name, count in names.items():
            inner = name.partition("/")[2]
            if count > 1 or not inner:
                yield f"the entry {name!r}"
            elif _PICKLED.fullmatch(inner):
                if not _is_plain(archive.read(name)):
                    yield f"objects in {name!r}"
            elif not (_PLAIN.fullmatch(inner) or _TENSORS.fullmatch(inner)):
                yield f"the entry {name!r}"
        for name in names:
            if re.fullmatch(r"[^/]+/data/(weights|constants)/[^/]+\.json", name):
                yield from _pickled_tensors(archive, name)


def _pickled_tensors(archive: ZipFile, config: str) -> Iterator[str]:
    """Yield tensors that a config says are pickled, and that are more than tensors."""
    payloads: dict[str, Any] = json.loads(archive.read(config)).get("config", {})
    for payload in payloads.values():
        if not payload.get("use_pickle"):
            continue
        name = f"{config.rpartition('/')[0]}/{payload['path_name']}"
        if not _is_plain(archive.read(name)):
            yield f"objects in {name!r}"


def _is_plain(content: bytes) -> bool:
    """Say whether something pickled is tensors and plain values alone."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:
        return not content
    return True
