"""The tables: every layer once, and what was done told truly."""

import pytest
import torch

import clafusion
from clafusion.reports.tables import alignment_summary, fusion_summary, model_summary, plain_table
from tests import networks

INPUTS = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    return networks.mlp(6, 9, 8, 7, 3), networks.mlp(6, 5, 4, 3)


def rows(text):
    """Return the cells of a summary's first table, without titles and rule."""
    table = text.split("\n\n")[0].splitlines()[2:]
    return [line.split() for line in table]


def fact(text, name):
    (line,) = (one for one in text.splitlines() if one.startswith(f"{name} "))
    return line[len(name) :].strip()


def test_columns_are_aligned():
    table = plain_table(["name", "n"], [["a", "1"], ["longer", "10"]], numeric=[1])
    assert table == "name     n\n------  --\na        1\nlonger  10"


def test_every_deep_unit_has_a_row_with_its_partner_and_cost(models):
    pair = clafusion.align(*models, INPUTS)
    found = rows(alignment_summary(pair))
    deep, shallow = pair.deep.traced.layers, pair.shallow.traced.layers
    for row, layer, k in zip(found, deep, pair.alignment.deep_to_shallow, strict=False):
        if k < 0:
            assert row == [layer.name, "(inserted)"]
        else:
            cost = f"{pair.alignment.cost[layer.index, k]:.4f}"
            assert row == [layer.name, shallow[k].name, cost]
    assert found[-1] == ["total", f"{pair.alignment.total_cost:.4f}"]
    assert len(found) == len(deep) + 1


def test_shares_follow_the_order_of_the_models(models):
    deep, shallow = models
    given = fusion_summary(clafusion.fuse(deep, shallow, INPUTS, weight=0.2))
    swapped = fusion_summary(clafusion.fuse(shallow, deep, INPUTS, weight=0.2, verify=False))
    assert fact(given, "shares") == "deep 0.80, shallow 0.20"
    assert fact(swapped, "shares") == "deep 0.20, shallow 0.80"
    assert fact(given, "models").startswith("the first is the deep one")
    assert fact(swapped, "models").startswith("the first is the shallow one")
    assert fact(given, "verified").startswith("yes")
    assert fact(swapped, "verified").startswith("no")


def test_the_summary_tells_settings_and_seconds(models):
    result = clafusion.fuse(*models, INPUTS, calibration="none", solver="sinkhorn")
    text = result.summary()
    assert text == fusion_summary(result)
    assert fact(text, "calibration") == "none"
    assert "solver sinkhorn" in fact(text, "channels")
    assert "5 to 9" in fact(text, "channels")
    for stage in result.timings:
        assert f"{stage} " in fact(text, "seconds")


def test_whether_the_costs_mattered_is_told(models):
    assert "free" in fact(alignment_summary(clafusion.align(*models, INPUTS)), "alignment")
    same = clafusion.align(models[0], models[0], INPUTS)
    assert "forced" in fact(alignment_summary(same), "alignment")


def test_a_models_summary_lists_units_and_classes(models):
    graph = clafusion.trace(models[0], INPUTS)
    text = model_summary(graph)
    layers, groups, _ = text.split("\n\n")
    assert [line.split()[0] for line in layers.splitlines()[2:]] == ["0", "2", "4", "6"]
    assert [line.split()[:2] for line in groups.splitlines()[2:]] == [
        ["0.weight", "9"],
        ["2.weight", "8"],
        ["4.weight", "7"],
    ]
    count = sum(one.numel() for one in models[0].parameters())
    assert fact(text, "parameters") == f"{count:,}"
