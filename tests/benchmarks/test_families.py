"""The table of public families: what it makes of a pair, and that its figures stand in the docs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.families import pairs
from benchmarks.families.family import PAIRS, Family, values
from benchmarks.families.table import LIBRARIES, counts, reason_of, results_of, summary, table
from tests.support import networks

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "architectures.md").read_text(encoding="utf-8")
RESULTS = (DOCS / "results.md").read_text(encoding="utf-8")


def perceptrons(depth, width):
    widths = (6, *[8 * width] * (1 + depth), 3)
    return networks.mlp(*widths, seed=depth + 10 * width), (values(6),)


class Scaled(nn.Module):
    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.model(self.scale * x)


def row(make, kind="both", limit=100.0):
    return pairs.row(pairs.Members(Family("tests", "perceptrons", make)), kind, limit)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_that_keeps_all_properties_is_fused(kind):
    found = row(perceptrons, kind)
    assert found["outcome"] == "fused"
    assert max(found[name] for name in ("first", "second", "itself", "copy")) < 1e-5
    assert found["repair"] is found["least_squares"] is True


def test_a_refusal_a_fault_and_a_limit_of_time_are_told():
    def other_scale(depth, width):
        model, inputs = perceptrons(depth, width)
        return Scaled(model, float(1 + depth)), inputs

    def broken(*size):
        raise ValueError(f"no network of size {size}")

    def endless(*_):
        while True:
            pass

    refused = row(other_scale)
    assert refused["outcome"] == "refused"
    assert "cannot be brought to one structure" in refused["message"]
    assert row(broken)["message"] == "ValueError: no network of size (1, 1)"
    assert row(endless, limit=0.05)["message"] == "TooLong: more than 0.05 s"


def test_a_property_that_does_not_hold_is_wrong(monkeypatch):
    monkeypatch.setattr(pairs, "_is_finite", lambda *_: False)
    assert row(perceptrons)["outcome"] == "wrong"


def test_a_copy_that_puts_out_something_else_is_a_fault(monkeypatch):
    def spoiled(model, *_):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return networks.mlp(6, 8, 3, seed=5)

    monkeypatch.setattr(pairs, "permuted", spoiled)
    assert "other places of the channels" in row(perceptrons, "width")["message"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_pair_is_fused_or_refused_for_a_documented_reason(library):
    figures = results_of(library)
    assert figures
    for name, family in figures.items():
        for kind in PAIRS:
            outcome = family[kind]["outcome"]
            assert outcome in ("fused", "refused"), (name, kind)
            assert outcome == "fused" or reason_of(family[kind]["message"]), (name, kind)


def test_the_pages_have_the_tables_and_their_counts():
    assert table() in PAGE
    assert summary() in RESULTS
    found = counts()
    fused, total = found["fused"], sum(found.values())
    assert re.search(rf"\b{fused} of {total} pairs are fused", PAGE)
