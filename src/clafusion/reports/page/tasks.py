"""Merges and reassemblies as tables of the page, and why some could not be done."""

from __future__ import annotations

from collections.abc import Sequence

from clafusion.assessment.nearness import Nearness
from clafusion.batch.named_tasks import NamedResult
from clafusion.config import MergeConfig, ReassemblyConfig
from clafusion.reports.options import changed_options
from clafusion.reports.page.markup import definitions, element, percent, section, sortable, text
from clafusion.settings import Settings

__all__ = ["counted_tasks", "task_tiles", "tasks_sections"]

_KINDS: dict[str, tuple[str, str, str, type[Settings]]] = {
    "merge": ("merges", "Merges", "models and weights", MergeConfig),
    "reassembly": ("reassemblies", "Reassemblies", "blocks", ReassemblyConfig),
}
"""A task's kind -> its section, that one's heading, what it is made of, the type of options."""

_NOTE = (
    "Agreement and distance say how near the network comes to what its models put out together, on "
    "inputs that were kept out; without data nothing was run. The nearest model is the one that "
    "comes nearest to that alone. Options are those that are not the default."
)


def counted_tasks(tasks: Sequence[NamedResult]) -> str:
    """Return how many merges and reassemblies there are, in words; "" for none."""
    parts = []
    for kind, (plural, *_) in _KINDS.items():
        count = sum(one.kind == kind for one in tasks)
        if count:
            parts.append(f"{count} {kind if count == 1 else plural}")
    return " and ".join(parts)


def task_tiles(tasks: Sequence[NamedResult]) -> dict[str, str]:
    """Return how many merges and reassemblies were done, by what the page calls that."""
    tiles = {}
    for kind, (plural, *_) in _KINDS.items():
        own = [one for one in tasks if one.kind == kind]
        if own:
            done = sum(one.error is None for one in own)
            tiles[f"{plural} done"] = f"{done} of {len(own)}"
    return tiles


def tasks_sections(tasks: Sequence[NamedResult]) -> list[str]:
    """Return a section with a table for all merges, and one for all reassemblies."""
    parts = []
    for kind, (name, title, *_) in _KINDS.items():
        own = [one for one in tasks if one.kind == kind]
        if own:
            note = element("p", _NOTE, class_="note")
            parts.append(section(name, title, note, _table(own), _failed(own), _warnings(own)))
    return parts


def _table(tasks: Sequence[NamedResult]) -> str:
    """Return the table of the tasks of one kind."""
    _, title, made_of, options = _KINDS[tasks[0].kind]
    is_merge = tasks[0].kind == "merge"
    is_classes = any(
        one.assessment is not None and one.assessment.kind == "classes" for one in tasks
    )
    nearness = ["agreement, %", "distance"] if is_classes else ["distance"]
    titles = [
        "name",
        "outcome",
        *(["base"] if is_merge else []),
        made_of,
        "options",
        *nearness,
        "nearest model",
        f"its {nearness[0]}",
        "seconds",
        "file",
    ]
    rows = []
    for one in tasks:
        models = one.models[is_merge:]
        changed = changed_options(one.settings, options)
        shown = ", ".join(f"{path} {value}" for path, value in changed.items())
        found = one.assessment
        nearest = None if found is None else found.nearest_parent
        done = "done before" if one.resumed else "done"
        cells = [
            element("th", text(one.name), scope="row"),
            element("td", "failed" if one.error is not None else done),
            *([element("td", text(one.models[0]))] if is_merge else []),
            element("td", text(one.made_of or ", ".join(models)), class_="source"),
            element("td", text(shown), class_="source"),
            *_nearness(None if found is None else found.result, is_classes=is_classes),
            element("td", text(nearest or "")),
            *_nearness(
                None if found is None or nearest is None else found.parents[nearest],
                is_classes=is_classes,
            )[:1],
            element("td", f"{one.seconds:.2f}", class_="number"),
            element("td", text("" if one.path is None else one.path.name)),
        ]
        rows.append(element("tr", *cells))
    return sortable(titles, rows, f"all {title.lower()}")


def _nearness(near: Nearness | None, *, is_classes: bool) -> list[str]:
    """Return the cells of how near a network is; empty where that is not known."""
    share = None if near is None else near.agreement
    agreement = "" if share is None else percent(share)
    distance = "" if near is None else f"{near.distance:.3g}"
    shown = [agreement, distance] if is_classes else [distance]
    return [element("td", one, class_="number") for one in shown]


def _failed(tasks: Sequence[NamedResult]) -> str:
    """Return why some could not be done."""
    return "".join(
        element(
            "article",
            element("h3", text(f"{one.name} was not done")),
            element("p", text(one.error), class_="message"),
            element("p", text(f"Models: {', '.join(one.models)}"), class_="note"),
            class_="cause",
        )
        for one in tasks
        if one.error is not None
    )


def _warnings(tasks: Sequence[NamedResult]) -> str:
    """Return the warnings of all tasks."""
    found = [(one.name, warning) for one in tasks for warning in one.warnings]
    if not found:
        return ""
    return element("details", element("summary", f"Warnings: {len(found)}"), definitions(found))
