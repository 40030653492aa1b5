"""Accuracy and loss with labels: against plain formulas, on what a fusion has not seen."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clafusion
from clafusion import InputError, ModelFile
from clafusion.cli.app import main
from tests.support.networks import mlp

INPUTS = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (600,), generator=torch.Generator().manual_seed(1))
MODELS = {"long": mlp(6, 9, 8, 3), "brief": mlp(6, 7, 3, seed=1)}


@pytest.fixture(scope="module")
def result():
    return clafusion.fuse(MODELS, INPUTS, [3, 1], labels=LABELS, calibration="none")


def accuracy(outputs, labels):
    return float((outputs.argmax(-1) == labels).double().mean())


def test_scores_are_those_of_the_plain_formulas():
    found = clafusion.evaluate(MODELS, INPUTS, LABELS.numpy(), [0.75, 0.25])
    outputs = [one(INPUTS).detach().double() for one in MODELS.values()]
    logits = 0.75 * outputs[0] + 0.25 * outputs[1]
    mean = 0.75 * outputs[0].softmax(-1) + 0.25 * outputs[1].softmax(-1)
    wanted = {
        "long": outputs[0].log_softmax(-1),
        "brief": outputs[1].log_softmax(-1),
        "mean of outputs": logits.log_softmax(-1),
        "mean of probabilities": mean.log(),
    }
    assert list(found.scores) == list(wanted)
    for name, logs in wanted.items():
        assert found.scores[name].accuracy == pytest.approx(accuracy(logs, LABELS))
        assert found.scores[name].loss == pytest.approx(float(F.nll_loss(logs, LABELS)))
    assert clafusion.Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_fusion_is_evaluated_on_what_it_has_not_seen(result):
    held = torch.arange(600) % 10 == 9
    assert result.evaluation.num_inputs == 60
    expected = result.evaluate(INPUTS[held], LABELS[held])
    for name, score in expected.scores.items():  # in other batches, so that roundings differ
        assert result.evaluation.scores[name].accuracy == score.accuracy
        assert result.evaluation.scores[name].loss == pytest.approx(score.loss)
    own = accuracy(result.model(INPUTS[held]), LABELS[held])
    assert result.evaluation.scores["the result"].accuracy == pytest.approx(own)
    assert list(result.evaluation.scores) == [
        "the result",
        *MODELS,
        "mean of outputs",
        "mean of probabilities",
    ]
    plain = clafusion.fuse(MODELS, INPUTS, [3, 1], calibration="none")
    for one, other in zip(result.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_one_table_shows_all(result):
    rows = {row["network"]: row for row in result.table}
    assert rows["mean of outputs"]["agreement"] is None
    for name, score in result.evaluation.scores.items():
        assert (rows[name]["accuracy"], rows[name]["loss"]) == (score.accuracy, score.loss)
    shown = clafusion.summary(result)
    (line,) = [one for one in shown.splitlines() if one.startswith("brief alone")]
    assert line.endswith(f"{result.evaluation.scores['brief'].loss:.3g}")
    assert f"accuracy {100 * result.evaluation.scores['the result'].accuracy:.1f} %" in repr(result)
    assert result.to_dict()["evaluation"] == result.evaluation.to_dict()


def test_values_have_a_squared_error():
    wanted = torch.randn(600, 3)
    found = clafusion.evaluate(MODELS["long"], [INPUTS[:200], INPUTS[200:]], wanted)
    error = float((MODELS["long"](INPUTS).detach().double() - wanted).square().mean())
    assert found.scores["the network"].loss == pytest.approx(error)
    assert found.scores["the network"].accuracy is None


def test_positions_without_a_label_do_not_count():
    model = nn.Embedding(7, 4)
    words, labels = torch.randint(0, 7, (5, 6)), torch.randint(0, 4, (5, 6))
    labels[:, 3:] = -100
    found = clafusion.evaluate(model, words, labels)
    wanted = accuracy(model(words)[:, :3], labels[:, :3])
    assert found.scores["the network"].accuracy == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], "one entry for each input, 600; got 599 entries"),
        (LABELS + 1, "has the class 3, and the networks put out 3 classes"),
        (LABELS > 1, "whole or real numbers; got torch.bool"),
        (["a"] * 600, "labels must be numbers"),
        (LABELS[:, None], "give one label for each of"),
        (torch.full((600,), -100), "no entry that counts"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        clafusion.evaluate(MODELS, INPUTS, labels)


def test_weights_are_shares_and_networks_may_be_a_list():
    by_name = clafusion.evaluate(MODELS, INPUTS, LABELS, {"long": 0.75, "brief": 0.25})
    listed = clafusion.evaluate([*MODELS.values()], INPUTS, LABELS, [3, 1])
    assert list(listed.scores)[:2] == ["models[0]", "models[1]"]
    assert [*listed.scores.values()] == [*by_name.scores.values()]


@pytest.mark.parametrize(
    ("models", "weights", "message"),
    [
        (MODELS, [1.0], "weights must have one entry for each model, 2; got 1"),
        (MODELS, [1, -1], r"weights\[1\] must be a number of at least 0"),
        ({}, None, "models must be networks, at least one; got 0"),
        (3, None, "models must be a list or a mapping of networks, at least one; got int"),
        ({"a": ModelFile("nets.py:long", "a.pt")}, None, "must be a torch.nn.Module, as clafusion"),
    ],
)
def test_networks_and_weights_that_do_not_fit_are_refused(models, weights, message):
    with pytest.raises(InputError, match=message):
        clafusion.evaluate(models, INPUTS, LABELS, weights)


NETS = """
from torch import nn

