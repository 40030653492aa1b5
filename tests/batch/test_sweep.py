"""Sweeps: every point is what a fusion by its settings is, and what can be shared is made once."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import clafusion
from clafusion import InputError, LeastSquares, Like, Matching
from clafusion.assessment.output_cache import OutputCache
from clafusion.batch import sweep as sweep_module
from clafusion.batch.grid import grid_of
from clafusion.cli.app import main
from clafusion.errors import warn
from clafusion.fusion import fuse_aligned
from clafusion.stages import traced_template
from tests.support.networks import mlp

# A parent with all the weight is not kept where widths are no multiples of its own: not the point.
pytestmark = pytest.mark.filterwarnings("ignore::clafusion.WidthWarning")

INPUTS = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (600,), generator=torch.Generator().manual_seed(1))
MODELS = {"long": mlp(6, 9, 8, 3), "brief": mlp(6, 7, 3, seed=1)}


def test_every_point_is_the_fusion_by_its_settings_and_alignments_are_shared(monkeypatch):
    aligned = []

    def counted(*given, **named):
        aligned.append(given)
        return clafusion.align(*given, **named)

    monkeypatch.setattr(sweep_module, "align", counted)
    found = clafusion.sweep(
        MODELS,
        INPUTS,
        weight=[0.25, 1],
        calibration=["repair", "none"],
        seeds=2,
        labels=LABELS,
        matching={"cost": "euclidean"},
    )
    assert len(found.points) == 8
    assert found.axes == ("weight", "calibration", "seed")
    assert len(aligned) == 2  # once for each seed
    for point in (found.points[1], found.points[6]):
        alone = clafusion.fuse(
            MODELS,
            INPUTS,
            point.weights,
            calibration=point.chosen["calibration"],
            seed=point.chosen["seed"],
            matching=Matching(cost="euclidean"),
            labels=LABELS,
        )
        assert point.config == alone.config
        assert point.assessment == alone.assessment
        assert point.evaluation == alone.evaluation
    whole = next(one for one in found.points if one.chosen["weight"] == 1)
    assert whole.assessment.result.agreement == 1.0


def test_a_template_is_traced_and_the_parents_are_run_once(monkeypatch):
    traced, run = [], []

    def counted(*given):
        traced.append(given)
        return traced_template(*given)

    class Counting(OutputCache):
        def _kept(self, model, key, make):
            is_known = key in self._outputs.get(model, {})
            run.extend([] if is_known else [(model, key)])
            return super()._kept(model, key, make)

    monkeypatch.setattr(sweep_module, "traced_template", counted)
    monkeypatch.setattr(sweep_module, "OutputCache", Counting)
    target = Like(mlp(6, 5, 5, 3, seed=2))
    found = clafusion.sweep(MODELS, INPUTS, weight=[0.25, 0.5, 0.75], target=target)
    assert [one.error for one in found.points] == [None] * 3
    assert len(traced) == 1
    assert len(run) == len(set(run))
    assert {model for model, _ in run} == set(MODELS.values())
    alone = clafusion.fuse(MODELS, INPUTS, found.points[2].weights, target=target)
    assert found.points[2].assessment == alone.assessment


def test_a_summary_has_mean_and_deviation_over_the_seeds():
    found = clafusion.sweep(MODELS, INPUTS, seeds=[3, 4, 5], calibration="none")
    (row,) = found.summary
    values = [one.assessment.result.distance for one in found.points]
    assert row["distance"] == pytest.approx(np.mean(values))
    assert row["distance sd"] == pytest.approx(np.std(values, ddof=1))
    assert row["seeds"] == 3
    assert found.best.quality("agreement") == max(one.quality("agreement") for one in found.points)


def test_lists_at_any_depth_are_a_grid():
    grid = grid_of(
        None,
        {
            "calibration": ["none", {"name": "least_squares", "anchor": [0.0, 0.5]}],
            "matching": {"cost": ["correlation", "weights"]},
        },
    )
    assert len(grid) == 6
    assert [dict(one.chosen) for one in grid[2:4]] == [
        {"calibration": "least_squares", "calibration.anchor": 0.0, "matching.cost": "correlation"},
        {"calibration": "least_squares", "calibration.anchor": 0.0, "matching.cost": "weights"},
    ]
    assert grid[3].config.calibration == LeastSquares(anchor=0.0)
    assert grid[3].config.matching == Matching(cost="weights")
    with pytest.raises(InputError, match=r"matching\.cost is an empty list"):
        grid_of(None, {"matching": {"cost": []}})


def _with_nan(row: int) -> torch.Tensor:
    found = INPUTS.clone()
    found[row, 0] = torch.nan
    return found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_with_nan(0), "batch 0 holds 1 NaN"),
        (_with_nan(599), "batch 2 holds 1 NaN"),
        (torch.utils.data.DataLoader(_with_nan(300), batch_size=50), "batch 6 holds 1 NaN"),
        ([INPUTS, INPUTS[:, :5]], "batch 1 has shape"),
        ([INPUTS, INPUTS.double()], "batch 1 has dtype"),
        (INPUTS[:, :5], "does not run on the example inputs"),
        ([(INPUTS, INPUTS), (_with_nan(3), INPUTS)], "batch 1 holds 1 NaN"),
    ],
)
def test_data_that_no_settings_make_usable_end_a_sweep_at_its_first_point(data, message):
    done = []
    with pytest.raises(InputError, match=message):
        clafusion.sweep(
            MODELS,
            data,
            weight=[0.25, 0.75],
            calibration=["none", "repair"],
            progress=lambda count, _: done.append(count),
        )
    assert done == [0]


def test_a_template_that_does_not_take_the_data_is_the_fault_of_its_point_alone():
    unlike = Like(mlp(7, 9, 8, 3))
    found = clafusion.sweep(MODELS, INPUTS, target=[unlike, "deeper"], calibration="none")
    assert found.points[0].error.startswith("target.template: the model does not run on")
    assert found.points[1].error is None


def test_a_point_that_fails_says_why_and_the_others_go_on():
    found = clafusion.sweep(
        MODELS, INPUTS, target=["deeper", {"name": "deeper", "width": "nobody"}], calibration="none"
    )
    assert [one.error is None for one in found.points] == [True, False]
    assert "target.width must be" in found.points[1].error
    assert found.table.to_dicts()[1]["error"] == found.points[1].error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": [0.5, 2]}, "from 0 to 1; got 2"),
        ({"weight": [0.5], "weights": [[1, 1]]}, "give one of them"),
        ({"weights": [[1, 1, 1]]}, "one entry for each model, 2; got 3"),
        ({"seeds": 0}, "at least 1"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
    ],
)
def test_unusable_arguments_are_refused_at_once(given, message):
    with pytest.raises(InputError, match=message):
        clafusion.sweep(MODELS, INPUTS, **given)


def test_the_figure_has_a_line_for_each_setting_and_a_level_for_each_parent():
    found = clafusion.sweep(
        MODELS, INPUTS, weight=[0, 0.5, 1], calibration=["repair", "none"], seeds=2, labels=LABELS
    )
    (axes,) = clafusion.plot(found).axes
    lines = {one.get_label(): one for one in axes.lines if not one.get_label().startswith("_")}
    assert list(lines) == ["repair", "none"]
    rows = [row for row in found.summary if row["calibration"] == "none"]
    assert np.allclose(lines["none"].get_ydata(), [100 * row["accuracy"] for row in rows])
    assert {one.get_text() for one in axes.texts} == {"long alone", "brief alone"}
    assert axes.get_ylabel() == "accuracy, %"


def test_the_figure_of_widths_has_them_along():
    found = clafusion.sweep(
        MODELS,
        INPUTS,
        target={"name": "wider", "factor": [2, 1.5, 1]},
        calibration=["repair", "none"],
        labels=LABELS,
    )
    (axes,) = clafusion.plot(found).axes
    lines = {one.get_label(): one for one in axes.lines if not one.get_label().startswith("_")}
    assert list(lines) == ["repair", "none"]
    assert list(lines["none"].get_xdata()) == [1, 1.5, 2]
    assert axes.get_xlabel().startswith("width")


NETS = """
from torch import nn

