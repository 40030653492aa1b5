"""Plain-text tables of what was found and done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clafusion.assessment.evaluation import MEANS
from clafusion.config import ManyToOne
from clafusion.merging.problem import Parent
from clafusion.reports.alignment_tables import alignment_summary
from clafusion.reports.quality_tables import agreement_text, assessment_table, distance_text
from clafusion.reports.text import counted_layers, fact_lines, plain_table, seconds_text, shortened
from clafusion.results import RESULT, FusionResult
from clafusion.settings import described
from clafusion.shared_trunk.result import SharedTrunkResult
from clafusion.tracing.layer import Stream
from clafusion.tracing.model import TracedModel
from clafusion.tracing.pinned import movable_share
from clafusion.tracing.rotations import find_rotatable

if TYPE_CHECKING:
    from clafusion.batch.named_tasks import NamedResult
    from clafusion.batch.results import PairResult

__all__ = [
    "ASSESSED",
    "assessed_cells",
    "cost_text",
    "fusion_summary",
    "model_summary",
    "operations_text",
    "pairs_summary",
    "tasks_summary",
    "total_seconds",
]

ASSESSED = ("agreement", "distance", "parent's")
"""The columns of many pairs: the result's agreement and distance, and the nearest parent's."""


# --- fusions ------------------------------------------------------------------------------------


def fusion_summary(result: FusionResult) -> str:
    """Return :func:`alignment_summary`, the layers' weights, how good it is, settings and seconds.

    Of a fusion of one model after another, each step has its own alignment.
    """
    parts = []
    for i, step in enumerate(result.steps, 1):
        parts.append(f"Step {i}: {' and '.join(step.aligned.names)}")
        parts.append(alignment_summary(step.aligned))
    split = result.split if isinstance(result, SharedTrunkResult) else None
    parts = parts or [alignment_summary(result.aligned, split)]
    steps = result.steps or (result,)
    parts += [table for step in steps if (table := _weights_table(step))]
    parts += [table] if (table := assessment_table(result)) else []
    facts = fact_lines(_fusion_facts(result))
    if len(parts) == 1:
        return f"{parts[0]}\n{facts}"
    return "\n\n".join([*parts, facts])


def _weights_table(result: FusionResult) -> str:
    """Return a table of the parents' weights in each layer; "" where all layers have the same."""
    columns = list(zip(*result.layer_weights, strict=True))
    known = [{weight for weight in column if weight is not None} for column in columns]
    if all(len(one) <= 1 for one in known):
        return ""
    rows = [
        [layer.name, *("" if weight is None else f"{weight:.2f}" for weight in weights)]
        for layer, weights in zip(result.problem.target.layers, result.layer_weights, strict=True)
    ]
    titles = ["weights in", *result.problem.names]
    return plain_table(titles, rows, range(1, len(titles)))


def _fusion_facts(result: FusionResult) -> dict[str, str]:
    config = result.config
    shown = zip(result.names, result.weights, strict=True)
    by_layer = config.merging.layer_weights
    facts = {
        "weights": ", ".join(f"{name} {weight:.2f}" for name, weight in shown)
        + ("" if by_layer == "uniform" else f", of each matched layer by {by_layer}"),
        "target": _target(result),
        "channels": _channels(result),
    }
    heads = _heads(result)
    if heads:
        facts["heads"] = heads
    if rotated := _rotated(result):
        facts["rotated"] = rotated
    if pinned := _pinned(result):
        facts["pinned"] = pinned
    strategy = config.merging.strategy
    if not isinstance(strategy, ManyToOne):
        outcome = "" if result.converged else ", not converged"
        facts["strategy"] = f"{described(strategy)}, rounds {result.rounds}{outcome}"
    if result.combination.output is not None:
        facts["together"] = f"the parents put out {result.combination}"
    calibration = config.used_calibration
    facts["calibration"] = described(calibration)
    if isinstance(result, SharedTrunkResult) and result.is_exact:
        facts["calibration"] += ", which changes nothing: all outputs are the parents' own already"
    if result.anchor is not None and result.anchor != getattr(calibration, "anchor", None):
        facts["calibration"] += f", anchor {result.anchor:g}"
    if result.anchor and result.toward != result.problem.names[result.problem.largest]:
        facts["calibration"] += f", towards {result.toward!r}"
    if result.averaged:
        facts["averaged"] = (
            f"{len(result.averaged)} weights that {calibration.name} does not calibrate: "
            f"{shortened(result.averaged)}"
        )
    if result.left_out:
        facts["left out"] = (
            f"{len(result.left_out)} parameters that nothing reads on the example inputs: "
            f"{shortened(result.left_out)}"
        )
    if result.assessment is not None:
        facts["assessed"] = result.assessment.verdict
    if result.evaluation is not None:
        facts["evaluated"] = f"with the labels of {result.evaluation.num_inputs} inputs"
    facts["verified"] = (
        "yes, by permuting the channels of all models" if config.verify else "no: verify is off"
    )
    facts["seconds"] = seconds_text(result.timings)
    if result.peak_memory:
        stage = max(result.peak_memory, key=result.peak_memory.__getitem__)
        where = "GPU memory" if result.problem.target.device.type == "cuda" else "memory"
        facts[where] = f"{result.peak_memory[stage] / 1e6:.1f} MB at the most ({stage})"
    return facts


