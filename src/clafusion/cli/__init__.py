"""The command line. Nothing is imported too early, so that Ctrl-C always ends it quietly."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: see :func:`clafusion.cli.app.main`."""
    try:
        from clafusion.cli.app import main as run

        return run(arguments)
    except KeyboardInterrupt:  # before the command line could say what it keeps
        print("clafusion: interrupted; no output was written", file=sys.stderr)
        return 130
