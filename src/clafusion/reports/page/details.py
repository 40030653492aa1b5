"""One pair in detail: the same facts as HTML for a few, and as data for the page's code for all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from clafusion.alignment.layer_alignment import LayerAlignment
from clafusion.batch.results import PairResult
from clafusion.reports.page.markup import compact, definitions, element, scrollable, text
from clafusion.reports.records import taken_facts
from clafusion.reports.text import seconds_text

__all__ = ["detail", "load_line", "page_data"]

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_FORBIDDEN = len(_DIGITS) ** 2 - 1
_MOST_COSTS = 600_000  # of pairs of layers, in all: two letters each


def detail(result: PairResult, place: int, heading: str) -> str:
    """Return a fused pair's facts and matched layers; the page's code draws the picture."""
    assert result.alignment is not None, "the pair is fused"
    title = f"{heading}: {result.first} and {result.second}"
    return element(
        "article",
        element("h3", text(title)),
        definitions(_facts(result)),
        _line(result),
        element(
            "div",
            class_="drawing",
            data_draw=place,
            tabindex=0,
            role="region",
            aria_label="picture of the alignment",
        ),
        element(
            "details",
            element("summary", "Matched layers as a table"),
            scrollable(_matches(result, result.alignment), "matched layers"),
        ),
        class_="pair",
        id=f"pair-{place}",
        tabindex=-1,
    )


def load_line(result: PairResult) -> str:
    """Return a line of Python that loads the fused network, or says where one without a file is."""
    if result.path is None:
        return "result.model  # of this pair's result: the run had no out_dir"
    path = str(result.path)
    if result.factory is not None:
        return f"model = clafusion.load({result.factory!r}, {path!r})"
    if result.loads_itself:  # with other widths
        return f"model = clafusion.load({path!r}, trust_code=True)"
    if not result.path.name.endswith((".safetensors", ".pt")):  # a Hugging Face directory
        return f"model = clafusion.load({path!r})"
    if result.builder is not None:  # of other widths, by an earlier version
        return f"model = clafusion.load(clafusion.load({result.builder!r}), {path!r})"
    return (
        f"model = clafusion.load(models[{result.structure!r}], {path!r})"
        "  # models: the modules that were fused, or new ones of their classes"
    )


def _line(result: PairResult) -> str:
    return element("p", element("code", text(load_line(result)), class_="line"), class_="load")


def _facts(result: PairResult) -> list[tuple[str, str]]:
    """Return what is told of a fused pair: names and values, as plain text."""
    found: list[tuple[str, str]] = []
    assessment = result.assessment
    if assessment is not None:
        found.append(("the result", str(assessment.result)))
        found += [(f"{name} alone", str(near)) for name, near in assessment.parents.items()]
        if assessment.between_parents is not None:
            found.append(("one model and the other", str(assessment.between_parents)))
        seen = "kept out of the fusion" if assessment.held_out else "that the fusion has seen"
        found.append(("compared on", f"{assessment.num_inputs} inputs {seen}"))
        if assessment.nearer:
            names = " and ".join(assessment.nearer)
            found.append(("attention", f"{names} alone comes nearer to both than the result"))
    if result.evaluation is not None:
        found += [(f"labels: {name}", str(one)) for name, one in result.evaluation.scores.items()]
    alignment = result.alignment
    assert alignment is not None, "the pair is fused"
    how = "forced by structure" if alignment.forced else "chosen by cost"
    found += [
        ("architecture", f"{result.structure}'s" + (", in other widths" * result.resized)),
        ("alignment", f"{how}, total cost {alignment.total_cost:.4f}"),
        ("weights", _weights(result)),
        *taken_facts(result.taken).items(),
    ]
    if result.parameters is not None:
        found.append(("parameters", f"{result.parameters:,}"))
    if result.operations is not None:
        found.append(("operations", f"{compact(result.operations)} for one input"))
    found.append(("seconds", seconds_text(result.seconds)))
    if result.peak_memory:
        stage = max(result.peak_memory, key=result.peak_memory.__getitem__)
        found.append(("memory", f"{result.peak_memory[stage] / 1e6:,.0f} MB at the most ({stage})"))
    found += [("warning", one) for one in result.warnings]
    if result.path is not None:
        found.append(("file", str(result.path)))
    return found


def _weights(result: PairResult) -> str:
    """Say how much each model counts in the layers that both have."""
    shown = []
    for name, column in zip(
        (result.first, result.second), zip(*result.layer_weights, strict=True), strict=True
    ):
        values = [one for one in column if one is not None]
        ends = f"{min(values):.2f}", f"{max(values):.2f}"
        shown.append(f"{name} {ends[0]}" + (f" to {ends[1]}" if ends[0] != ends[1] else ""))
    return ", ".join(shown)


def _matches(result: PairResult, alignment: LayerAlignment) -> str:
    deep, shallow = _sides(result)
    titles = "".join(element("th", text(one), scope="col") for one in (deep, shallow, "cost"))
    rows = [element("tr", titles)]
    for one, other in alignment.steps:
        names = (
            result.deep_layers[one] if one >= 0 else "none",
            result.shallow_layers[other] if other >= 0 else "none",
        )
        cells = "".join(element("td", text(name)) for name in names)
        both = one >= 0 and other >= 0
        cost = f"{alignment.cost[one, other]:.3f}" if both else ""
        rows.append(element("tr", cells, element("td", cost, class_="number")))
    return element("table", *rows)


def _sides(result: PairResult) -> tuple[str, str]:
    """Return the names of the deep and the shallow model."""
    names = (result.first, result.second)
    return names if result.deep == result.first else names[::-1]


# --- data for the page's code ---------------------------------------------------------------------


def page_data(results: Sequence[PairResult], first: Iterable[int]) -> str:
    """Return all fused pairs as JSON that may stand inside a script element.

    The costs of all pairs of layers are left out where they would be too many in all; those of the
    pairs ``first`` come first.
    """
    layers: dict[tuple[str, ...], int] = {}
    order = list(dict.fromkeys([*first, *range(len(results))]))
    left = _MOST_COSTS
    with_costs = set()
    for place in order:
        alignment = results[place].alignment
        if alignment is not None and alignment.cost.size <= left:
            left -= alignment.cost.size
            with_costs.add(place)
    pairs = {
        place: _pair_data(one, layers, with_costs=place in with_costs)
        for place, one in enumerate(results)
        if one.alignment is not None
    }
    found = {"layers": [list(names) for names in layers], "pairs": pairs}
    packed = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    # In a script nothing is escaped, but "</script" and "<!--" would end or change it.
    return packed.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _pair_data(
    result: PairResult, layers: dict[tuple[str, ...], int], *, with_costs: bool
) -> Mapping[str, Any]:
    alignment = result.alignment
    assert alignment is not None, "the pair is fused"
    names = [
        layers.setdefault(one, len(layers)) for one in (result.deep_layers, result.shallow_layers)
    ]
    matched = {
        i: f"{alignment.cost[step]:.3f}" for i, step in enumerate(alignment.steps) if min(step) >= 0
    }
    low, high, costs = _packed(alignment.cost) if with_costs else (0.0, 0.0, "")
    return {
        "names": [result.first, result.second],
        "sides": list(_sides(result)),
        "facts": _facts(result),
        "line": load_line(result),
        "layers": names,
        "steps": [list(one) for one in alignment.steps],
        "matched": matched,
        "ends": [float(f"{low:.5g}"), float(f"{high:.5g}")],
        "costs": costs,
    }


def _packed(cost: np.ndarray[Any, Any]) -> tuple[float, float, str]:
    """Return the least and the largest cost, and all of them on that scale, two letters each.

    ``A`` to ``_`` are the digits 0 to 63. The last number stands for pairs that are forbidden.
    """
    finite = np.isfinite(cost)
    low, high = float(cost[finite].min()), float(cost[finite].max())
    share = (np.where(finite, cost, low) - low) / max(high - low, math.ulp(1.0))
    steps = np.where(finite, np.rint(share * (_FORBIDDEN - 1)).astype(int), _FORBIDDEN)
    base = len(_DIGITS)
    return low, high, "".join(_DIGITS[one // base] + _DIGITS[one % base] for one in steps.flat)
