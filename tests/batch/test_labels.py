"""Labels of many pairs: as `fuse` measures them, each model run once, kept, shown everywhere."""

import csv
import io
import re

import numpy as np
import pytest
import torch

import clafusion
from clafusion import InputError, ModelFile
from clafusion.batch.results import pairs_table
from clafusion.batch.run import fuse_pairs
from clafusion.cli.app import main
from clafusion.reports.page import write_report
from clafusion.reports.page.details import load_line
from clafusion.reports.page.measures import measures_of, quality_of
from clafusion.weights.state_files import save_model
from tests.support.many_pairs import DATA, FACTORY, SETTINGS, lines, modules
from tests.support.networks import mlp

LABELS = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(4))
FAST = {**SETTINGS, "calibration": "none"}
MEAN = "mean of probabilities"


@pytest.fixture(scope="module")
def models():
    return {name: one for name, one in modules().items() if name != "d"}


@pytest.fixture(scope="module")
def results(models):
    return list(fuse_pairs(models, DATA, labels=LABELS, **FAST))


def test_each_pair_is_evaluated_as_alone(models, results):
    for one in results:
        pair = {name: models[name] for name in (one.first, one.second)}
        alone = clafusion.fuse(pair, DATA, labels=LABELS, **FAST).evaluation
        assert one.evaluation == alone
        assert (one.accuracy, one.loss) == (
            alone.scores["the result"].accuracy,
            alone.scores["the result"].loss,
        )
    plain = list(fuse_pairs(models, DATA, **FAST))
    assert [one.evaluation for one in plain] == [None] * 3
    for one, other in zip(results, plain, strict=True):
        assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_each_model_runs_once_over_the_labelled_inputs():
    counts = {}
    models = {name: one for name, one in modules().items() if name != "d"}
    for name, one in models.items():
        one.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    found = []
    for pairs in ([("a", "b")], [("a", "b"), ("a", "c"), ("b", "c")]):
        counts.update(dict.fromkeys(models, 0))
        list(fuse_pairs(models, DATA, pairs, labels=LABELS, verify=False, **FAST))
        found.append((counts["a"], counts["b"]))
    assert found[0] == found[1]
    assert min(found[0]) > 0


def test_labels_are_kept_and_belong_to_what_is_resumed(models, tmp_path):
    given = {"out_dir": tmp_path, "pairs": [("a", "b")], **FAST}
    (before,) = fuse_pairs(models, DATA, labels=LABELS, **given)
    assert lines(tmp_path)[0]["evaluation"] == before.evaluation.to_dict()
    (again,) = fuse_pairs(models, DATA, labels=LABELS, **given)
    assert again.resumed
    assert again.evaluation == before.evaluation
    for labels in (LABELS.flip(0), None):
        (other,) = fuse_pairs(models, DATA, labels=labels, **given)
        assert not other.resumed
    with pytest.raises(InputError, match="one entry for each input, 300; got 299 entries"):
        fuse_pairs(models, DATA, labels=LABELS[1:], **given)