def long():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))

def brief():
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
"""


def test_the_command_line_does_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    for name, model in MODELS.items():
        clafusion.save_model(model, f"{name}.pt")
    np.savez("data.npz", x=INPUTS.numpy(), y=LABELS.numpy().astype(np.uint8))
    archs = ["--arch=nets.py:long", "--arch=nets.py:brief"]
    command = ["fuse", "long.pt", "brief.pt", *archs, "--data=data.npz", "--calibration=none"]
    assert main([*command, "--labels=y", "--out=fused.safetensors", "--limit=100", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["evaluation"]["num_inputs"] == 100
    evaluate = ["evaluate", "--data=data.npz", "--labels=y", "--limit=100", "--json"]
    assert main([*evaluate, "fused.safetensors"]) == 2
    assert "give --trust-code, or name it by --arch" in capsys.readouterr().err
    assert main([*evaluate, "fused.safetensors", "--trust-code"]) == 0
    found = json.loads(capsys.readouterr().out)["scores"]["fused.safetensors"]
    assert found["accuracy"] == facts["evaluation"]["scores"]["the result"]["accuracy"]
    assert main([*evaluate[:-1], "first=long.pt", "brief.pt", *archs]) == 0
    shown = capsys.readouterr().out
    assert [one.split("  ")[0] for one in shown.splitlines()[2:6]] == [
        "first",
        "brief.pt",
        "mean of outputs",
        "mean of probabilities",
    ]
    assert main([*command, "--labels=z", "--out=fused.pt"]) == 2
    assert "has no 'z'; it has x, y" in capsys.readouterr().err


def test_a_graph_of_torch_fx_is_evaluated_in_eval_mode():
    torch.manual_seed(0)
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).train()
    inputs, labels = torch.randn(40, 4), torch.randint(0, 3, (40,))
    found = clafusion.evaluate(model, inputs, labels).scores["the network"]
    assert model.training
    expected = F.cross_entropy(model.eval()(inputs).double(), labels)
    assert found.loss == pytest.approx(expected.item())


def test_networks_of_other_outputs_have_no_common_labels():
    models = {"low": nn.Linear(4, 2), "all": nn.Linear(4, 6)}
    message = r"'low' \(9, 2\) and 'all' \(9, 6\).*one by one"
    with pytest.raises(InputError, match=message):
        clafusion.evaluate(models, torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))


def test_labels_may_come_with_the_inputs():
    wanted = clafusion.evaluate(MODELS, INPUTS, LABELS)
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=100)
    pairs = [(INPUTS[:250], LABELS[:250]), [INPUTS[250:], LABELS[250:]]]
    for data in (loader, pairs, (INPUTS, LABELS)):
        found = clafusion.evaluate(MODELS, data)
        assert [one.accuracy for one in found.scores.values()] == [
            one.accuracy for one in wanted.scores.values()
        ]


def test_a_result_takes_labels_with_the_inputs(result):
    wanted = result.evaluate(INPUTS, LABELS).scores["the result"]
    found = result.evaluate(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=256))
    assert found.scores["the result"] == wanted


def test_labels_in_mappings_have_their_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = MODELS["brief"]

        def forward(self, values):
            return self.network(values)

    wanted = clafusion.evaluate(MODELS["brief"], INPUTS, LABELS).scores["the network"].accuracy
    for name in ("labels", "label"):
        found = clafusion.evaluate(Named(), [{"values": INPUTS, name: LABELS}])
        assert found.scores["the network"].accuracy == wanted


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (INPUTS, "data is a tensor of inputs, without labels: give labels"),
        ([INPUTS], "data, batch 0, without labels"),
        ([(INPUTS, LABELS), (INPUTS,)], "data, batch 1, without labels"),
        ([{"values": INPUTS}], "data, batch 0, without labels"),
        (DataLoader(TensorDataset(INPUTS, LABELS), shuffle=True), "read it with shuffle=False"),
    ],
)
def test_inputs_without_labels_or_an_order_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        clafusion.evaluate(MODELS, data)


@pytest.mark.parametrize("axis", [2, -3, "1", True])
def test_an_axis_that_the_outputs_lack_is_refused(axis):
    with pytest.raises(InputError, match=r"axis, .* from -2 to 1 for outputs of shape \(256, 3\)"):
        clafusion.evaluate(MODELS, INPUTS, LABELS, axis=axis)


def test_a_network_that_does_not_run_on_the_data_is_named():
    with pytest.raises(InputError, match=r"models\['long'\] does not run on a batch .* \(256, 4\)"):
        clafusion.evaluate(MODELS, INPUTS[:, :4], LABELS)
    with pytest.raises(InputError, match="the network does not run on a batch of data"):
        clafusion.evaluate(MODELS["long"], INPUTS[:, :4], LABELS)


def test_labels_that_are_not_finite_are_refused():
    labels = torch.zeros(600, 3)
    labels[5, 1] = float("nan")
    with pytest.raises(InputError, match="labels hold 1 NaN or infinite"):
        clafusion.evaluate(MODELS, INPUTS, labels)


def test_outputs_that_are_no_numbers_choose_no_class():
    broken = mlp(6, 7, 3)
    broken[0].weight.data.fill_(float("nan"))
    found = clafusion.evaluate({"broken": broken, **MODELS}, INPUTS, LABELS * 0).scores
    assert found["broken"].accuracy == found["mean of outputs"].accuracy == 0
    assert found["long"].accuracy == accuracy(MODELS["long"](INPUTS), LABELS * 0)
