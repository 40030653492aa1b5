"""Merging layers, and the result's widths."""

import copy

import pytest
import torch
from torch import nn

from clafusion import InputError, StructureError, fuse
from tests.networks import mlp, output, resnet, shapes

DIGITS = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("merge", ["sum", "majority", "average"])
def test_merging_by_signs_is_the_published_product(merge):
    deep, shallow = mlp(20, 16, 12, 14, 5), mlp(20, 16, 14, 5, seed=1)
    result = fuse(
        deep, shallow, DIGITS, balance="merge", merge=merge, weight=0.0, calibration="none"
    )
    (gone,) = result.alignment.unmatched
    z = output(deep[: 2 * gone + 1], DIGITS).double()
    d = {
        "sum": z.sum(0) > 0,
        "majority": (z > 0).double().mean(0) > 0.5,
        "average": (z > 0).double().mean(0),
    }[merge].double()
    before, after = deep[2 * gone], deep[2 * gone + 2]
    expected = copy.deepcopy(deep)
    merged = nn.Linear(before.in_features, after.out_features)
    merged.weight.data = (after.weight.double() * d @ before.weight.double()).float()
    merged.bias.data = (
        after.weight.double() * d @ before.bias.double() + after.bias.double()
    ).float()
    layers = list(expected)
    expected = nn.Sequential(*layers[: 2 * gone], merged, *layers[2 * gone + 3 :])
    # With all the weight on the deep network the result is its merged form, in the other's frame.
    if shapes(result.model) == shapes(expected):
        torch.testing.assert_close(output(result.model, DIGITS), output(expected, DIGITS))
    else:  # brought into other widths it is no longer the same function
        assert shapes(result.model) == shapes(shallow)


def test_merging_by_signs_is_exact_where_the_signs_never_change():
    deep = mlp(20, 16, 16, 16, 5)
    with torch.no_grad():
        for layer in (0, 2, 4):
            deep[layer].bias.fill_(40.0)  # every pre-activation is positive
    shallow = mlp(20, 16, 16, 5, seed=1)
    result = fuse(
        deep, shallow, DIGITS, balance="merge", merge="average", weight=0.0, calibration="none"
    )
    torch.testing.assert_close(
        output(result.model, DIGITS), output(deep, DIGITS), rtol=1e-4, atol=1e-3
    )


def test_the_merged_network_has_the_shallow_architecture():
    deep, shallow = resnet(2, 2, shortcut="conv"), resnet(1, 1, shortcut="conv", seed=1)
    result = fuse(deep, shallow, IMAGES, balance="merge", calibration="least_squares")
    assert shapes(result.model) == shapes(shallow)
    kept = fuse(
        deep, shallow, IMAGES, balance="merge", calibration="least_squares", weight=1.0
    ).model
    torch.testing.assert_close(output(kept, IMAGES), output(shallow, IMAGES), rtol=0, atol=1e-3)


def test_least_squares_makes_up_for_the_units_that_are_left_out():
    deep, shallow = resnet(3, 3, shortcut="conv"), resnet(1, 1, shortcut="conv", seed=1)
    wanted = output(deep, IMAGES)

    def error(calibration):
        merged = fuse(
            deep, shallow, IMAGES, balance="merge", calibration=calibration, weight=0.0
        ).model
        return float((output(merged, IMAGES) - wanted).square().mean() / wanted.var())

    assert error("least_squares") < 0.5 * error("none")


@pytest.mark.parametrize("balance", ["add", "merge"])
@pytest.mark.parametrize("width", ["first", "second", "narrow", "wide"])
@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_every_width_can_be_had_at_every_depth(balance, width, calibration):
    deep, shallow = (
        resnet(2, 2, widths=(12, 24), shortcut="conv"),
        resnet(1, 1, shortcut="conv", seed=1),
    )
    wide = {"first": True, "second": False, "narrow": False, "wide": True}[width]
    first, second = deep, shallow
    result = fuse(first, second, IMAGES, balance=balance, width=width, calibration=calibration)
    assert len(result.model.heads) == (4 if balance == "add" else 2)
    assert result.model.stem[0].out_channels == (12 if wide else 8)
    assert result.model.head.in_features == (24 if wide else 16)
    assert torch.isfinite(output(result.model, IMAGES)).all()


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_all_the_weight_on_the_narrow_network_keeps_it_in_the_deep_structure(calibration):
    deep, shallow = (
        resnet(2, 2, widths=(12, 24), shortcut="conv"),
        resnet(1, 1, shortcut="conv", seed=1),
    )
    result = fuse(deep, shallow, IMAGES, width="narrow", weight=1.0, calibration=calibration)
    torch.testing.assert_close(
        output(result.model, IMAGES), output(shallow, IMAGES), rtol=0, atol=2e-3
    )


def test_a_chain_takes_the_widths_of_either():
    deep, shallow = mlp(20, 30, 24, 28, 5), mlp(20, 10, 12, 5, seed=1)
    wide = fuse(deep, shallow, DIGITS, width="wide").model
    narrow = fuse(deep, shallow, DIGITS, width="narrow").model
    assert shapes(wide) == shapes(deep)
    assert len(shapes(narrow)) == len(shapes(deep))
    assert max(max(shape) for shape in shapes(narrow)[1:]) == 12


def test_images_of_one_channel_take_the_widths_of_either():
    def net(*widths, seed):
        layers = []
        for into, out in zip((1, *widths), widths, strict=False):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU()]
        torch.manual_seed(seed)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * widths[-1], 5)).eval()

    images = torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    deep, shallow = net(12, 12, 12, seed=0), net(4, 4, seed=1)
    result = fuse(deep, shallow, images, width="narrow", weight=1.0, calibration="none")
    assert result.model[0].out_channels == 4
    assert result.model[0].groups == 1
    torch.testing.assert_close(output(result.model, images), output(shallow, images))


def test_equal_depths_swap_roles_for_the_other_width():
    first, second = mlp(20, 30, 5), mlp(20, 10, 5, seed=1)
    for width, like in [("own", first), ("second", second), ("narrow", second), ("wide", first)]:
        result = fuse(first, second, DIGITS, width=width, weight=1.0, calibration="none")
        assert shapes(result.model) == shapes(like)
        if like is second:
            torch.testing.assert_close(output(result.model, DIGITS), output(second, DIGITS))


def test_merging_refuses_by_name():
    deep, shallow = resnet(2, 2, shortcut="conv"), resnet(1, 1, shortcut="conv", seed=1)
    with pytest.raises(StructureError, match=r"not a single linear layer.*merge='least_squares'"):
        fuse(deep, shallow, IMAGES, balance="merge", merge="sum")
    for name in ("balance", "merge", "width"):
        with pytest.raises(InputError, match=f"{name} must be one of"):
            fuse(deep, shallow, IMAGES, **{name: "other"})


def test_made_networks_are_profiled_by_the_settings_of_the_fusion():
    deep, shallow = mlp(20, 30, 24, 28, 5), mlp(20, 10, 12, 5, seed=1)
    for settings in ({"width": "narrow"}, {"balance": "merge"}):
        result = fuse(deep, shallow, DIGITS, profile_inputs=200, calibration="none", **settings)
        assert result.pair.deep.num_inputs == 200
        assert torch.isfinite(output(result.model, DIGITS)).all()
