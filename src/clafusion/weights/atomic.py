"""Write files and directories as wholes: what was there stays until the new one is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clafusion.errors import InputError, kind_of

__all__ = [
    "check_output",
    "check_parent",
    "making_directory",
    "path_of",
    "removed_on_error",
    "replacing",
]


def path_of(path: Any, argument: str) -> Path:
    """Return a path; refuse what is none, by the name of its argument."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{argument} must be a path, as text or pathlib.Path; got {kind_of(path)}")
    return Path(path)


def check_output(
    path: str | os.PathLike[str],
    endings: Sequence[str],
    argument: str,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Return ``path`` if a file with one of these endings can be written there.

    Raises
    ------
    InputError
        The ending is unknown, the directory does not exist or may not be written to, the path is
        one of ``inputs``, or something other than a file is there. The message calls the path
        ``argument``.
    """
    path = path_of(path, argument)
    if not path.name.lower().endswith(tuple(endings)):
        wanted = f"one of {', '.join(endings)}: the ending chooses the format"
        raise InputError(
            f"{argument} {str(path)!r} must end with {endings[0] if len(endings) == 1 else wanted}"
        )
    if path.exists() and not path.is_file():
        raise InputError(f"{argument} {str(path)!r} exists and is no file: choose another name")
    if path.exists() and any(os.path.exists(file) and path.samefile(file) for file in inputs):
        raise InputError(
            f"{argument} {str(path)!r} is an input, which would be lost: choose another name"
        )
    check_parent(path, argument)
    return path


def check_parent(path: Path, argument: str) -> None:
    """Refuse a path beside which nothing can be written; the message calls it ``argument``.

    Permissions alone do not tell: those of ``/proc`` admit everything, and a disk may be full.
    """
    directory = path.resolve().parent
    if not directory.is_dir():
        raise InputError(
            f"{argument} {str(path)!r}: the directory {str(directory)!r} does not exist; create it"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"{argument} {str(path)!r}: no permission to write to {str(directory)!r}")
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        raise InputError(
            f"{argument} {str(path)!r}: nothing can be written to {str(directory)!r}: "
            f"{error.strerror or error}"
        ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], argument: str) -> Iterator[Path]:
    """Yield a temporary path in the same directory; rename what was written there afterwards.

    The rename is atomic: readers of ``path`` see the old file or the new one, even if this process
    is killed or the disk runs full. An error leaves nothing temporary behind.

    Raises
    ------
    InputError
        Writing failed, for example on a full disk.
    """
    target = Path(path).resolve()  # follow a link, which the rename would replace
    temporary = _temporary(target)
    try:
        # Create the file here, with the permissions that the user's umask gives a new file. Some
        # writers put a file of their own in its place, so the permissions are set again below.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {argument} {str(path)!r}: {error.strerror or error}; "
            "what was there before is unchanged"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove a file after an error in the block, unless it was there before."""
    is_new = not path.exists()
    try:
        yield
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def making_directory(path: Path, argument: str) -> Iterator[Path]:
    """Yield a directory beside ``path``, which gets that name; after an error it is gone.

    Raises
    ------
    InputError
        Writing failed, for example on a full disk. The message calls the path ``argument``.
    """
    target = path.resolve()
    made = _temporary(target)
    try:
        made.mkdir()
        yield made
        if target.is_dir():  # and empty
            target.rmdir()
        os.replace(made, target)
    except OSError as error:
        raise InputError(
            f"cannot write {argument} {str(path)!r}: {error.strerror or error}; nothing is left "
            "behind"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _temporary(target: Path) -> Path:
    """Return a name in the same directory that nothing has yet."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut, where the system allows that."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
