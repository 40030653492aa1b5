"""Layers multiplied into the next ones, against plain products of matrices."""

import pytest
import torch
from torch import nn

from clafusion import StructureError, profile, trace
from clafusion.config import MERGES
from clafusion.correspondence.correspondence import correspond
from clafusion.correspondence.structure import structured_state
from clafusion.targets.products import layer_products
from tests.support.networks import mlp, output, randomise, resnet, vgg

VECTORS = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def signs_ref(model, position, inputs, merge):
    """Return what stands for the ReLU behind a module of a chain."""
    z = output(model[: position + 1], inputs).double().movedim(1, -1).flatten(0, -2)
    if merge == "sum":
        return (z.sum(0) > 0).double()
    if merge == "majority":
        return ((z > 0).double().mean(0) > 0.5).double()
    return (z > 0).double().mean(0)


def traced(*widths, seed=0):
    return trace(mlp(*widths, seed=seed), VECTORS)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("layer_map", [(0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 4)])
def test_one_layer_goes_into_the_next(layer_map, merge):
    deep = mlp(12, 9, 8, 7, 6, 5)
    source, target = profile(deep, VECTORS), traced(12, 9, 8, 7, 5, seed=1)
    found = layer_products(target, source, layer_map, merge)
    (gone,) = set(range(5)) - set(layer_map)
    place = layer_map.index(gone + 1)
    first, second = deep[2 * gone], deep[2 * gone + 2]
    d = signs_ref(deep, 2 * gone, VECTORS, merge)
    weight = second.weight.double() @ torch.diag(d) @ first.weight.double()
    bias = second.bias.double()
    if merge != "least_squares":
        bias = bias + second.weight.double() @ torch.diag(d) @ first.bias.double()
    assert sorted(found) == [f"{2 * place}.bias", f"{2 * place}.weight"]
    torch.testing.assert_close(found[f"{2 * place}.weight"], weight.float())
    torch.testing.assert_close(found[f"{2 * place}.bias"], bias.float())


@pytest.mark.parametrize("merge", MERGES)
def test_several_layers_in_a_row_and_apart(merge):
    deep = mlp(12, 9, 8, 7, 6, 10, 11, 5)
    source, target = profile(deep, VECTORS), traced(12, 9, 8, 7, 5, seed=1)
    found = layer_products(target, source, (0, 3, 5, 6), merge)
    weights = [deep[i].weight.double() for i in range(0, 13, 2)]
    biases = [deep[i].bias.double() for i in range(0, 13, 2)]
    signs = [torch.diag(signs_ref(deep, i, VECTORS, merge)) for i in range(0, 12, 2)]

    def product(last, first):
        weight, bias = weights[last], biases[last]
        for i in reversed(range(first, last)):
            if merge != "least_squares":
                bias = bias + weight @ signs[i] @ biases[i]
            weight = weight @ signs[i] @ weights[i]
        return weight, bias

    assert sorted(found) == [f"{i}.{kind}" for i in (2, 4) for kind in ("bias", "weight")]
    for place, (last, first) in ((1, (3, 1)), (2, (5, 4))):
        weight, bias = product(last, first)
        torch.testing.assert_close(found[f"{2 * place}.weight"], weight.float())
        torch.testing.assert_close(found[f"{2 * place}.bias"], bias.float())


def test_convolutions_pass_their_centre_on():
    deep = vgg(3, 1, norm=False)
    source, target = profile(deep, IMAGES), trace(vgg(2, 1, norm=False, seed=1), IMAGES)
    found = layer_products(target, source, (0, 2, 3, 4), "least_squares")
    first, second = deep[2], deep[4]
    d = signs_ref(deep, 2, IMAGES, "average")
    centre = first.weight[:, :, 1, 1].double()
    for i in range(3):
        for j in range(3):
            expected = second.weight[:, :, i, j].double() @ torch.diag(d) @ centre
            torch.testing.assert_close(found["2.weight"][:, :, i, j], expected.float())
    assert torch.equal(found["2.bias"], second.bias)


def test_of_a_flattened_image_each_pixel_counts():
    def net(count, seed):
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
        for _ in range(count):
            layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 5)]
        return randomise(nn.Sequential(*layers), seed)

    deep = net(1, 0)
    source, target = profile(deep, IMAGES), trace(net(0, 1), IMAGES)
    found = layer_products(target, source, (0, 2), "least_squares")
    d = signs_ref(deep, 2, IMAGES, "average")
    centre = torch.diag(d) @ deep[2].weight[:, :, 1, 1].double()
    columns = deep[-1].weight.double().reshape(5, 6, 4)
    for pixel in range(4):
        expected = columns[:, :, pixel] @ centre
        (name,) = (one for one in found if one.endswith("weight"))
        block = found[name].reshape(5, 6, 4)[:, :, pixel]
        torch.testing.assert_close(block, expected.float())


def test_products_stand_in_the_sources_own_channels():
    deep = mlp(12, 9, 8, 7, 5)
    source, target = profile(deep, VECTORS), traced(12, 20, 30, 5, seed=1)
    products = layer_products(target, source, (0, 2, 3), "average")
    correspondence = correspond(target, source.traced, (0, 2, 3), products)
    assert not correspondence.uses_all_layers
    state = structured_state(correspondence)
    assert state["2.weight"].shape == (7, 9)
    assert torch.equal(state["2.weight"], products["2.weight"])
    assert torch.equal(state["0.weight"], deep[0].weight)
    assert torch.equal(state["4.weight"], deep[6].weight)


def test_blocks_are_left_out_without_a_product():
    source = profile(resnet(2, 2), IMAGES)
    target = trace(resnet(1, 1, seed=1), IMAGES)
    layer_map = (0, 1, 3, 5)
    assert layer_products(target, source, layer_map, "least_squares") == {}
    for merge in ("sum", "majority", "average"):
        with pytest.raises(StructureError, match=f"'blocks.1' is not a single .*merge='{merge}'"):
            layer_products(target, source, layer_map, merge)
    same = tuple(range(6))
    for merge in MERGES:  # nothing goes
        assert layer_products(source.traced, source, same, merge) == {}


def test_layers_that_have_nowhere_to_go_are_named():
    source, target = profile(mlp(12, 9, 8, 5, 5), VECTORS), traced(12, 9, 5, seed=1)
    for merge in MERGES:
        with pytest.raises(StructureError, match="layer '6' comes after all that are matched"):
            layer_products(target, source, (0, 2), merge)
    deep, shallow = vgg(3, 1, norm=False), vgg(2, 1, norm=False, seed=1)
    profiled, other = profile(deep, IMAGES), trace(shallow, IMAGES)
    for merge in ("sum", "majority", "average"):
        with pytest.raises(StructureError, match="is not a single linear layer"):
            layer_products(other, profiled, (0, 2, 3, 4), merge)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def test_a_block_behind_a_layer_that_goes_is_named():
    def net(count, seed):
        layers = [nn.Linear(12, 8), nn.ReLU()]
        for _ in range(count):
            layers += [nn.Linear(8, 8), nn.ReLU()]
        return randomise(nn.Sequential(*layers, Residual(8), nn.Linear(8, 5)), seed)

    source, target = profile(net(1, 0), VECTORS), trace(net(0, 1), VECTORS)
    message = "layer '2' cannot be merged into '4': '4' has 2 weight matrices.*target='deeper'"
    with pytest.raises(StructureError, match=message):
        layer_products(target, source, (0, 2, 3), "least_squares")
