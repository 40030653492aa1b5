"""Results as shallow as the shallowest: layers that go, by signs or by least squares."""

import copy

import pytest
import torch
from torch import nn

from clafusion import (
    Alignment,
    FusionConfig,
    InputError,
    LeastSquares,
    Shallower,
    StructureError,
    fuse,
)
from clafusion.config import MERGES
from clafusion.merging.mean import average
from tests.support.data import CALIBRATIONS
from tests.support.networks import mlp, output, resnet, shapes

DIGITS = torch.randn(480, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def signs_ref(z, merge):
    """Return what stands for a layer's ReLU in the product, from its pre-activations."""
    z = z.double()
    if merge == "sum":
        return (z.sum(0) > 0).double()
    if merge == "majority":
        return ((z > 0).double().mean(0) > 0.5).double()
    return (z > 0).double().mean(0)


def merged_ref(model, gone, merge):
    """Return a chain of linear layers with one of them multiplied into the next."""
    layers = list(copy.deepcopy(model))
    before, after = layers[2 * gone], layers[2 * gone + 2]
    d = signs_ref(output(model[: 2 * gone + 1], DIGITS), merge)
    merged = nn.Linear(before.in_features, after.out_features)
    merged.weight.data = (after.weight.double() * d @ before.weight.double()).float()
    bias = after.bias.double()
    if merge != "least_squares":  # which gives no bias: the regression finds one
        bias = after.weight.double() * d @ before.bias.double() + bias
    merged.bias.data = bias.float()
    return nn.Sequential(*layers[: 2 * gone], merged, *layers[2 * gone + 3 :])


@pytest.mark.parametrize("merge", MERGES)
def test_merging_is_the_published_product(merge):
    deep, shallow = mlp(20, 14, 14, 14, 5), mlp(20, 14, 14, 5, seed=1)
    result = fuse(
        [deep, shallow], DIGITS, [1, 0], target=Shallower(merge=merge), calibration="none"
    )
    (gone,) = result.alignment.unmatched
    expected = merged_ref(deep, gone, merge)
    # With all the weight on the deep network the result is its merged form, in the other's
    # channels, of which there are as many.
    assert shapes(result.model) == shapes(expected) == shapes(shallow)
    torch.testing.assert_close(output(result.model, DIGITS), output(expected, DIGITS))


@pytest.mark.parametrize("merge", MERGES)
def test_nothing_is_regressed_unless_the_calibration_is(merge):
    """What averaging gives is the mean of the products, whatever the option says of the layers."""
    deep, shallow = mlp(20, 16, 12, 14, 5), mlp(20, 18, 13, 5, seed=1)
    weights = [0.7, 0.3]
    result = fuse(
        [deep, shallow], DIGITS, weights, target=Shallower(merge=merge), calibration="none"
    )
    (gone,) = result.alignment.unmatched
    merged = merged_ref(deep, gone, merge)
    moved, kept = result.parents
    assert kept.is_identity
    plans = [plan.dense() for plan in moved.plans]
    names = [one.name for one in moved.correspondence.target.groups]
    assert names == ["0.weight", "2.weight"]
    first, second = plans
    into = [torch.eye(20).double(), first / first.sum(1, True), second / second.sum(1, True)]
    out = [first / first.sum(0), second / second.sum(0), torch.eye(5).double()]
    for index in range(3):
        layer, own, found = (one[2 * index] for one in (merged, shallow, result.model))
        expected = out[index].T @ layer.weight.double() @ into[index]
        mean = weights[0] * expected + weights[1] * own.weight.double()
        torch.testing.assert_close(found.weight, mean.float(), rtol=1e-5, atol=1e-6)
        mean = weights[0] * out[index].T @ layer.bias.double() + weights[1] * own.bias.double()
        torch.testing.assert_close(found.bias, mean.float(), rtol=1e-5, atol=1e-6)
    state = average(result.problem)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_blocks_are_left_out_and_nothing_else_changes():
    """With all the weight on the deep network its other blocks are its own."""
    deep, shallow = resnet(2, 2, shortcut="conv"), resnet(1, 1, shortcut="conv", seed=1)
    result = fuse([deep, shallow], IMAGES, [1, 0], target="shallower", calibration="none")
    expected = copy.deepcopy(deep)
    kept = [one for one, _ in result.alignment.pairs]
    blocks = [one - 1 for one in kept if 0 < one < 5]
    assert len(blocks) == 2
    expected.blocks = nn.Sequential(*(expected.blocks[one] for one in blocks))
    assert shapes(result.model) == shapes(expected)
    torch.testing.assert_close(
        output(result.model, IMAGES), output(expected, IMAGES), rtol=1e-4, atol=1e-4
    )


def test_merging_by_signs_is_exact_where_the_signs_never_change():
    deep = mlp(20, 16, 16, 16, 5)
    with torch.no_grad():
        for layer in (0, 2, 4):
            deep[layer].bias.fill_(40.0)  # every pre-activation is positive
    shallow = mlp(20, 16, 16, 5, seed=1)
    for merge in ("sum", "majority", "average"):
        result = fuse(
            [deep, shallow], DIGITS, [1, 0], target=Shallower(merge=merge), calibration="none"
        )
        torch.testing.assert_close(
            output(result.model, DIGITS), output(deep, DIGITS), rtol=1e-4, atol=1e-3
        )


def test_the_merged_network_has_the_shallow_architecture():
    deep, shallow = resnet(2, 2, shortcut="conv"), resnet(1, 1, shortcut="conv", seed=1)
    result = fuse([deep, shallow], IMAGES, target="shallower", calibration="least_squares")
    assert shapes(result.model) == shapes(shallow)
    kept = fuse(
        [deep, shallow], IMAGES, [0, 1], target="shallower", calibration="least_squares"
    ).model
    torch.testing.assert_close(output(kept, IMAGES), output(shallow, IMAGES), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*alone has weight:clafusion.WidthWarning")
@pytest.mark.parametrize("kind", ["blocks", "chain"])
def test_least_squares_makes_up_for_the_layers_that_are_left_out(kind):
    if kind == "blocks":
        deep, shallow = resnet(3, 3, shortcut="conv"), resnet(1, 1, shortcut="conv", seed=1)
        inputs = IMAGES
    else:
        deep, shallow = mlp(20, 16, 12, 14, 5), mlp(20, 16, 14, 5, seed=1)
        inputs = DIGITS
    wanted = output(deep, inputs)

    def error(calibration):
        merged = fuse(
            [deep, shallow], inputs, [1, 0], target="shallower", calibration=calibration
        ).model
        return float((output(merged, inputs) - wanted).square().mean() / wanted.var())

    assert error("least_squares") < 0.5 * error("none")


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_three_networks_become_as_shallow_as_the_shallowest(merge, calibration):
    models = [mlp(20, 16, 12, 14, 5), mlp(20, 11, 9, 5, seed=1), mlp(20, 15, 16, 13, 12, 5, seed=2)]
    target = Shallower(merge=merge)
    result = fuse(models, DIGITS, target=target, calibration=calibration)
    assert shapes(result.model) == shapes(models[1])
    assert torch.isfinite(output(result.model, DIGITS)).all()
    kept = fuse(models, DIGITS, [0, 1, 0], target=target, calibration=calibration).model
    torch.testing.assert_close(
        output(kept, DIGITS), output(models[1], DIGITS), rtol=1e-3, atol=1e-3
    )


def test_what_each_of_three_gives_is_its_own_product():
    models = [mlp(20, 9, 9, 9, 5), mlp(20, 9, 9, 5, seed=1), mlp(20, 9, 9, 9, 5, seed=2)]
    target = Shallower(merge="average")
    pinned = Alignment(pin_ends=True)
    for i, weights in ((0, [1, 0, 0]), (2, [0, 0, 1])):
        settings = {"target": target, "alignment": pinned, "calibration": "none"}
        result = fuse(models, DIGITS, weights, **settings)
        pair = fuse([models[i], models[1]], DIGITS, [1, 0], **settings)
        for name, tensor in pair.model.state_dict().items():
            assert torch.equal(result.model.state_dict()[name], tensor), name
        (gone,) = result.aligned.alignments[i].alignment.unmatched
        expected = merged_ref(models[i], gone, "average")
        assert shapes(expected) == shapes(models[1])
        torch.testing.assert_close(output(result.model, DIGITS), output(expected, DIGITS))


def test_merging_refuses_by_name():
    deep, shallow = resnet(2, 2, shortcut="conv"), resnet(1, 1, shortcut="conv", seed=1)
    for merge in ("sum", "majority", "average"):
        message = rf"not a single linear layer.*merge='{merge}'.*merge='least_squares'"
        with pytest.raises(StructureError, match=message):
            fuse([deep, shallow], IMAGES, target=Shallower(merge=merge))
        with pytest.raises(StructureError, match=message):
            fuse([deep, shallow, shallow], IMAGES, target=Shallower(merge=merge))
    with pytest.raises(InputError, match="target must be one of 'deeper', 'shallower'"):
        fuse([deep, shallow], IMAGES, target="other")
    with pytest.raises(InputError, match="merge must be one of 'least_squares', 'sum'"):
        Shallower(merge="other")
    with pytest.raises(InputError, match=r"target\.merge must be one of 'least_squares', 'sum'"):
        FusionConfig(target={"name": "shallower", "merge": "other"})
    with pytest.raises(InputError, match=r"'merge' is no option of its own; it is target\.merge"):
        fuse([deep, shallow], IMAGES, merge="sum")


def test_a_bias_needs_a_place_to_go_by_signs_alone():
    deep, shallow = mlp(20, 16, 12, 14, 5), mlp(20, 16, 14, 5, seed=1)
    for model in (deep, shallow):
        model[-1].bias = None
    models, last = [deep, shallow], Alignment(mode="chain")  # the last hidden layer goes
    message = "layer '6' has no bias to take over that of '4'.*merge='sum'; use merge='least_sq"
    with pytest.raises(StructureError, match=message):
        fuse(models, DIGITS, target=Shallower(merge="sum"), alignment=last)
    result = fuse(models, DIGITS, target=Shallower(), alignment=last)
    assert result.alignment.unmatched == (2,)
    assert shapes(result.model) == shapes(shallow)


@pytest.mark.parametrize("anchor", [0.0, "auto"])
def test_the_regression_starts_at_the_product_and_comes_nearer(anchor):
    deep, shallow = mlp(20, 16, 12, 14, 5), mlp(20, 16, 14, 5, seed=1)
    mean = (output(deep, DIGITS) + output(shallow, DIGITS)) / 2

    def error(calibration):
        model = fuse([deep, shallow], DIGITS, target="shallower", calibration=calibration).model
        return float((output(model, DIGITS) - mean).square().mean())

    assert error(LeastSquares(anchor=anchor)) < 0.5 * error("none")
    assert error(LeastSquares(anchor=anchor)) < 0.5 * error("repair")
