"""Run the code of a page, and keep the output that the page shows true.

    python docs/run_page.py docs/tutorials/zoo.md            says where the output differs
    python docs/run_page.py docs/tutorials/zoo.md --write    puts the new output into the page,
                                                             and its pictures beside it

A page is run from top to bottom in an empty folder. ``python`` blocks share their names; one with a
title is written to the file of that name instead. ``sh`` blocks hold commands of clafusion, run one
after another; ``# exit code 1`` behind one says that it ends so. A ``text`` block right behind a
block is what that block prints. Blocks of other languages are not run, nor is a block behind
``<!-- not run -->``.

Training differs a little between machines. So two outputs are the same if their words and whole
numbers are, and the other numbers nearly. A number in seconds may be any. Of an output behind
``<!-- may differ -->``, such as one that says which network is the better one, lines are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Block", "blocks", "differences", "outputs"]

BLOCK = re.compile(
    r"(?P<skip><!-- not run -->\n+)?^```(?P<language>python|sh)(?: title=\"(?P<title>.*?)\")?\n"
    r"(?P<code>.*?)^```\n(?:\n(?P<loose><!-- may differ -->\n)?```text\n(?P<said>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)")
EXIT_CODE = re.compile(r"# exit code (\d+)$")
SECONDS = re.compile(r"\s+[\d.]+(?=\s+fused( before)?$)")  # of a row in a table of pairs
POINTS = 5.0  # how far shares in percent may be apart
RELATIVE = 0.3  # and other numbers that are not whole


@dataclass(frozen=True)
class Block:
    """A piece of code on a page, with the output that the page shows for it."""

    language: str
    code: str
    title: str | None
    said: str | None
    span: tuple[int, int]
    """Where the output stands in the page, or would have to."""
    loose: bool
    """Whether the output's words may differ, and only its lines are counted."""


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page that are run."""
    return [
        Block(
            found["language"],
            found["code"],
            found["title"],
            found["said"],
            found.span("said") if found["said"] is not None else (found.end(), found.end()),
            bool(found["loose"]),
        )
        for found in BLOCK.finditer(page)
        if not found["skip"]
    ]


def outputs(found: list[Block], folder: Path) -> list[str]:
    """Run blocks in a folder; return what each printed."""
    names: dict[str, Any] = {"__name__": "page"}
    printed: list[str] = []
    before = Path.cwd()
    sys.path.insert(0, str(folder))
    try:
        os.chdir(folder)
        for block in found:
            if block.title is not None:
                Path(block.title).write_text(block.code, encoding="utf-8")
                printed.append("")
                continue
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if block.language == "python":
                    exec(compile(block.code, "page", "exec"), names)
                else:
                    _commands(block.code)
            lines = (line.rstrip() for line in out.getvalue().splitlines())
            printed.append("\n".join(lines).strip("\n").replace(str(folder) + os.sep, ""))
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        for block in found:
            if block.title is not None:
                sys.modules.pop(Path(block.title).stem, None)
    return printed


def _commands(code: str) -> None:
    from clafusion.cli.app import main

    for line in code.replace("\\\n", " ").splitlines():
        name, *arguments = shlex.split(line, comments=True) or ("#",)
        if name == "clafusion":
            status, told = main(arguments), EXIT_CODE.search(line)
            if status != (int(told[1]) if told else 0):
                raise RuntimeError(f"{line}: exit code {status}")
        elif name != "#":
            raise ValueError(f"{line}: only commands of clafusion are run")


def differences(block: Block, printed: str) -> list[str]:
    """Return how what is printed differs from what a page says, line by line."""
    told, new = (block.said or "").strip("\n").splitlines(), printed.strip("\n").splitlines()
    if len(told) != len(new):
        return [f"{len(new)} lines in place of {len(told)}"]
    if block.loose:
        return []
    return [f"{b!r} in place of {a!r}" for a, b in zip(told, new, strict=True) if not _alike(a, b)]


def _alike(said: str, printed: str) -> bool:
    for word in ("memory ", "seconds "):  # the machine's, not ours
        if said.startswith(word) and printed.startswith(word):
            return True
    said, printed = (SECONDS.sub(" ", one) for one in (said, printed))
    words = [NUMBER.sub("#", re.sub(r"[-─━]{2,}", "--", one)).split() for one in (said, printed)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.finditer(said), NUMBER.finditer(printed), strict=True)
    return all(_near(a, said, b) for a, b in pairs)


def _near(a: re.Match[str], line: str, b: re.Match[str]) -> bool:
    behind = line[a.end() :]
    if re.match(r" ?s(econds)?\b", behind):
        return True
    x, y = (float(one.group().replace(",", "")) for one in (a, b))
    if re.match(r" ?%", behind):
        return abs(x - y) <= POINTS
    if all(re.fullmatch(r"-?[\d,]+", one.group()) for one in (a, b)):
        return x == y
    return abs(x - y) <= RELATIVE * max(abs(x), abs(y), 0.1)


def main() -> int:
    """Compare a page's output with what its code prints now, or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true", help="put the output into the page")
    given = parser.parse_args()
    page = given.page.read_text(encoding="utf-8")
    found = blocks(page)
    with tempfile.TemporaryDirectory() as folder:
        printed = outputs(found, Path(folder).resolve())
        for picture in re.findall(r"^!\[[^\]]*\]\(([\w-]+\.(?:png|svg))\)", page, re.MULTILINE):
            if given.write and (Path(folder) / picture).is_file():
                shutil.copy(Path(folder) / picture, given.page.parent / picture)
    if given.write:
        for block, text in reversed(list(zip(found, printed, strict=True))):
            start, end = block.span
            if block.said is not None:
                page = f"{page[:start]}{text}\n{page[end:]}"
            elif text:
                page = f"{page[:start]}\n```text\n{text}\n```\n{page[end:]}"
        given.page.write_text(page, encoding="utf-8")
        return 0
    wrong = [
        line
        for block, text in zip(found, printed, strict=True)
        for line in differences(block, text)
    ]
    print("\n".join(wrong) or "the page says what its code prints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