def _target(result: FusionResult) -> str:
    """Say which structure the result has."""
    depth = counted_layers(len(result.problem.target.layers))
    if not isinstance(result, SharedTrunkResult):
        return f"{described(result.config.target)}, {depth}"
    if result.split.is_empty:
        return "the parents side by side"
    whole = [len(one.traced.layers) for one in result.aligned.profiles]
    own = [
        f"{counted_layers(size - count)} of {name}"
        for name, size, count in zip(result.names, whole, result.split.counts, strict=True)
    ]
    return f"a trunk of {depth}, and for each parent a branch: {', '.join(own)}"


def _channels(result: FusionResult) -> str:
    """Say by what channels are matched, and how many of which parent."""
    matching = result.config.matching
    how = f"by {matching.cost}, solver {described(matching.solver)}"
    if matching.importance != "uniform":
        how += f", masses by {matching.importance}"
    parents = [
        parent
        for step in result.steps or (result,)
        for parent in step.parents
        if parent.correspondence.source is not parent.correspondence.target
    ]
    return "; ".join([how, *map(_groups, parents)])


def _groups(parent: Parent) -> str:
    matched = [plan for plan in parent.plans if plan is not None]
    widths = sorted({plan.shape for plan in matched})
    shown = shortened([f"{source} to {target}" for source, target in widths], 6)
    return f"{parent.name} {len(matched)} of {len(parent.plans)} groups" + (
        f" ({shown})" if shown else ""
    )


def _heads(result: FusionResult) -> str:
    """Say which heads changed places, and which numbers of heads were united."""
    found = []
    for parent in (parent for step in result.steps or (result,) for parent in step.parents):
        source, target = parent.correspondence.source, parent.correspondence.target
        if parent.head_orders:
            moved = [source.layers[source.heads[one].layer].name for one in parent.head_orders]
            found.append(f"of {parent.name} reordered in {shortened(moved)}")
        united: dict[tuple[int, int], list[str]] = {}
        for one, other in zip(source.united_heads, target.united_heads, strict=True):
            name = target.layers[other.layer].name
            united.setdefault((one.count, other.count), []).append(name)
        found += [
            f"of {parent.name} {numbers[0]} to {numbers[1]} in {shortened(names)}"
            for numbers, names in united.items()
        ]
    return "; ".join(found)


def _rotated(result: FusionResult) -> str:
    """Say which streams were rotated."""
    found: dict[str, list[str]] = {}
    for step in result.steps or (result,):
        for parent in step.parents:
            for index in parent.rotations:
                name = parent.correspondence.target.groups[index].name
                found.setdefault(name, []).append(parent.name)
    return "; ".join(f"{name} of {shortened(whose)}" for name, whose in found.items())


