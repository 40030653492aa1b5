"""The tables of families on the pages docs/architectures.md and docs/results.md.

They are made from benchmarks/results/; ``python -m benchmarks.families.table`` prints them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.families.family import EXACT, PAIRS

__all__ = ["LIBRARIES", "REASONS", "counts", "reason_of", "results_of", "summary", "table"]

LIBRARIES = ("transformers", "timm", "torchvision")

Results = dict[str, dict[str, Any]]
"""By a family's name: what tracing found (``traces``) and the row of each pair."""

# What the message of a refusal has -> the reason, as docs/architectures.md gives it.
REASONS = {
    r"for other layers have its weights": "one layer runs again and again: its depth is a count, "
    "not a matter of weights",
    r"heads or groups that cannot change places": "different numbers of heads that cannot change "
    "places, because each has a position of its own",
    r"how many heads of queries share one of keys": "different numbers of query heads share one "
    "key head",
    r"fill_value|mul: other|constant '[^']*': its values|buffer '[^']*': its values": "a constant "
    "of the code depends on the width or on the number of heads: a scale of the embeddings, "
    "slopes, waves as positions",
    r"its branch must end in weights that can be zero": "a block that only one network has "
    "cannot be left out of a sum: it puts its channels beside others, or an activation follows "
    "that its input has not passed",
    r"experts": "different numbers of experts",
    r"wired differently": "the streams differ: a level of one network has no block that can be "
    "inserted",
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
    """Return the table in Markdown, and below it the reasons, by the numbers that it gives them."""
    numbers: dict[str, int] = {}

    def cell(row: dict[str, Any]) -> str:
        outcome = _outcome(row)
        if outcome == "no":
            reason = reason_of(row["message"]) or row["message"]
            return f"no ({numbers.setdefault(reason, len(numbers) + 1)})"
        return outcome

    lines = [
        "| Library | Family | Free channels | Other depth | Other width | Both |",
        "|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        for name, family in results_of(library).items():
            cells = [cell(family[kind]) for kind in PAIRS]
            lines.append(f"| {library} | {name} | {family['channels']} | {' | '.join(cells)} |")
    reasons = [f"{number}. {reason}" for reason, number in numbers.items()]
    return "\n".join([*lines, "", *reasons])


def summary() -> str:
    """Return in Markdown how many pairs of each library and difference come out how."""
    lines = [
        "| Library | Differs in | Pairs | Both parents come back | Not both, as told | Refused |",
        "|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        for kind in PAIRS:
            found = Counter(_outcome(one[kind]) for one in results_of(library).values())
            cells = (found.total(), *(found[name] for name in ("yes", "partly", "no")))
            lines.append(f"| {library} | {kind} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _outcome(row: dict[str, Any]) -> str:
    """Return "yes", "partly" or "no" for a pair, or what else has become of it."""
    if row["outcome"] == "refused":
        return "no"
    if row["outcome"] != "fused":
        return str(row["outcome"])
    return "yes" if max(row["first"], row["second"]) <= EXACT else "partly"


def main() -> None:
    print(table())
    print(summary())
    for outcome, count in counts().most_common():
        print(f"{count:4d} {outcome}")


if __name__ == "__main__":
    main()
