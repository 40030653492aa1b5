"""The tables: every layer once, and what was done told truly."""

import pytest
import torch
from torch import nn

import clafusion
from clafusion import InputError, Iterative, LeastSquares, Matching, Merging, Sinkhorn
from clafusion.reports import summary
from clafusion.reports.alignment_tables import alignment_summary
from clafusion.reports.tables import fusion_summary, model_summary
from clafusion.reports.text import plain_table
from clafusion.settings import described
from tests.support import networks

INPUTS = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    return {"deep": networks.mlp(6, 9, 8, 7, 3), "flat": networks.mlp(6, 5, 4, 3)}


@pytest.fixture(scope="module")
def three(models):
    return {**models, "last": networks.mlp(6, 7, 3, seed=2)}


def rows(text):
    """Return the cells of a summary's first table, without titles and rule."""
    table = text.split("\n\n")[0].splitlines()[2:]
    return [line.split() for line in table]


def fact(text, name):
    (line,) = (one for one in text.splitlines() if one.startswith(f"{name:<12} "))
    return line[len(name) :].strip()


def test_columns_are_aligned():
    table = plain_table(["name", "n"], [["a", "1"], ["longer", "10"]], numeric=[1])
    assert table == "name     n\n------  --\na        1\nlonger  10"


def test_every_deep_layer_has_a_row_with_its_partner_and_cost(models):
    aligned = clafusion.align(models, INPUTS)
    text = alignment_summary(aligned)
    assert text.split("\n")[0].split() == ["deep", "flat", "cost"]
    found = rows(text)
    deep, flat = (one.traced.layers for one in aligned.profiles)
    alignment = aligned.alignment
    for row, layer, k in zip(found, deep, alignment.deep_to_shallow, strict=False):
        if k < 0:
            assert row == [layer.name, "(inserted)"]
        else:
            assert row == [layer.name, flat[k].name, f"{alignment.cost[layer.index, k]:.4f}"]
    assert found[-1] == ["total", f"{alignment.total_cost:.4f}"]
    assert len(found) == len(deep) + 1
    assert fact(text, "layers") == "deep 4, flat 3; aligned with deep"
    assert fact(text, "inserted") == "1 into flat"


def columns(text):
    """Return the cells of a summary's first table by column, blanks included."""
    titles, rule, *lines = text.split("\n\n")[0].splitlines()
    starts = [0, *(i for i in range(1, len(rule)) if rule[i - 1] == " " and rule[i] == "-")]
    ends = [*starts[1:], None]
    return [
        [line[a:b].strip() for line in (titles, *lines)] for a, b in zip(starts, ends, strict=True)
    ]


def test_of_three_models_each_has_columns_beside_the_references(three):
    order = {name: three[name] for name in ("flat", "deep", "last")}
    aligned = clafusion.align(order, INPUTS)
    text = alignment_summary(aligned)
    reference, flat, flat_cost, last, last_cost = columns(text)
    assert (reference[0], flat[0], last[0]) == ("deep", "flat", "last")
    assert reference[1:] == ["0", "2", "4", "6", "total"]
    for name, shown, costs, i in (("flat", flat, flat_cost, 0), ("last", last, last_cost, 2)):
        pair = aligned.alignments[i]
        names = aligned.layer_names(i)
        matched = pair.alignment.deep_to_shallow
        assert shown[1:-1] == [names[k] if k >= 0 else "(inserted)" for k in matched]
        wanted = [f"{pair.alignment.cost[one, k]:.4f}" for one, k in pair.alignment.pairs]
        assert [one for one in costs[1:-1] if one] == wanted
        assert costs[-1] == f"{pair.alignment.matched_cost:.4f}"
        assert f"into {name}" in fact(text, "inserted")
    assert fact(text, "layers") == "flat 3, deep 4, last 2; aligned with deep"
    told = fact(text, "alignment")
    assert told.startswith("by layer; flat free")
    assert "last forced" in told


def test_layers_that_a_shallower_result_lacks_are_merged(three):
    aligned = clafusion.align(three, INPUTS, target="shallower")
    text = alignment_summary(aligned)
    reference, deep, _, flat, _ = columns(text)
    assert reference == ["last", "0", *["(merged)"] * 3, "2", "total"]
    assert deep[:-1] == ["deep", "0", "2", "4", "", "6"]
    assert flat[:-1] == ["flat", "0", "", "", "2", "4"]
    assert fact(text, "merged away") == "2 of deep, 1 of flat"
    assert "inserted" not in text


def test_gaps_on_both_sides_have_rows_of_their_own():
    inputs = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    models = {"left": networks.vgg(3, 1), "right": networks.vgg(1, 3, seed=1)}
    text = summary(clafusion.fuse(models, inputs))
    left, right, _ = columns(text)
    assert left.count("(inserted)") == right.count("(inserted)") == 2
    assert fact(text, "inserted") == "2 into right, 2 into left"


