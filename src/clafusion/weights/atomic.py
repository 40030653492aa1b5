"""Write files and directories as wholes: what was there stays until the new one is complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clafusion.errors import InputError, kind_of

try:
    import fcntl
except ImportError:  # Windows has none: what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_output",
    "check_parent",
    "making_directory",
    "path_of",
    "remove_left_behind",
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
    is killed or the disk runs full. An error leaves nothing temporary behind. What a killed process
    leaves, the next one removes that writes the same path.

    Raises
    ------
    InputError
        Writing failed, for example on a full disk.
    """
    target = Path(path).resolve()  # follow a link, which the rename would replace
    try:
        with _beside(target) as folder:
            temporary = folder / target.name
            # Create the file here, with the permissions that the user's umask gives a new file.
            # Some writers put a file of their own in its place, so they are set again below.
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
    try:
        with _beside(target) as folder:
            made = folder / target.name
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


# --- temporary directories ------------------------------------------------------------------------

# What is written lies in a directory beside the target, .NAME.12345678.tmp, on which its process
# holds a lock. The system frees the lock of a killed process, so that a free one tells what may go.
# (A lock on the file itself would not do: some writers put a file of their own in its place.) The
# first half of the number says which machine it is of, for not every lock is seen by others.


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield a directory beside ``target`` for what is to get its name; it is gone afterwards.

    Those that killed processes have left for the same target are removed first.
    """
    remove_left_behind(target)
    folder, lock = _locked_directory(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_directory(target: Path) -> tuple[Path, int | None]:
    """Make a directory that nothing has yet, and lock it; None where locks are not to be had."""
    while True:
        folder = target.with_name(f".{target.name}.{_machine()}{secrets.token_hex(2)}.tmp")
        try:
            folder.mkdir(0o700)
        except FileExistsError:
            continue
        try:
            return folder, _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process just found it without a lock, and removes it
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise


def remove_left_behind(target: Path, pattern: str | None = None) -> None:
    """Remove what killed processes have left of files or directories that were to be ``target``.

    What a living process writes stays, and so does what another machine has written.

    Parameters
    ----------
    target
        The file or directory.
    pattern
        A regular expression for the names of others beside it; default that of ``target`` alone.
    """
    name = re.escape(target.name) if pattern is None else pattern
    ours = re.compile(rf"\.(?:{name})\.{_machine()}[0-9a-f]{{4}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        found = [Path(one.path) for one in entries if ours.fullmatch(one.name)]
        for folder in found:
            with contextlib.suppress(OSError):
                lock = _lock(folder)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a directory; the lock ends when the returned handle is closed, or the process ends.

    Returns None where the system or the disk has no locks.

    Raises
    ------
    BlockingIOError
        Another process holds the lock.
    FileNotFoundError
        The directory is gone.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), folder.stat()):
            raise FileNotFoundError(folder)
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _machine() -> str:
    """Return four letters for this machine."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut, where the system allows that."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
