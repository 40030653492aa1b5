"""Between the average of two networks and both side by side."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import clafusion
from clafusion import (
    Deeper,
    FusionConfig,
    InputError,
    Like,
    Matching,
    StructureError,
    Wider,
    WidthWarning,
    Zip,
    fuse,
)
from tests.support import networks
from tests.support.attention import TOKENS, Encoder
from tests.support.data import CALIBRATIONS, IMAGES, MODELS, PAIRS, VECTORS

WIDENED = {name: one for name, one in PAIRS.items() if name != "resnet, padded"} | {
    "mlp, unequal": (
        networks.mlp(12, 9, 14, 8, 7, 5, seed=1),
        networks.mlp(12, 16, 5, seed=2),
        VECTORS,
    ),
    "resnet, each deeper somewhere": (
        networks.resnet(3, 1, shortcut="conv", seed=1),
        networks.resnet(1, 2, widths=(10, 12), shortcut="conv", seed=2),
        IMAGES,
    ),
}


def mean(models, inputs, weights):
    with torch.no_grad():
        return sum(
            weight * one(inputs).double() for weight, one in zip(weights, models, strict=True)
        )


def distance(model, goal, inputs):
    with torch.no_grad():
        return float((model(inputs) - goal).abs().max() / goal.abs().max())


def num_parameters(model):
    return sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize(
    ("name", "calibration"), [*((name, "repair") for name in WIDENED), ("mlp", "least_squares")]
)
def test_at_twice_the_width_it_is_the_mean_of_both(name, calibration):
    *models, inputs = WIDENED[name]
    result = fuse(
        models, inputs, [0.3, 0.7], target=Wider(2), calibration=calibration, verify=False
    )
    for x in (inputs, 2 * torch.randn_like(inputs)):  # also where no data was
        assert distance(result.model, mean(models, x, (0.3, 0.7)), x) < 1e-5


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", ["mlp, unequal", "resnet, 1x1"])
def test_all_the_weight_on_one_gives_it_at_any_width(name, calibration):
    *models, inputs = WIDENED[name]
    settings = {"target": Wider(1.4), "calibration": calibration, "verify": False}
    for i, model in enumerate(models):
        result = fuse(models, inputs, [float(i == 0), float(i == 1)], **settings)
        assert distance(result.model, mean([model], inputs, [1.0]), inputs) < 1e-5


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "resnet, padded"])
def test_copies_share_all_places(name, factor):
    build, inputs = MODELS[name]
    model = build()
    permuted = networks.permuted_copy(model, inputs)
    for order in ((model, model), (permuted, model)):
        result = fuse(order, inputs, target=Wider(factor), verify=False)
        assert num_parameters(result.model) == num_parameters(model)
        assert distance(result.model, mean([model], inputs, [1.0]), inputs) < 1e-5


def test_one_budget_serves_all_groups():
    # The networks agree in their first layer, and nowhere else.
    deep, shallow = networks.mlp(12, 16, 16, 5), networks.mlp(12, 16, 16, 5, seed=1)
    shallow[0].load_state_dict(deep[0].state_dict())
    groups = fuse(
        [deep, shallow], VECTORS, target=Wider(1.5), calibration="none"
    ).problem.target.groups
    assert [one.size for one in groups] == [16, 32]
    groups = fuse(
        [deep, shallow], VECTORS, target=Wider(1.25), calibration="none"
    ).problem.target.groups
    assert [one.size for one in groups] == [16, 24]


def test_the_wider_the_nearer():
    models = [networks.mlp(12, 20, 20, 5), networks.mlp(12, 20, 20, 20, 5, seed=1)]
    goal = mean(models, VECTORS, (0.5, 0.5))
    far = []
    for factor in (1, 1.5, 2):
        result = fuse(models, VECTORS, target=Wider(factor), verify=False)
        with torch.no_grad():
            far.append(float((result.model(VECTORS) - goal).square().mean()))
    assert far[0] > far[1] > 100 * far[2]


def test_at_the_wider_networks_width_every_channel_has_a_place():
    wide, narrow = networks.mlp(12, 20, 18, 5), networks.mlp(12, 8, 9, 11, 5, seed=1)
    result = fuse([wide, narrow], VECTORS, target=Wider(1), calibration="none", verify=False)
    parents = result.problem.parents
    for plans in zip(*(one.plans for one in parents), strict=True):
        sizes = [one.shape[0] for one in plans]
        assert plans[0].shape[1] == max(sizes)
        assert all(bool((one.row_sums > 0).all()) for one in plans)


def depthwise(width, seed):
    torch.manual_seed(seed)
    return networks.randomise(
        nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 7, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(7, 5),
        ),
        seed,
    )


def test_depthwise_convolutions_stand_side_by_side():
    models = [depthwise(8, 0), depthwise(6, 1)]
    result = fuse(models, IMAGES, target=Wider(2), calibration="none")
    assert result.model[2].groups == 14
    assert distance(result.model, mean(models, IMAGES, (0.5, 0.5)), IMAGES) < 1e-5


@pytest.mark.filterwarnings("ignore::clafusion.FusionWarning")
def test_what_cannot_have_places_of_its_own_is_told():
    models = [networks.randomise(Encoder(layers), layers) for layers in (2, 1)]
    with pytest.warns(WidthWarning) as told:
        result = fuse(models, TOKENS, target=Wider(1.5), calibration="none", verify=False)
    texts = [str(one.message) for one in told]
    assert any("they are heads, whose number is fixed" in one for one in texts)
    assert num_parameters(result.model) > num_parameters(models[0])
    for i, model in enumerate(models):
        weights = [float(i == 0), float(i == 1)]
        fused = fuse(
            models, TOKENS, weights, target=Wider(1), calibration="none", verify=False
        ).model
        assert distance(fused, mean([model], TOKENS, [1.0]), TOKENS) < 1e-4


def normed(*widths, seed):
    layers = []
    for into, out in pairwise(widths[:-1]):
        layers += [nn.Linear(into, out), nn.LayerNorm(out), nn.ReLU()]
    return networks.randomise(nn.Sequential(*layers, nn.Linear(*widths[-2:])), seed)


def test_norms_over_channels_are_told():
    models = [normed(12, 20, 16, 5, seed=0), normed(12, 14, 18, 5, seed=1)]
    with pytest.warns(WidthWarning, match=r"the norm of '1.weight' and 1 more norms spans"):
        fuse(models, VECTORS, target=Wider(1.5), calibration="none", verify=False)


@pytest.mark.filterwarnings("ignore:.*no multiple:clafusion.WidthWarning")
def test_a_module_of_fixed_widths_is_refused_and_a_template_serves():
    *models, inputs = PAIRS["resnet, padded"]
    with pytest.raises(StructureError, match=r"of 'blocks.3' \(networks.py, line \d+\)") as refused:
        fuse(models, inputs, target=Wider(1.5), verify=False)
    assert "target=Like(module)" in str(refused.value)
    assert "own_places=True" in str(refused.value)
    twice = Like(networks.resnet(3, 3, widths=(16, 32)), own_places=True)
    result = fuse(models, inputs, target=twice, verify=False)
    assert distance(result.model, mean(models, inputs, (0.5, 0.5)), inputs) < 1e-5
    more = Like(networks.resnet(3, 3, widths=(12, 24)), own_places=True)
    for i, model in enumerate(models):
        weights = [float(i == 0), float(i == 1)]
        fused = fuse(models, inputs, weights, target=more, calibration="none", verify=False).model
        assert distance(fused, mean([model], inputs, [1.0]), inputs) < 1e-5


@pytest.mark.parametrize("widths", [(6, 12), (20, 40)])
def test_a_template_has_room_for_the_wider_and_no_more_than_for_both(widths):
    *models, inputs = PAIRS["resnet, padded"]
    target = Like(networks.resnet(3, 3, widths=widths), own_places=True)
    with pytest.raises(StructureError, match="with own_places it needs 8 to 16"):
        fuse(models, inputs, target=target, verify=False)


def test_what_is_written_is_read_again(tmp_path):
    *models, inputs = WIDENED["mlp, unequal"]
    result = fuse(models, inputs, target=Wider(1.5), verify=False)
    result.save(tmp_path / "fused.safetensors")
    loaded = clafusion.load(tmp_path / "fused.safetensors")
    module = loaded if isinstance(loaded, nn.Module) else loaded.load()
    with torch.no_grad():
        assert torch.equal(module(inputs), result.model(inputs))


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        (0.8, "below 1 the wider network's channels have no place"),
        (2.5, "at 2 both networks stand side by side"),
        (float("nan"), r"must be in \[1, 2\]"),
        ("wide", r"must be in \[1, 2\]"),
    ],
)
def test_a_width_out_of_range(factor, told):
    with pytest.raises(InputError, match=told):
        Wider(factor)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"matching": Matching(solver=Zip())}, "matching.solver='zip'"),
        ({"matching": Matching(solver="orthogonal")}, "matching.solver='orthogonal'"),
        ({"matching": Matching(cost="weights")}, "matching.cost='weights'"),
        ({"matching": Matching(importance="norm")}, "matching.importance='uniform'"),
        ({"merging": "barycentre"}, "merging.strategy='barycentre'"),
        ({"merging": {"normalisation": "single"}}, "merging.normalisation='two'"),
        ({"merging": {"layer_weights": "sensitivity"}}, "merging.layer_weights='uniform'"),
    ],
)
def test_options_that_do_not_go_with_it(settings, told):
    with pytest.raises(InputError, match=told):
        FusionConfig(target=Wider(1.5), **settings)
    assert FusionConfig(target=Deeper(), **settings)


def test_three_networks_are_too_many_but_one_after_another():
    models = [networks.mlp(12, 9, 5, seed=seed) for seed in range(3)]
    joined = fuse(
        models,
        VECTORS,
        target=Wider(2.0),
        merging={"strategy": "iterative"},
        combine="logits",
        verify=False,
    )
    wanted = mean(models, VECTORS, [1 / 3] * 3)
    assert distance(joined.model, wanted, VECTORS) < 1e-5
    with pytest.raises(InputError, match="of two networks places of their own; got 3 models"):
        fuse(models, VECTORS, target="wider", verify=False)