def test_tables_and_the_report_show_what_labels_say(results, tmp_path):
    rows = list(csv.DictReader(io.StringIO(pairs_table(results).to_csv())))
    assert [float(row["accuracy"]) for row in rows] == [one.accuracy for one in results]
    summary = clafusion.summary(results).splitlines()
    assert re.search(r"accuracy +better parent's +of both", summary[0])
    scores = results[0].evaluation.scores
    better = max(scores["a"].accuracy, scores["b"].accuracy)
    shown = [f"{100 * x:.1f} %" for x in (results[0].accuracy, better, scores[MEAN].accuracy)]
    assert re.search(" +".join(shown), summary[2])
    measures = {one.key: one for one in measures_of(results)}
    assert quality_of(list(measures.values())).key == "accuracy"
    gaps = (results[0].accuracy - better, results[0].accuracy - scores[MEAN].accuracy)
    assert measures["gap_parent"].values[0] == pytest.approx(gaps[0])
    assert measures["gap_ensemble"].values[0] == pytest.approx(gaps[1])
    assert measures["accuracy"].models["a"] == scores["a"].accuracy
    write_report(results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<th scope="col">accuracy, %</th>' in page
    assert f"labels: {MEAN}" in page


def test_values_are_ranked_by_the_loss(models):
    labels = torch.randn(300, 5, generator=torch.Generator().manual_seed(5))
    results = list(fuse_pairs(models, DATA, labels=labels, assessment="values", **FAST))
    measures = {one.key: one for one in measures_of(results)}
    assert quality_of(list(measures.values())).key == "loss"
    scores = results[0].evaluation.scores
    alone = min(scores[name].loss for name in "ab")
    assert measures["gap_parent"].values[0] == pytest.approx(alone - results[0].loss)
    assert measures["gap_parent"].title == "gap to better parent, loss"
    assert "accuracy" not in measures
    assert "loss" in clafusion.summary(results).splitlines()[0]


def test_manifests_and_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    for name in "ab":
        save_model(modules()[name], tmp_path / f"{name}.safetensors")
    np.savez("data.npz", x=DATA.numpy(), y=LABELS.numpy().astype(np.uint8))
    (tmp_path / "zoo.yaml").write_text(
        "models:\n"
        '  a: {factory: "nets.py:mlp(12, 9, 5)", weights: a.safetensors}\n'
        '  b: {factory: "nets.py:mlp(12, 9, 8, 5)", weights: b.safetensors}\n'
        "data: {file: data.npz, limit: 200}\n"
        "settings: {calibration: none}\nout: fused\n"
    )
    assert main(["fuse-pairs", "zoo.yaml", "--labels=y", "--csv=pairs.csv"]) == 0
    assert "better parent's" in capsys.readouterr().out
    assert "accuracy" in (tmp_path / "pairs.csv").read_text()
    assert "accuracy, %" in (tmp_path / "fused" / "report.html").read_text()
    text = (tmp_path / "zoo.yaml").read_text()
    (tmp_path / "zoo.yaml").write_text(text.replace("limit: 200", "limit: 200, labels: y"))
    assert main(["fuse-pairs", "zoo.yaml", "--json"]) == 0
    assert '"resumed": 1' in capsys.readouterr().out
    assert main(["fuse-pairs", "zoo.yaml", "--labels=z"]) == 2
    assert "has no 'z'; it has x, y" in capsys.readouterr().err


def test_a_pair_of_other_widths_is_loaded_by_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    models = {}
    for name, widths in (("a", "12, 9, 5"), ("b", "12, 20, 8, 5")):
        clafusion.save_model(
            clafusion.weights.factories.build_model(f"nets.py:mlp({widths})"), f"{name}.safetensors"
        )
        models[name] = ModelFile(f"nets.py:mlp({widths})", f"{name}.safetensors")
    (one,) = fuse_pairs(
        models, DATA, out_dir="fused", target=clafusion.Deeper(width="narrow"), **FAST
    )
    assert one.resized
    assert one.loads_itself
    line = load_line(one)
    assert line == f"model = clafusion.load({str(one.path)!r}, trust_code=True)"
    model = eval(line.removeprefix("model = "), {"clafusion": clafusion})
    assert torch.equal(model(DATA), one.model.eval()(DATA))
    (again,) = fuse_pairs(
        models, DATA, out_dir="fused", target=clafusion.Deeper(width="narrow"), **FAST
    )
    assert again.resumed
    assert load_line(again) == line


@pytest.mark.parametrize("width", ["own", "narrow"])
def test_a_pair_of_modules_is_loaded_by_its_line(tmp_path, width):
    models = {"a": mlp(12, 9, 5), "b": mlp(12, 20, 8, 5, seed=1)}
    options = {**FAST, "target": clafusion.Deeper(width=width), "out_dir": tmp_path}
    (one,) = fuse_pairs(models, DATA, **options)
    assert one.resized == (width == "narrow")
    names = {"clafusion": clafusion, "models": models}
    before = {name: model.state_dict() for name, model in models.items()}
    exec(load_line(one), names)
    assert torch.equal(names["model"](DATA), one.model.eval()(DATA))
    for name, model in models.items():  # a copy was filled
        assert all(torch.equal(before[name][key], model.state_dict()[key]) for key in before[name])
    with pytest.raises(InputError, match=r"does not fit the Sequential given.*in one of them only"):
        clafusion.load(torch.nn.Sequential(torch.nn.Linear(2, 2)), one.path)
    with pytest.raises(InputError, match=r"takes a file of weights that clafusion wrote"):
        clafusion.load(models["a"])


def test_the_command_line_goes_on_where_python_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    models = {}
    for name, widths in (("a", "12, 9, 5"), ("b", "12, 9, 8, 5")):
        models[name] = ModelFile(f"nets.py:mlp({widths})", f"{name}.safetensors")
        save_model(modules()[name], models[name].path)
    np.savez("data.npz", x=DATA.numpy(), y=LABELS.numpy())
    list(fuse_pairs(models, DATA, labels=LABELS, out_dir="fused", calibration="none"))
    (tmp_path / "zoo.yaml").write_text(
        "models:\n"
        '  a: {factory: "nets.py:mlp(12, 9, 5)", weights: a.safetensors}\n'
        '  b: {factory: "nets.py:mlp(12, 9, 8, 5)", weights: b.safetensors}\n'
        "data: {file: data.npz, labels: y}\nsettings: {calibration: none}\nout: fused\n"
    )
    assert main(["fuse-pairs", "zoo.yaml", "--json"]) == 0
    assert '"resumed": 1' in capsys.readouterr().out
