"""Plain-text tables of which layers belong together."""

from __future__ import annotations

from collections.abc import Sequence

from clafusion.alignment.models import AlignedModels, PairAlignment
from clafusion.reports.text import fact_lines, plain_table
from clafusion.shared_trunk.split import Split

__all__ = ["alignment_summary"]

_INSERTED = "(inserted)"
_MERGED = "(merged)"
_FORCED = "forced: the structures admit one alignment only, so the costs did not matter"
_FREE = "free: the least costly of several alignments that the structures admit"


def alignment_summary(aligned: AlignedModels, split: Split | None = None) -> str:
    """Return a table of the matched layers, and below it what the alignment was free to choose.

    Each row has a layer of the reference, and what every other model has there and at which cost.
    A layer that a model lacks there is ``(inserted)`` into it; ``(merged)`` where the reference is
    the shallower one and the other's layer goes. Of networks that share a trunk the table ends with
    it, for what lies behind the ``split`` stays each network's own.
    """
    ends: Sequence[int] = [len(one.traced.layers) for one in aligned.profiles]
    if split is not None:
        ends = split.counts
    facts = fact_lines(_alignment_facts(aligned, ends))
    if split is not None and split.is_empty:
        return facts
    reference, names = aligned.reference, aligned.names
    others = [i for i in range(len(names)) if i != reference]
    titles = [names[reference]]
    for i in others:
        titles += [names[i], "cost"]
    rows = _layer_rows(aligned, others, ends)
    numeric = range(2, 2 * len(others) + 1, 2)
    return f"{plain_table(titles, rows, numeric)}\n\n{facts}"


def _layer_rows(
    aligned: AlignedModels, others: Sequence[int], ends: Sequence[int]
) -> list[list[str]]:
    """Return a row for each of the networks' first layers, of each as many as ``ends`` says."""
    layers = aligned.layer_names(aligned.reference)[: ends[aligned.reference]]
    # What the other models have at each of the reference's layers, and what comes before it.
    cells = {i: [[_INSERTED, ""] for _ in layers] for i in others}
    before: list[list[list[str]]] = [[] for _ in range(len(layers) + 1)]
    totals = []
    for column, i in enumerate(others):
        pair, names = _pair(aligned, i), aligned.layer_names(i)
        missing = _MERGED if _is_shallow(pair, aligned.reference) else _INSERTED
        place, total = 0, 0.0
        for own, other in _steps(pair, aligned.reference):
            if own >= len(layers) or other >= ends[i]:
                continue
            if own < 0:
                row = [missing, *[""] * (2 * len(others))]
                row[1 + 2 * column] = names[other]
                before[place].append(row)
                continue
            place = own + 1
            if other >= 0:
                cost = _cost(pair, own, other, aligned.reference)
                cells[i][own] = [names[other], f"{cost:.4f}"]
                total += cost
        totals += ["", f"{total:.4f}"]
    rows = []
    for own, name in enumerate(layers):
        rows += [*before[own], [name, *(cell for i in others for cell in cells[i][own])]]
    return [*rows, *before[-1], ["total", *totals]]


def _alignment_facts(aligned: AlignedModels, ends: Sequence[int]) -> dict[str, str]:
    names, reference = aligned.names, aligned.reference
    others = {name: _pair(aligned, i) for i, name in enumerate(names) if i != reference}
    counts = [
        f"{name} {len(one.traced.layers)}"
        for name, one in zip(names, aligned.profiles, strict=True)
    ]
    facts = {"layers": f"{', '.join(counts)}; aligned with {names[reference]}"}
    inserted, merged = [], []
    for name, pair in others.items():
        unmatched = [one for one in pair.alignment.unmatched if one < ends[pair.deep]]
        gaps = [one for one in pair.alignment.unmatched_shallow if one < ends[pair.shallow]]
        if _is_shallow(pair, reference):
            merged += [f"{len(unmatched)} of {name}"] if unmatched else []
            inserted += [f"{len(gaps)} into {name}"] if gaps else []
        else:
            inserted += [f"{len(unmatched)} into {name}"] if unmatched else []
            whose = f" for {name}" if len(others) > 1 else ""
            inserted += [f"{len(gaps)} into {names[reference]}{whose}"] if gaps else []
    if inserted:
        facts["inserted"] = ", ".join(inserted)
    if merged:
        facts["merged away"] = ", ".join(merged)
    facts["alignment"] = f"by {next(iter(others.values())).alignment.mode}; {_choice(others)}"
    profile = aligned.profiles[reference]
    facts["samples"] = f"{profile.num_samples} compared, {profile.num_inputs} seen"
    return facts


def _choice(others: dict[str, PairAlignment]) -> str:
    """Say whether the costs mattered."""
    forced = [name for name, pair in others.items() if pair.alignment.forced]
    if len(forced) in (0, len(others)):
        return _FORCED if forced else _FREE
    free = [name for name in others if name not in forced]
    return f"{', '.join(free)} {_FREE}; {', '.join(forced)} {_FORCED}"


def _pair(aligned: AlignedModels, position: int) -> PairAlignment:
    pair = aligned.alignments[position]
    assert pair is not None, "it is not the reference"
    return pair


def _is_shallow(pair: PairAlignment, reference: int) -> bool:
    return pair.deep != reference


def _steps(pair: PairAlignment, reference: int) -> list[tuple[int, int]]:
    """Return the layers in order: ``(reference's, other's)``, -1 where one has no partner."""
    if _is_shallow(pair, reference):
        return [(shallow, deep) for deep, shallow in pair.alignment.steps]
    return list(pair.alignment.steps)


def _cost(pair: PairAlignment, own: int, other: int, reference: int) -> float:
    place = (other, own) if _is_shallow(pair, reference) else (own, other)
    return float(pair.alignment.cost[place])
