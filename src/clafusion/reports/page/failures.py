"""Pairs that failed, by cause: each cause once, with the pairs and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from clafusion.alignment.models import label
from clafusion.batch.results import PairResult
from clafusion.reports.page.markup import element, text

__all__ = ["Cause", "causes_of", "failures"]

_AGAIN = "Then run the same command again: only what failed is fused."
_REMEDIES = (
    (r"is corrupt|cannot be read|does not exist", f"Write or copy the file again. {_AGAIN}"),
    (r"memory_limit|MemoryError|out of memory", "Fuse fewer pairs at a time (--jobs), raise the "
     f"memory limit, or lower profiling.matching_rows. {_AGAIN}"),
    (r"^StructureError", "These networks cannot be fused as they are: clafusion explain, with both "
     "files, says all that stands in the way. Else leave the pairs out of the list of pairs."),
    (r"^(GraphVerificationError|UnsupportedOpError)", "The network's code cannot be followed: "
     "clafusion inspect shows how far, and the page Your own architecture says how to help."),
    (r"^InputError", f"The message says what is not right. {_AGAIN}"),
)  # fmt: skip
_UNKNOWN = (
    "No error that clafusion expects: fuse the pair alone, by clafusion fuse with --debug, to see "
    "where it arises."
)


@dataclass(frozen=True)
class Cause:
    """Why some pairs failed.

    Attributes
    ----------
    message
        The error of the first of them.
    remedy
        What to do.
    pairs
        All of them.
    shared
        The models that all of them have.
    """

    message: str
    remedy: str
    pairs: tuple[tuple[str, str], ...]
    shared: tuple[str, ...]


def causes_of(results: Sequence[PairResult]) -> list[Cause]:
    """Return why pairs failed, the most frequent cause first.

    A model whose structure fits that of no other is one cause. Other errors are the same cause
    where they differ by the names of the pair's models only.
    """
    failed = [one for one in results if one.error is not None]
    groups = _by_structure(failed, {name for one in results for name in _fused(one)})
    found: dict[str, list[PairResult]] = {}
    for one in failed:
        if not any(one is other for those in groups for other in those):
            found.setdefault(_without_names(one), []).append(one)
    causes = []
    for those in [*groups, *found.values()]:
        message = those[0].error or ""
        remedy = next((how for what, how in _REMEDIES if re.search(what, message)), _UNKNOWN)
        pairs = tuple((one.first, one.second) for one in those)
        shared = tuple(name for name in pairs[0] if all(name in pair for pair in pairs))
        causes.append(Cause(message, remedy, pairs, shared))
    return sorted(causes, key=lambda one: -len(one.pairs))


def _fused(result: PairResult) -> tuple[str, ...]:
    """Return the models of a pair that was fused; none of one that failed."""
    return () if result.error is not None else (result.first, result.second)


def _by_structure(failed: Sequence[PairResult], fused: set[str]) -> list[list[PairResult]]:
    """Return the pairs of each model that is in several of unlike structure, and was never fused.

    Their errors differ, for each compares it with another model.
    """
    left = [one for one in failed if (one.error or "").startswith("StructureError")]
    groups: list[list[PairResult]] = []
    while left:
        of_model: dict[str, list[PairResult]] = {}
        for one in left:
            for name in (one.first, one.second):
                if name not in fused:
                    of_model.setdefault(name, []).append(one)
        most = max(of_model.values(), key=len, default=[])
        if len(most) < 2:
            return groups
        groups.append(most)
        left = [one for one in left if not any(one is other for other in most)]
    return groups


def _without_names(result: PairResult) -> str:
    """Return a pair's error without the models' names, if it names both; else as it is.

    An error of one model is another cause for each model.
    """
    error = result.error or ""
    labels = [label(result.first), label(result.second)]
    if not all(one in error for one in labels):
        return error
    for one in labels:
        error = error.replace(one, "models[]")
    return error


def failures(results: Sequence[PairResult]) -> str:
    """Return the causes as HTML; "" where nothing failed."""
    return "".join(
        element(
            "article",
            element("h3", text(_title(one))),
            element("p", text(one.message), class_="message"),
            element("p", element("strong", "What to do: "), text(one.remedy)),
            element("p", text(_pairs(one)), class_="note"),
            class_="cause",
        )
        for one in causes_of(results)
    )


def _title(cause: Cause) -> str:
    count = len(cause.pairs)
    pairs = f"{count} pair" + ("s" if count > 1 else "")
    return f"{pairs} with {cause.shared[0]}" if len(cause.shared) == 1 else pairs


def _pairs(cause: Cause) -> str:
    if len(cause.shared) == 1:
        (shared,) = cause.shared
        others = [one if other == shared else other for one, other in cause.pairs]
        return f"With: {', '.join(others)}"
    return "Pairs: " + ", ".join(f"{one} and {other}" for one, other in cause.pairs)
