"""Proofs kept on disk: an architecture is proved with random weights once for all runs.

An entry says nothing but that a proof was made: which, its name says. It holds no code, and with a
forged one a model's own weights are proved all the same.
"""

from __future__ import annotations

import logging
from pathlib import Path

from clafusion.errors import InputError
from clafusion.tracing.known_proofs import KnownProofs
from clafusion.weights.atomic import replacing
from clafusion.weights.digests import digest_of, versions

__all__ = ["ProofsOnDisk"]

_LOG = logging.getLogger("clafusion")


class ProofsOnDisk(KnownProofs):
    """Proofs by the hash of all that they depend on, and of the releases that made them.

    Parameters
    ----------
    folder
        Where the entries lie, one file each. What is no whole entry counts as none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, key: object) -> bool:
        name = self._name(key)
        try:
            return self._path(name).read_text(encoding="ascii") == name
        except (OSError, UnicodeError):
            return False

    def add(self, key: str) -> None:
        """Write an entry. A failure is logged and not raised, for the proof is made."""
        name = self._name(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(name), "cache entry") as temporary:
                temporary.write_text(name, encoding="ascii")
        except (OSError, InputError) as error:
            _LOG.warning("cache entry %s cannot be written: %s", self._path(name), error)

    def _name(self, key: object) -> str:
        return digest_of([key, versions()])

    def _path(self, name: str) -> Path:
        return self._folder / f"{name[:40]}.proof"
