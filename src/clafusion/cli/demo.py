"""``clafusion demo``: the main job on data that ships with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from clafusion.cli.options import configured
from clafusion.cli.parameters import AsJson
from clafusion.cli.show import print_json, print_text, say

__all__ = ["STAGES", "demo_command"]

STAGES = ("seed",)
"""The fields of the configuration that the demo leaves open."""


def demo_command(
    out_dir: Annotated[
        Path, typer.Option(help="Where to write the picture and the fused weights.")
    ] = Path("demo-output"),
    as_json: AsJson = False,
    *,
    options: Mapping[str, str | bool],
) -> None:
    """Train two small networks of different depth on handwritten digits, and fuse them."""
    from clafusion.demo import run_demo

    outcome = run_demo(out_dir, seed=configured(options).seed, say=say)
    if as_json:
        print_json(outcome.facts())
    else:
        print_text(outcome.summary())
