"""Plain-text tables of what was found and done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clafusion.graph import ModelGraph

if TYPE_CHECKING:
    from clafusion.many import PairResult
    from clafusion.pipeline import AlignedPair, FusionResult

__all__ = [
    "alignment_summary",
    "cost_text",
    "fusion_summary",
    "many_summary",
    "model_summary",
    "plain_table",
    "total_seconds",
]

INSERTED = "(inserted)"


def plain_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()
) -> str:
    """Return a table with aligned columns; those in ``numeric`` are flush right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    return "\n".join([line(titles), line(["-" * width for width in widths]), *map(line, rows)])


def alignment_summary(
    pair: AlignedPair,
    *,
    merged: bool = False,
    deep_shares: Mapping[tuple[int, int], float] | None = None,
) -> str:
    """Return a table of the matched units, and below it what the alignment was free to choose.

    ``merged`` tells that the deep network's unmatched units go, where else either network gets the
    like of what only the other one has. ``deep_shares`` are the deep network's shares of matched
    pairs of units.
    """
    deep, shallow = pair.deep.graph.units, pair.shallow.graph.units
    alignment = pair.alignment
    rows = []
    for one, other in alignment.steps:
        if one < 0:
            rows.append([INSERTED, shallow[other].name, "", ""])
        elif other < 0:
            rows.append([deep[one].name, "(merged)" if merged else INSERTED, "", ""])
        else:
            cost = f"{alignment.cost[one, other]:.4f}"
            shares = deep_shares or {}
            share = f"{shares[one, other]:.2f}" if (one, other) in shares else ""
            rows.append([deep[one].name, shallow[other].name, cost, share])
    rows.append(["total", "", f"{alignment.matched_cost:.4f}", ""])
    first, second = ("deep", "shallow") if pair.deep_is_first else ("shallow", "deep")
    choice = (
        "forced: the structures admit one alignment only, so the costs did not matter"
        if alignment.forced
        else "free: the least costly of several alignments that the structures admit"
    )
    facts = {
        "models": f"the first is the {first} one, the second the {second} one",
        "units": f"{len(deep)} deep, {len(shallow)} shallow, "
        f"{len(alignment.unmatched)} "
        + ("merged away" if merged else "inserted into the shallow one")
        + (f", {gaps} into the deep one" if (gaps := len(alignment.unmatched_shallow)) else ""),
        "alignment": f"by {alignment.mode}; {choice}",
        "samples": f"{pair.deep.num_samples} compared, {pair.deep.num_inputs} seen",
    }
    titles = ["deep unit", "shallow unit", "cost", "deep share"]
    if deep_shares is None:
        titles, rows = titles[:3], [row[:3] for row in rows]
    table = plain_table(titles, rows, numeric=[2, 3])
    return f"{table}\n\n{_facts(facts)}"


def fusion_summary(result: FusionResult) -> str:
    """Return :func:`alignment_summary`, the settings of the fusion and the seconds it took."""
    config = result.config
    deep_share = 1 - config.weight if result.pair.deep_is_first else config.weight
    matched = [plan for plan in result.plans if plan is not None]
    widths = sorted({(int(plan.size(0)), int(plan.size(1))) for plan in matched})
    shown = ", ".join(f"{source} to {target}" for source, target in widths[:6])
    facts = {
        "channels": f"{len(matched)} of {len(result.plans)} classes matched by "
        f"{config.neuron_cost}, solver {config.solver}"
        + ("" if config.importance == "uniform" else f", masses by {config.importance}")
        + (f" (widths {shown}{', ...' if len(widths) > 6 else ''})" if widths else ""),
        "shares": f"deep {deep_share:.2f}, shallow {1 - deep_share:.2f}"
        + ("" if config.layer_weights == "uniform" else ", of each matched unit by sensitivity"),
        "calibration": config.calibration
        + ("" if result.lean is None else f", lean {result.lean:g}"),
        "verified": "yes, by permuting copies of both models"
        if config.verify
        else "no, verify=False",
        "seconds": _seconds(result.timings),
    }
    source, target = result.lifting.shallow, result.lifting.deep
    blocks = []
    if result.block_orders:
        moved = [source.units[source.blocks[one].unit].name for one in result.block_orders]
        blocks.append(f"reordered in {_shortened(moved)}")
    for numbers in dict.fromkeys(
        (one.count, other.count) for one, other in zip(source.united, target.united, strict=True)
    ):
        named = [
            target.units[other.unit].name
            for one, other in zip(source.united, target.united, strict=True)
            if (one.count, other.count) == numbers
        ]
        blocks.append(f"{numbers[0]} to {numbers[1]} in {_shortened(named)}")
    if blocks:
        facts["blocks"] = "; ".join(blocks)
    if result.peak_memory:
        stage = max(result.peak_memory, key=result.peak_memory.__getitem__)
        facts["GPU memory"] = f"{result.peak_memory[stage] / 1e6:.1f} MB at the most ({stage})"
    own = result.shares if len(set(result.shares.values())) > 1 else None
    table = alignment_summary(result.pair, merged=config.balance == "merge", deep_shares=own)
    return f"{table}\n{_facts(facts)}"


