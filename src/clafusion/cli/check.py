"""``clafusion check``: what of a manifest can be done."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from clafusion.cli.parameters import AsJson
from clafusion.cli.show import print_json, print_text

__all__ = ["check_command"]

_ROWS = 8


def check_command(
    manifest: Annotated[Path, typer.Argument(help="A manifest of fuse-pairs, YAML or JSON.")],
    as_json: AsJson = False,
) -> None:
    """Say in seconds what of a manifest can be done, and why the rest cannot.

    The exit code is 1 if something cannot.
    """
    from clafusion.batch.check import check_pairs
    from clafusion.batch.named_tasks import task_cause
    from clafusion.cli.manifest import read_manifest
    from clafusion.cli.manifest_data import DataReader, data_of_manifest, models_of_pairs

    given = read_manifest(manifest)
    facts: dict[str, Any] = {}
    shown: list[str] = []
    is_bad = False
    if given.pairs:
        pairs = given.pairs
        if isinstance(pairs, str):
            pairs = list(itertools.combinations(given.models, 2))
        samples = data_of_manifest(models_of_pairs(given), given.data, _ROWS)
        found = check_pairs(given.models, samples, pairs, given.configs[0])
        facts, is_bad = found.to_dict(), bool(found.causes)
        shown.append(str(found))
    read = DataReader(given.models, _ROWS)
    causes: dict[tuple[str, str], str | None] = {}
    for task in given.tasks:  # of several settings the first that cannot be done is told
        key = task.kind, task.name
        causes[key] = causes.get(key) or task_cause(read.filled(task), given.models)
    if given.tasks:
        facts["tasks"] = [
            {"kind": kind, "name": name, "reason": cause} for (kind, name), cause in causes.items()
        ]
        good = sum(one is None for one in causes.values())
        shown.append(f"can be done  {good} of {len(causes)} merges and reassemblies")
        shown += [
            f"cannot       {kind} {name}: {cause}"
            for (kind, name), cause in causes.items()
            if cause is not None
        ]
        is_bad |= good < len(causes)
    if as_json:
        print_json(facts)
    else:
        print_text("\n".join(shown))
    if is_bad:
        raise typer.Exit(1)
