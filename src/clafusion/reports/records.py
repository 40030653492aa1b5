"""The record of a written result, and what it took where its options leave a choice, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clafusion.config import FusionConfig, MergeConfig
from clafusion.errors import InputError
from clafusion.merging.combination import Combination
from clafusion.reports.options import changed_options
from clafusion.reports.text import fact_lines, seconds_text
from clafusion.settings import Settings
from clafusion.weights.messages import one_line

__all__ = ["record_summary", "taken_facts"]

_DEFAULT = "all as they are by default"


def taken_facts(taken: Mapping[str, Any]) -> dict[str, str]:
    """Return what was taken where options leave a choice, in words.

    ``taken`` is that of :attr:`clafusion.FusionResult.taken` or
    :attr:`clafusion.MergeResult.taken`. What a file of an earlier version lacks is left out.
    """
    found: dict[str, str] = {}
    if taken.get("calibration") is not None:
        steps = [_lean(one) for one in taken.get("leans", ())]
        leans = "".join(f"; step {i}{one}" for i, one in enumerate(steps, 1)) or _lean(taken)
        aim = ", each model on its own task" if taken.get("by_task") else ""
        found["calibration"] = f"{taken['calibration']}{leans}{aim}"
    if "combination" in taken:
        found["together"] = f"the parents put out {Combination(**taken['combination'])}"
    if "strategy" in taken:
        outcome = "" if taken["converged"] else ", not converged"
        found["strategy"] = f"{taken['strategy']}, rounds {taken['rounds']}{outcome}"
    if "shared" in taken:
        ends = [f"{name} {layer}" for name, layer in taken["shared"]["layers"].items()]
        found["shared"] = f"up to {', '.join(ends)}"
    return found


def _lean(one: Mapping[str, Any]) -> str:
    if one.get("anchor") is None:
        return ""
    toward = f" towards {one['toward']!r}" if one["anchor"] else ""
    return f", anchor {one['anchor']:g}{toward}"


def record_summary(record: Mapping[str, Any]) -> str:
    """Return how a written result was made, as :func:`clafusion.interop.records.read_record` says.

    That is what builds the network, parents with weights and files, options that are not the
    default, what was taken where these leave a choice, the data's hash, the assessment, versions,
    the command and the seconds.

    Raises
    ------
    InputError
        Something else wrote it.
    """
    try:
        return fact_lines(_record_facts(record))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"the record says nothing that this version knows: {one_line(error)}. Read it as JSON"
        ) from error


def _record_facts(record: Mapping[str, Any]) -> dict[str, str]:
    facts = {"built by": " ".join(str(one) for one in record["architecture"].values() if one)}
    if "base" in record:
        facts["base"] = _source(record["base"])
    for one in record.get("parents", ()):
        weight = f"weight {one['weight']:.4g}, " if one.get("weight") is not None else ""
        facts[str(one["name"])] = f"{weight}{_source(one)}"
    facts["options"] = _options(record)
    facts |= taken_facts(record.get("taken", {}))
    if record.get("data"):
        facts["data"] = f"SHA-256 {record['data']}"
    if record.get("assessment"):
        facts["assessed"] = record["assessment"]["verdict"]
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
    if record.get("command"):
        facts["command"] = record["command"]
    if record.get("seconds"):
        facts["seconds"] = seconds_text(record["seconds"])
    return facts


def _source(one: Mapping[str, Any]) -> str:
    """Say where a network came from."""
    made = [one.get("factory"), one.get("file")]
    shown = ", ".join(str(part) for part in made if part) or str(one.get("class"))
    key = f", key {one['key']}" if one.get("key") else ""
    return f"{shown}{key}, SHA-256 {one.get('sha256')}"


def _options(record: Mapping[str, Any]) -> str:
    """Return the options that are not the default."""
    kind: type[Settings] = MergeConfig if "base" in record else FusionConfig
    changed = changed_options(record["settings"], kind)
    return ", ".join(f"{path} {one}" for path, one in changed.items()) or _DEFAULT
