"""Tables of how good networks are: near the parents together, and with labels."""

from __future__ import annotations

from clafusion.assessment.evaluation import MEANS, Evaluation
from clafusion.assessment.nearness import DISTANCES, Nearness
from clafusion.one_origin.result import MergeResult
from clafusion.reassembly.result import ReassemblyResult
from clafusion.reports.text import fact_lines, plain_table
from clafusion.results import RESULT, FusionResult
from clafusion.shared_trunk.result import SharedTrunkResult
from clafusion.table import Table

__all__ = [
    "agreement_text",
    "assessment_table",
    "distance_text",
    "evaluation_summary",
    "merge_summary",
    "reassembly_summary",
]


def assessment_table(result: FusionResult) -> str:
    """Return a table of how near each network is to the parents together, or ""."""
    found, scores = result.assessment, result.evaluation
    if isinstance(result, SharedTrunkResult):
        return f"{result.shared_text}\n\n{_as_text(result.table)}"
    if found is None:
        return "" if scores is None else evaluation_summary(scores)
    shown = {
        RESULT: found.result,
        **{f"{name} alone": one for name, one in found.parents.items()},
    }
    if found.between_parents is not None:
        shown["one parent and another"] = found.between_parents
    is_classes = found.kind == "classes"
    titles = [
        "to the parents together",
        *(["agreement"] if is_classes else []),
        DISTANCES[found.kind],
    ]
    rows = [
        [name, *([agreement_text(one)] if is_classes else []), distance_text(one)]
        for name, one in shown.items()
    ]
    if scores is not None:
        blank = [""] * (len(titles) - 1)
        rows += [[name, *blank] for name in MEANS if name in scores.scores]
        titles += _score_titles(scores)
        rows = [
            [*row, *_score_cells(scores, row[0].removesuffix(" alone"), row[0])] for row in rows
        ]
    return plain_table(titles, rows, range(1, len(titles)))


def evaluation_summary(evaluation: Evaluation) -> str:
    """Return a table of networks' accuracies and losses."""
    titles = ["network", *_score_titles(evaluation)]
    rows = [[name, *_score_cells(evaluation, name)] for name in evaluation.scores]
    table = plain_table(titles, rows, range(1, len(titles)))
    return f"{table}\n\n{fact_lines({'inputs': str(evaluation.num_inputs)})}"


def _score_titles(evaluation: Evaluation) -> list[str]:
    return ["accuracy", "loss"] if evaluation.kind == "classes" else ["loss"]


def _score_cells(evaluation: Evaluation, *names: str) -> list[str]:
    """Return the score of the first name that has one; blank where none has."""
    one = next((evaluation.scores[name] for name in names if name in evaluation.scores), None)
    if one is None:
        return [""] * len(_score_titles(evaluation))
    right = [] if one.accuracy is None else [f"{100 * one.accuracy:.1f} %"]
    return [*right, f"{one.loss:.3g}"]


def agreement_text(one: Nearness | None) -> str:
    """Return how often a network and the parents together choose the same class, as shown."""
    return "" if one is None or one.agreement is None else f"{100 * one.agreement:.1f} %"


def distance_text(one: Nearness | None) -> str:
    """Return how far a network is from the parents together, as shown."""
    return "" if one is None else f"{one.distance:.3g}"


def merge_summary(result: MergeResult) -> str:
    """Return what was merged and how good it is, as a table and a line."""
    lines = [repr(result)[1:-1], "", _as_text(result.table)]
    if result.assessment is not None:
        lines += ["", result.assessment.verdict]
    return "\n".join(lines)


def reassembly_summary(result: ReassemblyResult) -> str:
    """Return which blocks make a network, what was tried besides, and how good it is."""
    rows = [
        [one.model, one.text, "" if left is None else f"{left:.3g}"]
        for one, left in zip(result.blocks, (None, *result.tried[0].residuals), strict=True)
    ]
    blocks = plain_table(["block of", "layers", "left by the stitch before"], rows, (2,))
    parts = [repr(result)[1:-1], blocks, _as_text(result.table), result.assessment.verdict]
    return "\n\n".join(parts)


def _as_text(table: Table) -> str:
    rows = [
        [_cell(title, one) for title, one in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    return plain_table(table.columns, rows, range(1, len(table.columns)))


def _cell(title: str, value: str | float | None) -> str:
    """Return a figure as all tables show it: shares in percent, counts to six digits."""
    if value is None or isinstance(value, str):
        return value or ""
    if title in ("agreement", "accuracy"):
        return f"{100 * value:.1f} %"
    if title == "weight":
        return f"{value:.2f}"
    return f"{value:.6g}" if title in ("parameters", "operations") else f"{value:.3g}"
