"""Fuse pairs of public families, of other depth, of other width and of both.

    python -m benchmarks.families LIBRARY ... [--only PART ...] [--limit SECONDS]

LIBRARY is timm, torchvision or transformers; the first two need an environment of their own.
Figures go to benchmarks/results/families_LIBRARY.json; families that are not run keep theirs. The
exit status is 1 where a pair came out wrong or at fault, was refused for a reason that
docs/architectures.md does not give, or was fused before and is not any more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import logging
import sys
import warnings
from typing import Any

import torch

from benchmarks.families.family import PAIRS, Family
from benchmarks.families.pairs import Members, row
from benchmarks.families.table import LIBRARIES, Results, reason_of, results_of
from benchmarks.results import write_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="+", choices=LIBRARIES, metavar="LIBRARY")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of families' names")
    parser.add_argument(
        "--limit", type=float, default=300.0, help="seconds of the processor for each"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    bad = 0
    for library in given.libraries:
        families = importlib.import_module(f"benchmarks.families.of_{library}").families()
        chosen = [one for one in families if any(part in one.name for part in given.only)]
        figures = results_of(library)
        for family in chosen:
            before = figures.get(family.name, {})
            figures[family.name] = found = _run(family, given.limit)
            bad += sum(_is_bad(found[kind], before.get(kind)) for kind in PAIRS)
            known = [one.name for one in families if one.name in figures]
            _write(library, {name: figures[name] for name in known})
    print(f"{bad} pairs came out as they must not" if bad else "all as documented")
    sys.exit(bad > 0)


def _write(library: str, figures: Results) -> None:
    """Write the figures of a library's families after each, for all take long."""
    release = importlib.metadata.version(library)
    with contextlib.redirect_stdout(io.StringIO()):
        write_results(f"families_{library}", {"release": release, "families": figures})


def _run(family: Family, limit: float) -> dict[str, Any]:
    """Run all pairs of a family; print a line for each."""
    found: dict[str, Any] = {}
    members = Members(family)
    for kind in PAIRS:
        found[kind] = row(members, kind, limit)
        facts = ", ".join(f"{name} {value}" for name, value in found[kind].items())
        print(f"{family.name}, {kind}: {facts}", flush=True)
    return {"channels": members.channels, **found}


def _is_bad(row: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Return whether a pair came out as it must not: see the module's text."""
    if row["outcome"] == "refused":
        lost = before is not None and before["outcome"] == "fused"
        return lost or reason_of(row["message"]) is None
    return bool(row["outcome"] != "fused")


if __name__ == "__main__":
    main()