def test_weights_are_told_by_name_in_any_order(models):
    given = fusion_summary(clafusion.fuse(models, INPUTS, [4, 1]))
    order = {name: models[name] for name in ("flat", "deep")}
    swapped = fusion_summary(clafusion.fuse(order, INPUTS, [1, 4], verify=False))
    assert fact(given, "weights") == "deep 0.80, flat 0.20"
    assert fact(swapped, "weights") == "flat 0.20, deep 0.80"
    assert rows(given) == rows(swapped)
    assert fact(given, "verified").startswith("yes")
    assert fact(swapped, "verified").startswith("no")


def test_the_summary_tells_settings_and_seconds(models):
    matching = Matching(solver="sinkhorn", importance="norm")
    result = clafusion.fuse(models, INPUTS, calibration="none", matching=matching)
    text = summary(result)
    assert text == fusion_summary(result)
    assert fact(text, "calibration") == "none"
    assert "solver sinkhorn, masses by norm" in fact(text, "channels")
    assert "flat 3 of 3 groups" in fact(text, "channels")
    assert "5 to 9" in fact(text, "channels")
    assert fact(text, "target") == "deeper, 4 layers"
    for stage in result.timings:
        assert f"{stage} " in fact(text, "seconds")


def test_settings_are_described_by_what_is_not_the_default():
    assert described(LeastSquares()) == "least_squares"
    assert described(LeastSquares(anchor=0.5, samples=7)) == "least_squares (anchor 0.5, samples 7)"
    assert described(Sinkhorn(epsilon=0.01)) == "sinkhorn (epsilon 0.01)"


def test_layers_with_weights_of_their_own_have_a_table(three):
    merging = Merging(layer_weights="sensitivity")
    result = clafusion.fuse(three, INPUTS, [2, 1, 1], merging=merging)
    table = summary(result).split("\n\n")[-3].splitlines()
    assert table[0].split() == ["weights", "in", "deep", "flat", "last"]
    layers = [one.name for one in result.problem.target.layers]
    for line, name, weights in zip(table[2:], layers, result.layer_weights, strict=True):
        assert line.split() == [name, *(f"{one:.2f}" for one in weights if one is not None)]
    assert fact(summary(result), "weights").endswith("of each matched layer by sensitivity")
    text = summary(clafusion.fuse(three, INPUTS, [2, 1, 1]))
    assert "weights in" not in text
    assert fact(text, "weights") == "deep 0.50, flat 0.25, last 0.25"


def test_one_after_another_each_step_has_its_table(three):
    text = summary(clafusion.fuse(three, INPUTS, [2, 1, 1], merging=Merging(Iterative())))
    assert "Step 1: deep and flat" in text
    assert "Step 2: deep+flat and last" in text
    assert fact(text, "weights") == "deep 0.50, flat 0.25, last 0.25"
    assert fact(text, "strategy") == "iterative, rounds 2"


def test_whether_the_costs_mattered_is_told(models):
    assert "free" in fact(alignment_summary(clafusion.align(models, INPUTS)), "alignment")
    same = clafusion.align([models["deep"], models["deep"]], INPUTS)
    assert "forced" in fact(alignment_summary(same), "alignment")
    assert alignment_summary(same).startswith("models[0]  models[1]")


def test_a_models_summary_lists_layers_and_groups(models):
    traced = clafusion.trace(models["deep"], INPUTS)
    text = model_summary(traced)
    assert text == summary(traced)
    layers, groups, _ = text.split("\n\n")
    assert [line.split()[0] for line in layers.splitlines()[2:]] == ["0", "2", "4", "6"]
    assert [line.split()[:2] for line in groups.splitlines()[2:]] == [
        ["0.weight", "9"],
        ["2.weight", "8"],
        ["4.weight", "7"],
    ]
    count = sum(one.numel() for one in models["deep"].parameters())
    assert fact(text, "parameters") == f"{count:,}"


def test_a_list_of_pairs_has_a_table(three):
    from clafusion.batch.run import fuse_pairs

    results = list(fuse_pairs(three, INPUTS))
    text = summary(results)
    assert [row[:3] for row in rows(text)] == [
        ["deep", "flat", "deep"],
        ["deep", "last", "deep"],
        ["flat", "last", "flat"],
    ]
    assert fact(text, "pairs") == "3, 0 failed, 0 taken over from an earlier run"
    results = list(fuse_pairs({**three, "tanh": networks.mlp(6, 5, 3, activation=nn.Tanh)}, INPUTS))
    text = summary(results)
    assert [row[-1] for row in rows(text)] == ["fused", "fused", "failed", "fused", *["failed"] * 2]
    assert "cannot be brought to one structure" in fact(text, "deep, tanh")
    assert fact(text, "pairs").startswith("6, 3 failed")


def test_what_has_no_table_is_refused():
    for thing in (3, [3], nn.Identity()):
        with pytest.raises(InputError, match="summary takes a FusionResult"):
            summary(thing)