def _pinned(result: FusionResult) -> str:
    """Say which channels keep their places although they might change them."""
    found: dict[str, list[str]] = {}
    for step in result.steps or (result,):
        for name, one in zip(step.aligned.names, step.aligned.profiles, strict=True):
            for pinned in one.traced.pinned:
                found.setdefault(str(pinned), []).append(name)
    return shortened([f"{pinned} of {', '.join(names)}" for pinned, names in found.items()])


# --- pairs --------------------------------------------------------------------------------------


def pairs_summary(results: Sequence[PairResult]) -> str:
    """Return a table of all pairs, and below it why some failed and how long all took."""
    from clafusion.batch.results import settings_of

    settings = settings_of(results)
    has_several = len(set(settings)) > 1
    labelled = _labelled_titles(results)
    rows = [
        [
            one.first,
            one.second,
            *([chosen] if has_several else []),
            one.deep or "",
            cost_text(one),
            *assessed_cells(one),
            *(_labelled_cells(one) if labelled else []),
            f"{math.fsum(one.seconds.values()):.2f}",
            "failed" if one.error is not None else "fused before" if one.resumed else "fused",
        ]
        for one, chosen in zip(results, settings, strict=True)
    ]
    # Below the table, for an error may be long.
    errors = {f"{one.first}, {one.second}": one.error for one in results if one.error is not None}
    facts = {
        **errors,
        "pairs": f"{len(results)}, {len(errors)} failed, "
        f"{sum(one.resumed for one in results)} taken over from an earlier run",
        "seconds": seconds_text(total_seconds(results)),
    }
    several = ["settings"] if has_several else []
    titles = ["first", "second", *several, "deep", "cost", *ASSESSED, *labelled]
    titles += ["seconds", "outcome"]
    numeric = range(3 + len(several), len(titles) - 1)
    return f"{plain_table(titles, rows, numeric)}\n\n{fact_lines(facts)}"


def tasks_summary(results: Sequence[NamedResult]) -> str:
    """Return a table of merges and reassemblies, and below it why some failed."""
    from clafusion.batch.results import differing_settings

    by_name: dict[str, list[NamedResult]] = {}
    for one in results:
        by_name.setdefault(one.name, []).append(one)
    several = ["settings"] if any(len(same) > 1 for same in by_name.values()) else []
    rows, errors = [], {}
    for name, same in by_name.items():
        settings = differing_settings([one.settings for one in same])
        for one, chosen in zip(same, settings, strict=True):
            near = None if one.assessment is None else one.assessment.result
            resumed = "done before" if one.resumed else "done"
            rows.append(
                [
                    name,
                    one.kind,
                    *([chosen] if several else []),
                    one.made_of or ", ".join(one.models),
                    agreement_text(near),
                    distance_text(near),
                    f"{one.seconds:.2f}",
                    resumed if one.error is None else "failed",
                    "" if one.path is None else one.path.name,
                ]
            )
            if one.error is not None:
                errors[f"{name}, {chosen}" if chosen else name] = one.error
    titles = ["name", "kind", *several, "made of", "agreement", "distance", "seconds"]
    numeric = range(len(titles) - 3, len(titles))
    table = plain_table([*titles, "outcome", "file"], rows, numeric)
    return f"{table}\n\n{fact_lines(errors)}" if errors else table


def assessed_cells(result: PairResult) -> list[str]:
    """Return a pair's cells in the columns :data:`ASSESSED`, empty where it was not assessed."""
    found = result.assessment
    near = None if found is None else found.result
    parent = None if found is None else found.parents[found.nearest_parent]
    return [agreement_text(near), distance_text(near), distance_text(parent)]


def _labelled_titles(results: Sequence[PairResult]) -> list[str]:
    """Return the titles of what labels say; none where there were none."""
    kinds = {one.evaluation.kind for one in results if one.evaluation is not None}
    if not kinds:
        return []
    return ["accuracy" if "classes" in kinds else "loss", "better parent's", "of both"]


def _labelled_cells(result: PairResult) -> list[str]:
    """Return the accuracies, or losses, of the result, the better parent, and both together."""
    if result.evaluation is None:
        return [""] * 3
    scores = result.evaluation.scores
    together = next((scores[name] for name in reversed(MEANS) if name in scores), None)
    parents = scores[result.first], scores[result.second]
    better = min(parents, key=lambda one: one.loss if one.accuracy is None else -one.accuracy)
    return [
        f"{one.loss:.3g}" if one.accuracy is None else f"{100 * one.accuracy:.1f} %"
        for one in (scores[RESULT], better, together or better)
    ]


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


