"""Print what became of each set of releases: `table.py FOLDER SET...`, as a table in Markdown.

The folder has, for each set, the Python in SET-python.txt, SET-freeze.txt of pip, SET.xml of
pytest, and in SET-exit.txt what that exited with. Where one is missing, that was not reached.
"""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

SHOWN = ("torch", "numpy", "scipy", "pot", "transformers")


def normal(name: str) -> str:
    """Return the name as packages are compared: POT and pot are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def text(path: Path) -> str:
    """Return what a file says, or a dash."""
    return path.read_text(encoding="utf-8").strip() if path.exists() else "-"


def versions(path: Path) -> dict[str, str]:
    """Return the releases that were installed, by name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = [line.split("==") for line in lines if "==" in line]
    return {normal(name): version for name, version in pairs}


def outcome(path: Path, code: str) -> list[str]:
    """Return the verdict, and how many tests passed, failed and were skipped."""
    if not path.exists():
        return ["no tests were run", "-", "-", "-"]
    suite = next(ET.parse(path).getroot().iter("testsuite"))
    tests, failures, errors, skipped = (
        int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
    )
    # An interrupted run may count no failure and has proved nothing.
    verdict = {"0": "passed", "1": "failed"}.get(code, "broke off")
    counts = (tests - failures - errors - skipped, failures + errors, skipped)
    return [verdict, *map(str, counts)]


def main() -> None:
    """Print the table."""
    folder, *sets = sys.argv[1:]
    rows = [["set", "Python", *SHOWN, "verdict", "passed", "failed", "skipped"]]
    for name in sets:
        found = versions(Path(folder, f"{name}-freeze.txt"))
        rows.append(
            [
                name,
                text(Path(folder, f"{name}-python.txt")),
                *(found.get(one, "-") for one in SHOWN),
                *outcome(Path(folder, f"{name}.xml"), text(Path(folder, f"{name}-exit.txt"))),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
