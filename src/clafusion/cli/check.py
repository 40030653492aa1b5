"""``clafusion check``: which pairs of a manifest can be fused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from clafusion.cli.parameters import AsJson
from clafusion.cli.show import print_json, print_text

__all__ = ["check_command"]

_ROWS = 8


def check_command(
    manifest: Annotated[Path, typer.Argument(help="A manifest of fuse-pairs, YAML or JSON.")],
    as_json: AsJson = False,
) -> None:
    """Say in seconds which pairs of a manifest can be fused, and why others cannot.

    The exit code is 1 if some cannot.
    """
    from clafusion.batch.check import check_pairs
    from clafusion.cli.manifest import read_manifest
    from clafusion.cli.pairs import data_of_manifest

    given = read_manifest(manifest)
    samples = data_of_manifest(given, most=_ROWS)
    pairs = given.pairs
    if isinstance(pairs, str):
        pairs = list(itertools.combinations(given.models, 2))
    found = check_pairs(given.models, samples, pairs, given.configs[0])
    if as_json:
        print_json(found.to_dict())
    else:
        print_text(str(found))
    if found.causes:
        raise typer.Exit(1)
