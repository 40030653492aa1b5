"""The table of families on the page docs/architectures.md, from benchmarks/results/.

``python -m benchmarks.families.table`` prints it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.families.family import PAIRS

__all__ = ["LIBRARIES", "REASONS", "counts", "reason_of", "results_of", "table"]

LIBRARIES = ("transformers", "timm", "torchvision")

Results = dict[str, dict[str, Any]]
"""By a family's name: what tracing found (``traces``) and the row of each pair."""

# What a message of a refusal has -> the reason, as docs/architectures.md gives it.
REASONS = {
}


def results_of(library: str) -> Results:
    """Return the figures of a library's families, none if it was never run."""
    path = Path(__file__).parents[1] / "results" / f"families_{library}.json"
    if not path.exists():
        return {}
    found: Results = json.loads(path.read_text(encoding="utf-8"))["families"]
    return found


def reason_of(message: str) -> str | None:
    """Return the documented reason of a refusal, or None."""
    return next((why for found, why in REASONS.items() if re.search(found, message)), None)


def counts() -> Counter[str]:
    """Return how many pairs came out how: fused, wrong, fault, or refused for which reason."""
    rows = [
        family[kind]
        for library in LIBRARIES
        for family in results_of(library).values()
        for kind in PAIRS
    ]
    return Counter(
        reason_of(one["message"]) or "no reason" if one["outcome"] == "refused" else one["outcome"]
        for one in rows
    )


def table() -> str:
    """Return the table in Markdown; refusals are numbered as their reasons stand in the list."""
    numbers = {why: str(i) for i, why in enumerate(dict.fromkeys(REASONS.values()), 1)}

    def cell(row: dict[str, Any]) -> str:
        if row["outcome"] == "refused":
            return f"no ({numbers.get(reason_of(row['message']) or '', '?')})"
        if row["outcome"] == "fused":
            return "yes" if max(row["first"], row["second"]) <= 1e-4 else "told"
        return str(row["outcome"])

    lines = [
        "| Library | Family | Free channels | Other depth | Other width | Both |",
        "|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        for name, family in results_of(library).items():
            cells = [cell(family[kind]) for kind in PAIRS]
            lines.append(f"| {library} | {name} | {family['channels']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    for outcome, count in counts().most_common():
        print(f"{count:4d} {outcome}")