def many_summary(results: Sequence[PairResult]) -> str:
    """Return a table of all pairs, and below it what became of them and how long it took."""
    rows = [
        [
            one.first,
            one.second,
            one.deep or "",
            cost_text(one),
            f"{math.fsum(one.seconds.values()):.2f}",
            "fused before" if one.resumed else "fused" if one.error is None else one.error,
        ]
        for one in results
    ]
    failed = sum(one.error is not None for one in results)
    facts = {
        "pairs": f"{len(results)}, {failed} failed, "
        f"{sum(one.resumed for one in results)} taken over from an earlier run",
        "seconds": _seconds(total_seconds(results)),
    }
    table = plain_table(["first", "second", "deep", "cost", "seconds", "outcome"], rows, [3, 4])
    return f"{table}\n\n{_facts(facts)}"


def cost_text(result: PairResult) -> str:
    """Return the total cost of a pair's alignment, as it is shown."""
    return "" if result.alignment is None else f"{result.alignment.total_cost:.4f}"


def total_seconds(results: Sequence[PairResult]) -> dict[str, float]:
    """Return the seconds of each stage over all pairs."""
    total: dict[str, float] = {}
    for one in results:
        for stage, seconds in one.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def model_summary(graph: ModelGraph) -> str:
    """Return tables of a model's units and of its channel classes."""
    stand_ins = {"identity": "identity layer", "zero": "silent block", None: "no"}
    units = plain_table(
        ["unit", "kind", "operations", "output", "can be inserted"],
        [
            [
                unit.name,
                unit.kind,
                _operations(unit.structure),
                "x".join(map(str, unit.output_shape)) or "-",
                stand_ins[unit.insertable],
            ]
            for unit in graph.units
        ],
    )
    classes = plain_table(
        ["channel class", "channels", "written and read by"],
        [
            [
                one.name,
                str(one.size),
                _shortened(list(dict.fromkeys(slot.use.parameter for slot in one.slots))),
            ]
            for one in graph.classes
        ],
        numeric=[1],
    )
    count = sum(parameter.numel() for parameter in graph.model.parameters())
    facts = {
        "parameters": f"{count:,}",
        "units": str(len(graph.units)),
        "classes": f"{len(graph.classes)}, {sum(one.size for one in graph.classes):,} channels",
    }
    if graph.blocks:
        named = [f"{len(one.members)} in {graph.units[one.unit].name}" for one in graph.blocks]
        facts["blocks"] = f"exchangeable as wholes: {_shortened(named)}"
    return f"{units}\n\n{classes}\n\n{_facts(facts)}"


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<12} {value}" for name, value in facts.items())


def _seconds(timings: Mapping[str, float]) -> str:
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in timings.items())
    return f"{math.fsum(timings.values()):.2f} ({stages})"


def _operations(structure: tuple[object, ...]) -> str:
    """Return the names of the operations in a unit's structure, repeats counted."""
    names = [one[0] for one in structure if isinstance(one, tuple) and one]
    counted: list[list[object]] = []
    for name in names:
        if counted and counted[-1][0] == name:
            counted[-1][1] = int(str(counted[-1][1])) + 1
        else:
            counted.append([name, 1])
    return _shortened([f"{name}" if n == 1 else f"{n} {name}" for name, n in counted], 6)


def _shortened(names: Sequence[str], most: int = 3) -> str:
    more = f", ... {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
