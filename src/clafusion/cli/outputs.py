"""Where a command writes a network: weights, a program or a directory, checked before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clafusion.errors import InputError
from clafusion.interop.huggingface import weight_files
from clafusion.interop.programs import PROGRAM
from clafusion.interop.records import check_companions
from clafusion.interop.saving import check_directory
from clafusion.weights.state_files import WRITABLE, check_weights_output

__all__ = ["check_network_output", "check_processor_of"]


def check_network_output(out: Path, files: Mapping[str, Path], data: Sequence[Path]) -> bool:
    """Say whether ``--out`` becomes a Hugging Face directory; else it is a file.

    Of directories alone a directory is made, unless the name ends as a file's.

    Parameters
    ----------
    out
        What was given.
    files
        The models' files, by name.
    data
        The other files that are read.

    Raises
    ------
    InputError
        It cannot be written, or something that is read would be lost by that.
    """
    endings = (*WRITABLE, PROGRAM)
    all_folders = all(one.is_dir() for one in files.values())
    if all_folders and not out.name.lower().endswith(endings):
        check_directory(out, "--out")
        return True
    read = [one for file in files.values() for one in weight_files(file)]
    check_weights_output(out, "--out", read, data, endings)
    check_companions(out, "--out")
    return False


def check_processor_of(
    name: str | None, files: Mapping[str, Path], out: Path, *, folder: bool
) -> None:
    """Refuse a ``--processor-of`` that is no model, or is given for a file as ``--out``.

    Raises
    ------
    InputError
        It is one of these.
    """
    if name is None:
        return
    if not folder:
        raise InputError(f"--processor-of is for a directory as --out; {str(out)!r} is a file")
    if name not in files:
        raise InputError(f"--processor-of {name} is none of the models, {', '.join(files)}")
