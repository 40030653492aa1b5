"""Whose widths the result has, at either depth."""

import pytest
import torch
from torch import nn

from clafusion import (
    Deeper,
    FusionConfig,
    InputError,
    Profiling,
    Shallower,
    StructureError,
    align,
    fuse,
)
from clafusion.targets.sources import sources_of
from clafusion.targets.target import choose_target
from tests.support.attention import TOKENS, Encoder
from tests.support.data import CALIBRATIONS
from tests.support.networks import mlp, output, randomise, resnet, shapes

DIGITS = torch.randn(480, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))

WIDTHS = {0: True, 1: False, "narrow": False, "wide": True}  # whether it is the wide one's


@pytest.mark.parametrize("target", [Deeper, Shallower])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_every_width_can_be_had_at_every_depth(target, width, calibration):
    deep, shallow = (
        resnet(2, 2, widths=(12, 24), shortcut="conv"),
        resnet(1, 1, shortcut="conv", seed=1),
    )
    wide = WIDTHS[width]
    result = fuse([deep, shallow], IMAGES, target=target(width=width), calibration=calibration)
    assert len(result.model.blocks) == (4 if target is Deeper else 2)
    assert result.model.stem[0].out_channels == (12 if wide else 8)
    assert result.model.head.in_features == (24 if wide else 16)
    assert torch.isfinite(output(result.model, IMAGES)).all()


@pytest.mark.parametrize("target", [Deeper, Shallower])
@pytest.mark.parametrize(
    ("width", "channels"), [("own", None), (0, 10), (1, 12), (2, 8), ("narrow", 8), ("wide", 12)]
)
def test_three_networks_take_the_widths_of_any(target, width, channels):
    models = [
        resnet(2, 1, widths=(10, 20), shortcut="conv"),
        resnet(1, 1, widths=(12, 24), shortcut="conv", seed=1),
        resnet(2, 2, widths=(8, 16), shortcut="conv", seed=2),
    ]
    result = fuse(models, IMAGES, target=target(width=width), verify=False)
    channels = channels or {Deeper: 8, Shallower: 12}[target]
    assert len(result.model.blocks) == (4 if target is Deeper else 2)
    assert result.model.stem[0].out_channels == channels
    assert result.model.head.in_features == 2 * channels
    assert torch.isfinite(output(result.model, IMAGES)).all()
    if isinstance(width, int):
        by_name = dict(zip("abc", models, strict=True))
        named = fuse(by_name, IMAGES, target=target(width="abc"[width]), verify=False)
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(named.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_all_the_weight_on_the_narrow_network_keeps_it_in_the_deep_structure(calibration):
    deep, shallow = (
        resnet(2, 2, widths=(12, 24), shortcut="conv"),
        resnet(1, 1, shortcut="conv", seed=1),
    )
    for target in (Deeper(width="narrow"), Deeper(width=1)):
        result = fuse([deep, shallow], IMAGES, [0, 1], target=target, calibration=calibration)
        torch.testing.assert_close(
            output(result.model, IMAGES), output(shallow, IMAGES), rtol=0, atol=2e-3
        )


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_of_three_the_narrowest_keeps_its_function_in_the_deepest_structure(calibration):
    models = [
        resnet(2, 2, widths=(12, 24), shortcut="conv"),
        resnet(1, 2, widths=(10, 20), shortcut="conv", seed=2),
        resnet(1, 1, shortcut="conv", seed=1),
    ]
    settings = {"target": Deeper(width="narrow"), "calibration": calibration, "verify": False}
    result = fuse(models, IMAGES, [0, 0, 1], **settings)
    assert len(result.model.blocks) == 4
    torch.testing.assert_close(
        output(result.model, IMAGES), output(models[2], IMAGES), rtol=0, atol=2e-3
    )


def test_a_chain_takes_the_widths_of_either():
    deep, shallow = mlp(20, 30, 24, 28, 5), mlp(20, 10, 12, 5, seed=1)
    wide = fuse([deep, shallow], DIGITS, target=Deeper(width="wide")).model
    narrow = fuse([deep, shallow], DIGITS, target=Deeper(width="narrow")).model
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
    result = fuse(
        [deep, shallow], images, [0, 1], target=Deeper(width="narrow"), calibration="none"
    )
    assert result.model[0].out_channels == 4
    assert result.model[0].groups == 1
    torch.testing.assert_close(output(result.model, images), output(shallow, images))


def test_equal_depths_swap_roles_for_the_other_width():
    first, second = mlp(20, 30, 5), mlp(20, 10, 5, seed=1)
    for width, like in [("own", first), (1, second), ("narrow", second), ("wide", first)]:
        result = fuse(
            [first, second], DIGITS, [0, 1], target=Deeper(width=width), calibration="none"
        )
        assert shapes(result.model) == shapes(like)
        (identity,) = (one for one in result.parents if one.is_identity)
        assert identity.name == f"models[{0 if like is first else 1}]"
        if like is second:
            torch.testing.assert_close(output(result.model, DIGITS), output(second, DIGITS))


@pytest.mark.parametrize("target", [Deeper, Shallower])
def test_unknown_widths_are_refused_by_name(target):
    models = {"a": mlp(20, 30, 5), "b": mlp(20, 10, 5, seed=1)}
    message = (
        r"target.width must be 'own', 'narrow', 'wide' or a model's name or position "
        r"\(models\['a'\], models\['b'\]\); got 'other'"
    )
    with pytest.raises(InputError, match=message):
        fuse(models, DIGITS, target=target(width="other"))
    message = "target.width must be the position of a model, from 0 to 1; got "
    for wrong in (2, -1):
        with pytest.raises(InputError, match=f"{message}{wrong}"):
            fuse(models, DIGITS, target=target(width=wrong))
    for wrong in (True, 1.5, None):
        with pytest.raises(InputError, match="width must be text or a whole number; got"):
            target(width=wrong)
    with pytest.raises(InputError, match=r"target\.width must be text or a .*; got \[1\]"):
        FusionConfig(target={"name": target.name, "width": [1]})


def test_widths_that_a_module_cannot_have_are_refused():
    def encoder(heads, layers, seed=0):
        torch.manual_seed(seed)
        return randomise(Encoder(layers, heads=heads, size=3), seed).eval()

    deep, shallow = encoder(2, layers=3), encoder(4, layers=1, seed=1)
    with pytest.raises(StructureError, match=r"its module's code has 2: give target=Like\(module"):
        fuse([deep, shallow], TOKENS, target=Deeper(width="wide"))


@pytest.mark.parametrize("target", [Deeper(width="narrow"), Shallower()])
def test_made_networks_are_profiled_by_the_settings_of_the_fusion(target):
    models = [mlp(20, 30, 24, 28, 5), mlp(20, 10, 12, 5, seed=1)]
    config = FusionConfig(target=target, profiling=Profiling(inputs=200), calibration="none")
    result = fuse(models, DIGITS, config=config)
    assert [one.num_inputs for one in result.aligned.profiles] == [200, 200]
    assert [one.profile.num_inputs for one in result.parents] == [200, 200]
    aligned = align(models, DIGITS, config)
    made = sources_of(choose_target(aligned, config), aligned).profile
    assert made.num_inputs == 200
    assert made.data_key == aligned.profiles[0].data_key
    assert torch.isfinite(output(result.model, DIGITS)).all()