# --- models -------------------------------------------------------------------------------------

_INSERTABLE = {"identity": "identity layer", "zero": "zero residual", None: "no"}


def model_summary(model: TracedModel) -> str:
    """Return tables of a model's layers and of its channel groups."""
    layers = plain_table(
        ["layer", "kind", "operations", "settings", "output", "can be inserted"],
        [
            [
                layer.name,
                layer.kind,
                operations_text(layer.structure),
                settings_text(layer.structure),
                "x".join(map(str, layer.output_shape)) or "-",
                _INSERTABLE[layer.insertable],
            ]
            for layer in model.layers
        ],
    )
    groups = plain_table(
        ["channel group", "channels", "written and read by"],
        [
            [
                one.name,
                str(one.size),
                shortened(list(dict.fromkeys(axis.use.parameter for axis in one.axes))),
            ]
            for one in model.groups
        ],
        numeric=[1],
    )
    count = sum(parameter.numel() for parameter in model.model.parameters())
    facts = {
        "parameters": f"{count:,}",
        "layers": str(len(model.layers)),
        "groups": f"{len(model.groups)}, {sum(one.size for one in model.groups):,} channels",
    }
    if len(model.streams) > 1:
        facts["streams"] = "; ".join(_stream_text(model, one) for one in model.streams)
    if model.heads:
        named = [f"{len(one.members)} in {model.layers[one.layer].name}" for one in model.heads]
        facts["heads"] = f"exchangeable as wholes: {shortened(named)}"
    facts |= _rotatable_facts(model)
    if model.pinned:
        facts["pinned"] = (
            f"channels that keep their places: {shortened(list(map(str, model.pinned)))}; "
            f"{movable_share(model):.0%} of the weights can move"
        )
    return f"{layers}\n\n{groups}\n\n{fact_lines(facts)}"


def _stream_text(model: TracedModel, stream: Stream) -> str:
    """Name a stream, its first and last layer, and what it reads."""
    first, last = (model.layers[stream.layers[i]].name for i in (0, -1))
    reads = [one if isinstance(one, str) else model.streams[one].name for one in stream.inputs]
    text = f"{stream.name} ({first} to {last})"
    return f"{text} reads {', '.join(reads)}" if reads else text


def _rotatable_facts(model: TracedModel) -> dict[str, str]:
    """Say which streams solver "orthogonal" can rotate, and which ones behind norms it cannot."""
    found = find_rotatable(model)
    facts = {}
    if found.groups:
        facts["rotatable"] = shortened([f"{one.name} ({one.size})" for one in found.groups])
    if found.refused:
        facts["unrotatable"] = "; ".join(f"{name}: {why}" for name, why in found.refused.items())
    return facts


def settings_text(structure: tuple[Any, ...]) -> str:
    """Return the settings in a layer's structure that people compare: kernel, groups, eps, bias."""
    found: dict[str, None] = {}
    for _, settings, wiring, freedom in structure[1:]:
        for key, value in settings:
            sizes = value if isinstance(value, tuple) else (value,)
            if key in ("kernel", "stride", "groups", "eps") and set(sizes) != {1}:
                found[f"{key} {'x'.join(map(str, sizes))}"] = None
        if freedom is not None and "parameter" in wiring:
            found["bias" if wiring.count("parameter") > 1 else "no bias"] = None
    return shortened(list(found), 5) or "-"


def operations_text(structure: tuple[object, ...]) -> str:
    """Return the names of the operations in a layer's structure, repeats counted."""
    names = [one[0] for one in structure if isinstance(one, tuple) and one]
    counted: list[list[object]] = []
    for name in names:
        if counted and counted[-1][0] == name:
            counted[-1][1] = int(str(counted[-1][1])) + 1
        else:
            counted.append([name, 1])
    return shortened([f"{name}" if n == 1 else f"{n} {name}" for name, n in counted], 6)
