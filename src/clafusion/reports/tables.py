"""Plain-text tables of what was found and done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clafusion.tracing.model import TracedModel

if TYPE_CHECKING:
    from clafusion.batch.run import PairResult
    from clafusion.fusion import AlignedPair, FusionResult

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
    """Return a table of the matched layers, and below it what the alignment was free to choose.

    ``merged`` tells that the deep network's unmatched layers go, where else either network gets the
    like of what only the other one has. ``deep_shares`` are the deep network's shares of matched
    pairs of layers.
    """
    deep, shallow = pair.deep.traced.layers, pair.shallow.traced.layers
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
        "layers": f"{len(deep)} deep, {len(shallow)} shallow, "
        f"{len(alignment.unmatched)} "
        + ("merged away" if merged else "inserted into the shallow one")
        + (f", {gaps} into the deep one" if (gaps := len(alignment.unmatched_shallow)) else ""),
        "alignment": f"by {alignment.mode}; {choice}",
        "samples": f"{pair.deep.num_samples} compared, {pair.deep.num_inputs} seen",
    }
    titles = ["deep layer", "shallow layer", "cost", "deep share"]
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
        "channels": f"{len(matched)} of {len(result.plans)} groups matched by "
        f"{config.channel_cost}, solver {config.solver}"
        + ("" if config.importance == "uniform" else f", masses by {config.importance}")
        + (f" (widths {shown}{', ...' if len(widths) > 6 else ''})" if widths else ""),
        "shares": f"deep {deep_share:.2f}, shallow {1 - deep_share:.2f}"
        + ("" if config.layer_weights == "uniform" else ", of each matched layer by sensitivity"),
        "calibration": config.calibration
        + ("" if result.lean is None else f", lean {result.lean:g}"),
        "verified": "yes, by permuting copies of both models"
        if config.verify
        else "no, verify=False",
        "seconds": _seconds(result.timings),
    }
    source, target = result.lifting.shallow, result.lifting.deep
    blocks = []
    if result.head_orders:
        moved = [source.layers[source.heads[one].layer].name for one in result.head_orders]
        blocks.append(f"reordered in {_shortened(moved)}")
    for numbers in dict.fromkeys(
        (one.count, other.count)
        for one, other in zip(source.united_heads, target.united_heads, strict=True)
    ):
        named = [
            target.layers[other.layer].name
            for one, other in zip(source.united_heads, target.united_heads, strict=True)
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


def model_summary(graph: TracedModel) -> str:
    """Return tables of a model's layers and of its channel groups."""
    target_only_layers = {"identity": "identity layer", "zero": "silent block", None: "no"}
    layers = plain_table(
        ["layer", "kind", "operations", "output", "can be inserted"],
        [
            [
                layer.name,
                layer.kind,
                _operations(layer.structure),
                "x".join(map(str, layer.output_shape)) or "-",
                target_only_layers[layer.insertable],
            ]
            for layer in graph.layers
        ],
    )
    groups = plain_table(
        ["channel group", "channels", "written and read by"],
        [
            [
                one.name,
                str(one.size),
                _shortened(
                    list(dict.fromkeys(group_axis.use.parameter for group_axis in one.axes))
                ),
            ]
            for one in graph.groups
        ],
        numeric=[1],
    )
    count = sum(parameter.numel() for parameter in graph.model.parameters())
    facts = {
        "parameters": f"{count:,}",
        "layers": str(len(graph.layers)),
        "groups": f"{len(graph.groups)}, {sum(one.size for one in graph.groups):,} channels",
    }
    if graph.heads:
        named = [f"{len(one.members)} in {graph.layers[one.layer].name}" for one in graph.heads]
        facts["blocks"] = f"exchangeable as wholes: {_shortened(named)}"
    return f"{layers}\n\n{groups}\n\n{_facts(facts)}"


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<12} {value}" for name, value in facts.items())


def _seconds(timings: Mapping[str, float]) -> str:
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in timings.items())
    return f"{math.fsum(timings.values()):.2f} ({stages})"


def _operations(structure: tuple[object, ...]) -> str:
    """Return the names of the operations in a layer's structure, repeats counted."""
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
