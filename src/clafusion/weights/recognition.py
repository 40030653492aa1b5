"""What a file is that cannot be read as weights, and what to do about it."""

from __future__ import annotations

import pickletools
import re
from pathlib import Path
from zipfile import is_zipfile

import torch

from clafusion.weights.messages import listed

__all__ = ["is_cut_short", "is_shard", "stands_for_another", "unreadable_content", "writer_of"]

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<ending>\.\w+)")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_MAGIC = 0x1950A86A20F9469CFC6C
_PICKLES = 4  # of a file of torch before 1.6: magic number, version, system and what was saved
_TENSORS_HELPERS = ("builtins.", "collections.")  # which say nothing to those who read of them
_KINDS = (
    ("torch.nn.parameter.UninitializedParameter", "the weights of a lazy module that never ran"),
    ("torch.nn.parameter.UninitializedBuffer", "the weights of a lazy module that never ran"),
    ("torch.nn.modules.", "a whole module"),
    ("torch.optim.lr_scheduler.", "a whole scheduler"),
    ("torch.optim.", "a whole optimizer"),
    ("argparse.Namespace", "a program's arguments"),
    ("omegaconf.", "a configuration"),
    ("numpy.", "NumPy values"),
    ("pathlib.", "paths"),
)


def stands_for_another(path: Path) -> str | None:
    """Return what a file is that was put in the place of another one, and what to do; else None.

    These are pointers of Git LFS, and web pages that a failed download left.
    """
    with path.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a pointer of Git LFS, not the file itself: fetch that by 'git lfs pull' in its "
            "repository"
        )
    if head.startswith((b"<!doctype html", b"<html")):
        return (
            "is a web page, not what its ending says: the download failed, perhaps for want of a "
            "login; download it again"
        )
    return None


def is_shard(path: Path) -> str | None:
    """Return what to do with a file whose name says that it is one part of several; else None."""
    matched = _SHARD.fullmatch(path.name)
    if matched is None or int(matched["count"]) < 2:
        return None
    index = path.with_name(f"{matched['stem']}{matched['ending']}.index.json")
    told = (
        f"give its index {index.name!r} instead, which names them all"
        if index.is_file()
        else f"fetch its index {index.name!r} and all parts into one folder, and give the index"
    )
    return f"is part {int(matched['number'])} of {int(matched['count'])} of a checkpoint: {told}"


def writer_of(path: Path) -> str | None:
    """Return what a file begins as: one of ``torch.save`` or of ``safetensors``; else None."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "torch.save"
    return "safetensors" if head[8:] == b"{" else None  # after the length of the header


def is_cut_short(path: Path, error: BaseException) -> bool:
    """Return whether a file of ``torch.save``, which could not be read, ends too early."""
    with path.open("rb") as file:
        head = file.read(4)
        if head == b"PK\x03\x04":
            return not is_zipfile(path)
        if not head.startswith(b"\x80"):  # as the format begins that torch wrote before 1.6
            return False
        file.seek(0)
        try:
            if _MAGIC not in [value for _, value, _ in pickletools.genops(file)]:
                return False
            for _ in range(_PICKLES - 1):
                for _operation in pickletools.genops(file):
                    pass
        except ValueError:  # it ends within one of them
            return not file.read(1)
    return "unexpected EOF" in str(error) or isinstance(error, EOFError)


def unreadable_content(path: Path, error: BaseException) -> str | None:
    """Say what a file holds that is no tensor, where that is why it was not loaded; else None.

    Parameters
    ----------
    path
        A file of ``torch.save``.
    error
        The error of loading it.
    """
    said = " ".join(str(one) for one in (error, error.__context__))
    if "Unsupported global" not in said and "Unsupported class" not in said:
        return None
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the file has the format that torch wrote before 1.6
        found = _GLOBAL.findall(said)
    shown = [name for name in found if not name.startswith(_TENSORS_HELPERS)] or found
    return listed(dict.fromkeys(map(_described, shown))) or "Python objects"


def _described(name: str) -> str:
    kind = next((words for start, words in _KINDS if name.startswith(start)), None)
    return name if kind is None else f"{kind} ({name})"
