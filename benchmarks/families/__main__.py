"""Fuse pairs of public families, of other depth, of other width and of both.

    python -m benchmarks.families LIBRARY ... [--only PART ...] [--limit SECONDS]

LIBRARY is timm, torchvision or transformers; the first two need an environment of their own. Figures
go to benchmarks/results/families_LIBRARY.json; families that are not run keep theirs. The exit status
is 1 where a pair came out wrong or at fault, was refused for a reason that docs/architectures.md
does not give, or was fused before and is not any more.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import sys
import warnings
from typing import Any

import torch

from benchmarks.families.family import PAIRS, Family, pairs
from benchmarks.families.pairs import Members, row
from benchmarks.families.table import LIBRARIES, Results, reason_of, results_of
from benchmarks.results import write_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="+", choices=LIBRARIES, metavar="LIBRARY")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of families' names")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a pair")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    bad = 0
    for library in given.libraries:
        families = importlib.import_module(f"benchmarks.families.of_{library}").families()
        chosen = [one for one in families if any(part in one.name for part in given.only)]
        before = results_of(library)
        found = _run(chosen, before, given.limit)
        kept = {name: before[name] for name in (one.name for one in families) if name in before}
        order = [one.name for one in families if one.name in kept | found]
        write_results(
            f"families_{library}",
            {
                "release": importlib.metadata.version(library),
                "families": {name: (kept | found)[name] for name in order},
            },
        )
        bad += sum(
            _is_bad(family[kind], before.get(name, {}).get(kind))
            for name, family in found.items()
            for kind in PAIRS
        )
    sys.exit(bad > 0)


def _run(families: list[Family], before: Results, limit: float) -> Results:
    """Run all pairs of families; print a line for each."""
    found: Results = {}
    members: Members | None = None
    for family, kind in pairs(families):
        if members is None or members.family is not family:
            members = Members(family)
        one = row(members, kind, limit)
        found.setdefault(family.name, {})[kind] = one
        found[family.name]["channels"] = members.channels
        mark = "  <- bad" if _is_bad(one, before.get(family.name, {}).get(kind)) else ""
        facts = ", ".join(f"{name} {value}" for name, value in one.items() if name != "outcome")
        print(f"{family.name:<26} {kind:<6} {one['outcome']:<8} {facts}{mark}", flush=True)
    return found


def _is_bad(row: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Return whether a pair came out as it must not: see the module's text."""
    if row["outcome"] == "refused":
        lost = before is not None and before["outcome"] == "fused"
        return lost or reason_of(row["message"]) is None
    return bool(row["outcome"] != "fused")


if __name__ == "__main__":
    main()
