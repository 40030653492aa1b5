"""What a result says of itself: one line, plain data, tables, pictures."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import clafusion
from clafusion import InputError
from tests.support import networks


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(600, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    return {
        "long": networks.mlp(6, 9, 8, 3),
        "brief": networks.mlp(6, 7, 3, seed=1),
        "<b>": networks.mlp(6, 5, 3, seed=2),
    }


@pytest.fixture(scope="module")
def result(models, inputs):
    return clafusion.fuse(models, inputs, [2, 1, 1], calibration="repair")


def test_everything_public_is_one_short_line(result, models, inputs):
    pair = {name: models[name] for name in ("long", "brief")}
    (of_pair,) = clafusion.fuse_pairs(pair, inputs, calibration="none")
    shown = [
        result,
        result.aligned,
        result.problem,
        *result.parents,
        result.parents[1].correspondence,
        result.problem.target,
        result.problem.target.groups[0],
        result.aligned.profiles[0],
        result.aligned.pairs[0].alignment,
        of_pair,
        [of_pair],
        result.table,
    ]
    for one in shown:
        assert "\n" not in repr(one)
        assert len(repr(one)) < 160, type(one)
    agreement = result.assessment.result.agreement
    count = sum(one.numel() for one in result.model.parameters())
    assert repr(result) == (
        f"<FusionResult Sequential {count} parameters, agreement {100 * agreement:.1f} %>"
    )
    assert repr(of_pair).startswith("<PairResult long and brief: agreement ")


def test_a_notebook_shows_a_table_in_which_names_are_text(result):
    page = result._repr_html_()
    assert page.count("<tr>") == 5  # titles, the result, three parents
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert f"{result.assessment.result.agreement:.4g}" in page


def test_the_table_has_the_result_and_every_parent(result):
    rows = {row.pop("network"): row for row in result.table}
    assert list(rows) == ["the result", "long", "brief", "<b>"]
    assert [row["weight"] for row in rows.values()] == [None, 0.5, 0.25, 0.25]
    for name, near in result.assessment.parents.items():
        assert rows[name]["agreement"] == near.agreement
        assert rows[name]["divergence"] == near.distance


def test_plain_data_goes_through_json(result):
    facts = json.loads(result.to_json())
    assert facts == json.loads(json.dumps(result.to_dict()))
    assert facts["weights"] == [0.5, 0.25, 0.25]
    assert facts["assessment"] == result.assessment.to_dict()
    assert [one["name"] for one in facts["parents"]] == ["long", "brief", "<b>"]
    assert clafusion.FusionConfig.parse(facts["config"], "config") == result.config


def test_frames_are_made_by_pandas_where_it_is_there(result, monkeypatch):
    made = []
    frame = SimpleNamespace(DataFrame=lambda columns: made.append(columns) or "frame")
    monkeypatch.setitem(sys.modules, "pandas", frame)
    assert result.to_frame() == "frame"
    assert result.aligned.to_frame() == "frame"
    assert made[0]["network"] == [row["network"] for row in result.table]
    assert list(made[0]) == list(result.table.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        result.to_frame()


def test_the_alignments_table_has_every_layer_of_every_pair(result):
    of_pair = [row for row in result.aligned.table if row["shallow"] == "brief"]
    layers = [one.name for one in result.problem.target.layers]
    assert [row["deep layer"] for row in of_pair] == layers
    costs = [row["cost"] for row in of_pair if row["cost"] is not None]
    assert sum(costs) == pytest.approx(result.aligned.pairs[0].alignment.matched_cost)


def test_a_picture_needs_no_file_and_is_shown_by_a_notebook(result, tmp_path):
    figure = clafusion.plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(clafusion.plot(result).axes) == len(figure.axes)
    assert clafusion.plot(result.aligned).axes
    assert clafusion.plot(result.problem.target).axes


def test_the_picture_of_many_pairs_shows_their_agreements(models, inputs):
    named = dict(zip("abc", models.values(), strict=True))
    pairs = list(clafusion.fuse_pairs(named, inputs, calibration="none"))
    axes, bar = clafusion.plot(pairs).axes
    assert bar.get_ylabel() == "agreement, %"
    assert {one.get_text() for one in axes.texts} == {f"{100 * one.agreement:.2f}" for one in pairs}
    plain = list(
        clafusion.fuse_pairs(named, inputs, calibration="none", assessment={"outputs": "values"})
    )
    assert clafusion.plot(plain).axes[1].get_ylabel() == "distance"
    none = list(clafusion.fuse_pairs(named, inputs, calibration="none", assessment="none"))
    assert clafusion.plot(none).axes[1].get_ylabel() == "alignment cost"
    with pytest.raises(InputError, match="plot takes"):
        clafusion.plot([1])
