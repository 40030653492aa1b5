"""Reassembly: what comes out, that stitches alone are fitted, budgets, files and refusals."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import clafusion
from clafusion import InputError, reassemble
from clafusion.cli.app import main
from tests.support.networks import mlp, permuted_copy, resnet

IMAGES = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def perceptron(seed=0):
    return nn.Sequential(nn.Flatten(), mlp(64, 30, 20, 16, 4, seed=seed)).eval()


def convolutional(width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 14, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(14, 4),
    ).eval()


def three():
    return {"mlp": perceptron(), "cnn": convolutional(), "other": convolutional(10, seed=3)}


@pytest.fixture(scope="module")
def result():
    return reassemble(three(), IMAGES, blocks=3, candidates=6)


def test_without_a_number_of_blocks_the_nearest_of_several_numbers_is_returned():
    models = {name: one for name, one in three().items() if name != "other"}
    found = reassemble(models, IMAGES, candidates=2)
    of_each = [reassemble(models, IMAGES, candidates=2, blocks=count) for count in (2, 3, 4)]
    assert found.config.blocks is None
    assert len(found.tried) == sum(len(one.tried) for one in of_each)
    order = [(-one.assessment.result.agreement, one.assessment.result.distance) for one in of_each]
    best = of_each[order.index(min(order))]
    assert found.tried[0].text == best.tried[0].text
    assert torch.equal(found.model(IMAGES), best.model(IMAGES))
    assert found.groups == best.groups
    assert set(found.timings) == set(best.timings)
    shallow = nn.Sequential(nn.Flatten(), mlp(64, 12, 4, seed=1)).eval()
    small = reassemble([shallow, perceptron()], IMAGES, candidates=2)
    assert {len(one.blocks) for one in small.tried} == {2}  # it can be cut at one place


@pytest.mark.parametrize("blocks", [2, 3, 4])
@pytest.mark.parametrize("kind", ["copy", "permuted"])
@torch.no_grad()
def test_copies_cut_at_the_same_place_give_the_network(kind, blocks):
    models = {
        "perceptron": (mlp(12, 20, 16, 14, 4), torch.randn(300, 12)),
        "residual": (resnet(2, 2, widths=(8, 12)), WIDE),
    }
    for model, data in models.values():
        other = copy.deepcopy(model) if kind == "copy" else permuted_copy(model, data[:4])
        found = reassemble([model, other], data, blocks=blocks)
        assert len({one.model for one in found.blocks}) == 2
        assert [one.index for one in found.blocks] == list(range(blocks))
        expected = model.eval()(data)
        far = (found.model(data) - expected).abs().max()
        assert float(far) <= 1e-5 * float(expected.abs().max())


def test_stitches_alone_are_fitted(result):
    parents = [
        {tuple(one.flatten().tolist()) for one in model.state_dict().values() if one.dim()}
        for model in three().values()
    ]
    known = set.union(*parents)
    stitches = {id(one) for stitch in result.model.stitches for one in stitch.parameters()}
    others = [one for one in result.model.parameters() if id(one) not in stitches]
    assert stitches
    assert others
    assert all(tuple(one.flatten().tolist()) in known for one in others)
    assert result.tried[0].parameters == sum(one.numel() for one in result.model.parameters())


def test_every_network_takes_a_block_of_each_group_in_order(result):
    assert len(result.tried) == 6
    for one in result.tried:
        assert all(block in of for block, of in zip(one.blocks, result.groups, strict=True))
        assert len({block.model for block in one.blocks}) > 1
        assert one.blocks[0].start is None
        assert one.blocks[-1].end is None
    near = [one.assessment.result for one in result.tried]
    order = [(-one.agreement, one.distance) for one in near]
    assert order == sorted(order)
    assert result.assessment is result.tried[0].assessment


def test_no_model_is_modified_and_the_bytes_are_the_same_again(result):
    models = three()
    before = copy.deepcopy(models)
    again = reassemble(models, IMAGES, candidates=6)
    for name, one in models.items():
        state = before[name].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())
    state = result.model.state_dict()
    assert all(torch.equal(one, state[key]) for key, one in again.model.state_dict().items())


def test_budgets_are_kept(result):
    most = sorted(one.parameters for one in result.tried)[2]
    small = reassemble(three(), IMAGES, candidates=6, most_parameters=most)
    assert all(one.parameters <= most for one in small.tried)
    few = sorted(one.operations for one in result.tried)[2]
    cheap = reassemble(three(), IMAGES, candidates=6, most_operations=few)
    assert all(one.operations <= few for one in cheap.tried)
    with pytest.raises(InputError, match=r"most_parameters=10: the smallest network .* has "):
        reassemble(three(), IMAGES, most_parameters=10)
    with pytest.raises(InputError, match="most_operations=10: the smallest network"):
        reassemble(three(), IMAGES, most_operations=10)


def test_it_saves_loads_and_trains(result, tmp_path):
    result.save(tmp_path / "stitched.pt2")
    loaded = clafusion.load(tmp_path / "stitched.pt2")
    assert torch.allclose(loaded(IMAGES), result.model(IMAGES), atol=1e-6)
    labels = three()["cnn"](IMAGES).argmax(1)
    trained = clafusion.finetune(result.model, (IMAGES, labels), epochs=3, learning_rate=0.01)
    assert trained.losses[-1] < trained.losses[0]
    with pytest.raises(InputError, match=r"give a file \.pt2"):
        result.save(tmp_path / "stitched.safetensors")


def test_it_shows_itself(result, tmp_path):
    assert repr(result).startswith("<ReassemblyResult ")
    assert "\n" not in repr(result)
    assert result.table.columns[:3] == ("network", "blocks", "agreement")
    assert json.loads(result.to_json())["config"]["blocks"] == 3
    text = clafusion.summary(result)
    assert "block of" in text
    assert result.blocks[0].text in text
    figure = clafusion.plot(result, tmp_path / "where.png")
    shown = [one.get_text() for axes in figure.axes for one in axes.texts]
    assert {"mlp", "cnn", "other"} <= set(shown)
    assert any(one.startswith("stitch, ") for one in shown)


def test_unusable_arguments_are_named():
    models = three()
    with pytest.raises(InputError, match=r"models\['cnn'\] has 3 places .* 6 blocks need 5"):
        reassemble({"cnn": models["cnn"], "mlp": models["mlp"]}, IMAGES, blocks=6)
    wide = nn.Sequential(nn.Flatten(), mlp(64, 20, 16, 5)).eval()
    with pytest.raises(InputError, match=r"models\['wide'\] puts out .* models\['mlp'\]"):
        reassemble({"mlp": models["mlp"], "wide": wide}, IMAGES)
    with pytest.raises(InputError, match="assessment must not be 'none'"):
        reassemble(models, IMAGES, assessment="none")
    with pytest.raises(InputError, match="blocks must be a whole number from 2 to 16"):
        reassemble(models, IMAGES, blocks=1)
    with pytest.raises(InputError, match="config must be a ReassemblyConfig"):
        reassemble(models, IMAGES, clafusion.FusionConfig())
    with pytest.raises(InputError, match=r"^'block' is no option; did you mean 'blocks'"):
        reassemble(models, IMAGES, block=2)
    with pytest.raises(InputError, match=r"data has 1 sample\(s\), to which no stitch"):
        reassemble(models, IMAGES[:1])


@torch.no_grad()
def test_it_meets_the_mean_that_is_asked_for():
    found = {
        means: reassemble(three(), IMAGES, blocks=2, candidates=3, combine=means).assessment
        for means in ("auto", "probabilities", "logits")
    }
    assert found["auto"].result == found["probabilities"].result
    assert found["logits"].result != found["auto"].result
    with pytest.raises(InputError, match="combine='probabilities' needs outputs that are classes"):
        reassemble(three(), IMAGES, combine="probabilities", assessment={"outputs": "values"})
    with pytest.raises(InputError, match="combine must be one of 'auto', 'logits'"):
        reassemble(three(), IMAGES, combine="mean")
    with pytest.raises(InputError, match=r"memory_limit is for fusions and merges"):
        reassemble(three(), IMAGES, memory_limit="4GB")


def test_networks_in_half_precision_give_one_in_half_precision():
    halves = {name: one.bfloat16() for name, one in three().items()}
    images = IMAGES.bfloat16()
    model = reassemble(halves, images, candidates=2).model
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert model(images).dtype == torch.bfloat16


def test_blocks_that_cannot_be_joined_are_named():
    tall = nn.Sequential(
        nn.Unflatten(1, (1, 64)),
        nn.Conv1d(1, 5, 3),
        nn.ReLU(),
        nn.Conv1d(5, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(300, 4),
    ).eval()
    small = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 4),
    ).eval()
    data = IMAGES.flatten(1)
    with pytest.raises(InputError, match=r"no blocks of different models can be joined: .* of "):
        reassemble({"tall": tall, "small": small}, data, blocks=3)


def test_the_command_does_what_reassemble_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 0), ("two", 1)):
        clafusion.save_model(mlp(12, 20, 16, 4, seed=seed), f"{name}.pt")
    data = torch.randn(300, 12)
    np.save("data.npy", data.numpy())
    command = [
        *("reassemble", "one.pt", "b=two.pt", "--arch=tests.support.networks:mlp(12, 20, 16, 4)"),
        *("--data=data.npy", "--out=stitched.pt2", "--blocks=2", "--plot=where.png"),
    ]
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["blocks"] == 2
    models = {"first": mlp(12, 20, 16, 4, seed=0), "b": mlp(12, 20, 16, 4, seed=1)}
    expected = reassemble(models, data, blocks=2).model(data[:20])
    assert torch.allclose(clafusion.load("stitched.pt2")(data[:20]), expected, atol=1e-6)
    assert (tmp_path / "where.png").is_file()
    assert main([*command, "--blocks=9"]) == 2
    assert "take fewer blocks" in capsys.readouterr().err
    assert main([*command[:-2], "--out=x.pt"]) == 2


def test_values_that_are_the_same_for_all_inputs_are_named():
    models = three()
    with pytest.raises(InputError, match="data is the same for all inputs"):
        reassemble(models, torch.ones(50, 1, 8, 8))
    dead = models["mlp"]
    with torch.no_grad():
        dead[1][2].weight.zero_()
        dead[1][2].bias.fill_(-1.0)
    with pytest.raises(
        InputError, match=r"models\['mlp'\]: what .* in '1.\d' puts out is the same"
    ):
        reassemble(models, IMAGES)


def test_a_reassembly_is_evaluated_beside_its_models(result):
    labels = torch.arange(len(IMAGES)) % 4
    found = result.evaluate(IMAGES, labels)
    alone = clafusion.evaluate(result.parent_models, IMAGES, labels)
    assert list(found.scores) == ["the result", *alone.scores]
    assert found.scores["cnn"].accuracy == alone.scores["cnn"].accuracy
    own = clafusion.evaluate(result.model, IMAGES, labels).scores["the network"]
    assert found.scores["the result"].loss == pytest.approx(own.loss)
    with pytest.raises(InputError, match="labels must have one entry for each input"):
        result.evaluate(IMAGES, labels[:3])