def long():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))

def brief():
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
"""


def test_the_command_line_writes_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    for name, model in MODELS.items():
        clafusion.save_model(model, f"{name}.pt")
    np.savez("data.npz", x=INPUTS.numpy(), y=LABELS.numpy())
    command = ["sweep", "long.pt", "brief.pt", "--arch=nets.py:long", "--arch=nets.py:brief"]
    command += ["--data=data.npz", "--labels=y", "--calibration=repair,none", "--weight=0,0.5"]
    assert main([*command, "--out=sweep.csv", "--plot=sweep.png"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[:2] == ["weight", "calibration"]
    with open("sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["weight"], row["calibration"]) for row in rows] == [
        ("0.0", "repair"),
        ("0.0", "none"),
        ("0.5", "repair"),
        ("0.5", "none"),
    ]
    assert all(math.isfinite(float(row["accuracy"])) for row in rows)
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert main([*command, "--json", "--calibration-anchor=0.5"]) == 2
    assert "--calibration-anchor is for --calibration least_squares" in capsys.readouterr().err
    assert main([*command, "--json", "--weight=1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 2


def test_a_warning_of_a_bad_result_says_of_which_fusion(monkeypatch):
    def warning(*given, **named):
        warn("long alone comes nearer", clafusion.AssessmentWarning)
        return fuse_aligned(*given, **named)

    monkeypatch.setattr(sweep_module, "fuse_aligned", warning)
    with pytest.warns(clafusion.AssessmentWarning, match=r"^weight 0.5: long alone comes nearer"):
        clafusion.sweep(MODELS, INPUTS, weight=[0.5], calibration="none")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 0.5}, "weight must be a list of numbers from 0 to 1"),
        ({"weights": 2}, "weights must be a list with the weights of all models"),
        ({"weights": [2, 1]}, r"weights\[0\] must be a list of numbers; got 2"),
        ({"weights": [["a", 1]]}, r"weights\[0\] must be a list of numbers"),
        ({"seeds": 1.5}, "seeds must be a list or a whole number; got 1.5"),
        ({"seeds": True}, "seeds must be a list or a whole number; got True"),
    ],
)
def test_what_is_no_list_is_refused_by_name(given, message):
    with pytest.raises(InputError, match=message):
        clafusion.sweep(MODELS, INPUTS, **given)


def test_a_sweep_over_nothing_says_so():
    assert repr(clafusion.sweep(MODELS, INPUTS, calibration="none")) == "<SweepResult of 1 fusions>"
