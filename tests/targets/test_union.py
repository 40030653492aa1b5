"""Networks of which each is the deeper one somewhere: their union."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import clafusion
from clafusion import Alignment, Deeper, Merging, StructureError, fuse, trace
from tests.support.data import CALIBRATIONS
from tests.support.networks import mlp, output, randomise, resnet, shapes, vgg

DIGITS = torch.randn(480, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def residual(*stages, widths=(8, 16), seed=0):
    return resnet(*stages, widths=widths, shortcut="conv", seed=seed)


def assert_computes(result, model, inputs=IMAGES, **tolerance):
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output(result.model, inputs), output(model, inputs), **tolerance)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize(
    "family",
    [
        "pad",
        pytest.param("conv", marks=pytest.mark.nightly),
        "vgg",
        pytest.param("no norm", marks=pytest.mark.nightly),
    ],
)
def test_the_union_computes_what_either_parent_does(family, calibration):
    if family in ("pad", "conv"):
        first, second = resnet(3, 1, shortcut=family), resnet(1, 3, shortcut=family, seed=1)
        wanted = resnet(3, 3, shortcut=family)
    else:
        norm = family == "vgg"
        first, second = vgg(3, 1, norm=norm), vgg(1, 3, norm=norm, seed=1)
        wanted = vgg(3, 3, norm=norm)
    for weights, parent in (([1, 0], first), ([0, 1], second)):
        result = fuse([first, second], IMAGES, weights, calibration=calibration)
        assert shapes(result.model) == shapes(wanted)
        assert list(result.model.state_dict()) == list(wanted.state_dict())
        assert_computes(result, parent)
    assert (len(result.alignment.unmatched), len(result.alignment.unmatched_shallow)) == (2, 2)
    middle = fuse([first, second], IMAGES, calibration=calibration).model
    assert not torch.allclose(output(middle, IMAGES), output(first, IMAGES), atol=0.1)
    assert not torch.allclose(output(middle, IMAGES), output(second, IMAGES), atol=0.1)


def test_least_squares_brings_the_union_nearer_to_the_parents_mean():
    first, second = residual(3, 1), residual(1, 3, widths=(6, 20), seed=1)
    mean = (output(first, IMAGES) + output(second, IMAGES)) / 2

    def error(calibration):
        model = fuse([first, second], IMAGES, calibration=calibration).model
        return float((output(model, IMAGES) - mean).square().mean())

    assert error("least_squares") < 0.5 * error("repair")


def test_the_union_has_the_deep_networks_widths():
    result = fuse([vgg(3, 1), vgg(1, 3, widths=(10, 8), seed=1)], IMAGES, calibration="none")
    assert shapes(result.model) == shapes(vgg(3, 3))
    assert [m.in_channels for m in result.model if isinstance(m, nn.Conv2d)] == [3, 8, 8, 8, 12, 12]
    first = residual(3, 1)
    result = fuse([first, residual(1, 3, widths=(6, 20), seed=1)], IMAGES, [1, 0])
    torch.testing.assert_close(output(result.model, IMAGES), output(first, IMAGES))


def test_a_layer_goes_behind_the_pooling_that_comes_before_it():
    first, second = vgg(2, 1, 2, widths=(8, 8, 8)), vgg(2, 2, 1, widths=(8, 8, 8), seed=1)
    result = fuse([first, second], IMAGES, [0, 1])
    assert shapes(result.model) == shapes(vgg(2, 2, 2, widths=(8, 8, 8)))
    assert_computes(result, second)
    kinds = [type(one).__name__ for one in result.model]
    assert kinds == [type(one).__name__ for one in vgg(2, 2, 2, widths=(8, 8, 8))]


@pytest.mark.nightly
def test_layers_of_one_stage_stand_together_whatever_comes_first():
    """The one network's gap is in the last stage, the other one's in the stage before."""
    for stages in [((1, 3), (2, 1)), ((2, 1), (1, 3))]:
        first, second = (vgg(*one, widths=(8, 8), seed=seed) for seed, one in enumerate(stages))
        result = fuse([first, second], IMAGES, [0, 1])
        assert shapes(result.model) == shapes(vgg(2, 3, widths=(8, 8)))
        assert_computes(result, second)


@pytest.mark.nightly
def test_no_parent_is_touched_and_the_bytes_repeat():
    models = [residual(3, 1), residual(1, 3, seed=1), residual(2, 2, seed=2)]
    for given in (models[:2], models):
        before = [copy.deepcopy(one.state_dict()) for one in given]
        once, again = (fuse(given, IMAGES).model.state_dict() for _ in range(2))
        for one, state in zip(given, before, strict=True):
            assert all(
                torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items()
            )
        assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


# --- three and more -----------------------------------------------------------------------------


# What one network alone does not decide, in blocks that it lacks, the others need not agree on.
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::clafusion.ConvergenceWarning")
@pytest.mark.parametrize("strategy", ["many_to_one", "iterative", "barycentre"])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_the_union_of_three_computes_what_each_does(strategy, calibration):
    models = [residual(3, 1), residual(1, 3, seed=1), residual(2, 2, seed=2)]
    for i, model in enumerate(models):
        weights = [float(i == j) for j in range(3)]
        result = fuse(
            models, IMAGES, weights, merging=strategy, calibration=calibration, verify=False
        )
        assert shapes(result.model) == shapes(residual(3, 3))
        assert_computes(result, model, rtol=1e-3, atol=1e-3)


@pytest.mark.nightly
def test_three_networks_each_of_which_has_a_stage_of_its_own():
    def named(*stages, seed=0):
        layers = list(vgg(*stages, widths=(8, 8, 8), seed=seed))
        return nn.Sequential(OrderedDict((f"layer{i}", one) for i, one in enumerate(layers)))

    models = [named(1, 1, 6), named(1, 2, 1, seed=1), named(4, 1, 1, seed=2)]
    for strategy in ("many_to_one", "iterative"):
        for i, model in enumerate(models):
            weights = [float(i == j) for j in range(3)]
            result = fuse(models, IMAGES, weights, merging=strategy)
            assert shapes(result.model) == shapes(vgg(4, 2, 6, widths=(8, 8, 8)))
            assert_computes(result, model)


def test_a_block_that_two_of_three_have_is_their_mean():
    """Inside it the third does not count, and what it writes is a part of the sum by two."""
    models = [residual(3, 1), residual(3, 1, seed=1), residual(1, 1, seed=2)]
    result = fuse(models, IMAGES, [0.5, 0.25, 0.25], calibration="none")
    third = result.parents[2].correspondence
    lacking = [
        layer for layer, k in zip(third.target.layers, third.layer_map, strict=True) if k < 0
    ]
    assert len(lacking) == 2
    states = [one.state() for one in result.parents]
    found = result.model.state_dict()
    for layer in lacking:
        for name in layer.parameters:
            if not found[name].is_floating_point():
                continue
            first, second = (one[name].double() for one in states[:2])
            if name in layer.last_write:
                assert third.origins[name] == "zero_residual"
                expected = 0.5 * first + 0.25 * second
            else:
                assert third.origins[name] == "target_only"
                assert name not in states[2]
                expected = (2 * first + second) / 3
            torch.testing.assert_close(found[name], expected.float(), rtol=1e-5, atol=1e-6)


# --- what cannot be built -----------------------------------------------------------------------


class Loop(nn.Module):
    """Its code runs a number of blocks that it was told, not those that it holds."""

    def __init__(self, *stages: int) -> None:
        super().__init__()
        self.inside = residual(*stages)
        self.count = len(self.inside.blocks)

    def forward(self, x):
        x = self.inside.stem(x)
        for i in range(self.count):
            x = self.inside.blocks[i](x)
        return self.inside.head(x.mean((2, 3)))


class Named(nn.Module):
    """Layers that are in no container."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1) if deep else nn.Identity()
        self.pool = nn.MaxPool2d(2)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.fourth = nn.Identity() if deep else nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.deep = deep

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x)) if self.deep else x
        x = torch.relu(self.third(self.pool(x)))
        x = x if self.deep else torch.relu(self.fourth(x))
        return self.head(x.mean((2, 3)))


def test_what_cannot_be_built_is_refused_with_advice():
    message = r"does not run what is put into it.*give target=Like\("
    with pytest.raises(StructureError, match=message):
        fuse([randomise(Loop(3, 1)), randomise(Loop(1, 3), 1)], IMAGES)
    message = r"in no nn.Sequential or nn.ModuleList; give target=Like\("
    with pytest.raises(StructureError, match=message):
        fuse([randomise(Named(True)), randomise(Named(False), 1)], IMAGES)
    first, second = residual(3, 1), residual(1, 3, seed=1)
    for models in ([first, second], [first, second, residual(2, 2, seed=2)]):
        message = r"target='shallower' with width='own' is for results of .*Like\("
        with pytest.raises(StructureError, match=message):
            fuse(models, IMAGES, target="shallower")
        message = r"target='deeper' with width='wide' is for results of one of them.*Like\("
        with pytest.raises(StructureError, match=message):
            fuse(models, IMAGES, target=Deeper(width="wide"))
        message = r"models\[0\] and models\[1\] are each .*alignment.mode='layer' only.*='chain'"
        with pytest.raises(StructureError, match=message):
            fuse(models, IMAGES, alignment=Alignment(mode="chain"))


@pytest.mark.parametrize("strategy", ["many_to_one", "iterative", "barycentre"])
def test_no_order_of_averaging_needs_one_network_to_be_the_deepest(strategy):
    models = [residual(3, 1), residual(1, 3, seed=1)]
    result = fuse(models, IMAGES, merging=Merging(strategy=strategy))
    assert shapes(result.model) == shapes(residual(3, 3))
    assert torch.isfinite(output(result.model, IMAGES)).all()


def test_a_pair_of_many_whose_union_no_factory_builds_is_refused():
    models = {"a": residual(3, 1), "b": residual(1, 3, seed=1)}
    (one,) = clafusion.fuse_pairs(models, IMAGES)
    assert "models['a'] and models['b'] are each the deeper one somewhere" in one.error


# --- what is shown ------------------------------------------------------------------------------


@pytest.mark.nightly
def test_the_table_and_the_picture_show_gaps_on_both_sides(tmp_path):
    result = fuse([residual(3, 1), residual(1, 3, seed=1)], IMAGES)
    shown = clafusion.summary(result)
    lines = shown.splitlines()
    table = lines[2 : lines.index("")]
    assert len(table) == 8 + 1  # and the total
    assert sum(line.startswith("(inserted)") for line in table) == 2
    assert sum(line.count("(inserted)") for line in table) == 4
    assert "total" in table[-1]
    clafusion.plot(result, tmp_path / "union.png")
    assert (tmp_path / "union.png").stat().st_size > 10_000
    assert trace(result.model, IMAGES[:3]).layers[-1].name == "head"


# --- architectures that are harder to put together ----------------------------------------------


class Body(nn.Module):
    """A residual block whose branch is itself a container."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x):
        return x + self.body(x)


class BodyInContainer(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def body_net(first, second, kind, seed=0):
    def block(width):
        return Body(width) if kind is Body else BodyInContainer(*Body(width).body)

    layers = [nn.Conv2d(3, 6, 3, padding=1), *(block(6) for _ in range(first)), nn.ReLU()]
    layers += [nn.Conv2d(6, 8, 3, 2, 1), *(block(8) for _ in range(second)), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return randomise(nn.Sequential(*layers, *head), seed)


def nested(root, inner, last, seed=0):
    def stage(into, out, more):
        layers = [nn.Conv2d(into, out, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)]
        for _ in range(more):
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)]
        return layers

    layers = stage(3, 6, root)
    layers += [nn.MaxPool2d(2), nn.Sequential(*stage(6, 8, inner))]
    layers += [nn.MaxPool2d(2), nn.Sequential(*stage(8, 8, last))]
    return randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5)), seed)


def both_ends(first, second, wanted, **settings):
    for weights, parent in (([1, 0], first), ([0, 1], second)):
        result = fuse([first, second], IMAGES, weights, **settings)
        assert shapes(result.model) == shapes(wanted)
        assert_computes(result, parent)
    return result.model


@pytest.mark.parametrize("kind", [Body, BodyInContainer])
def test_blocks_whose_branch_is_a_container(kind):
    both_ends(body_net(2, 1, kind), body_net(1, 2, kind, seed=1), body_net(2, 2, kind))


def test_containers_in_containers_and_dropout():
    model = both_ends(nested(0, 3, 0), nested(2, 0, 1, seed=1), nested(2, 3, 1))
    assert sum(isinstance(one, nn.Dropout) for one in model.modules()) == 9
    assert type(model[2]) is nn.Dropout
    assert type(model[5]) is nn.Dropout


def test_the_union_is_as_trainable_as_the_deep_network():
    first, second = residual(3, 1), residual(1, 3, seed=1).requires_grad_(False)
    assert all(one.requires_grad for one in fuse([first, second], IMAGES).model.parameters())
    result = fuse([first.requires_grad_(False), second.requires_grad_()], IMAGES)
    assert not any(one.requires_grad for one in result.model.parameters())


def averaging(model):
    return nn.Sequential(*(nn.AvgPool2d(2) if type(m) is nn.MaxPool2d else m for m in model))


def shared(times, seed=0):
    layer = nn.Linear(8, 8)
    middle = [one for _ in range(times) for one in (layer, nn.ReLU())]
    return randomise(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), *middle, nn.Linear(8, 5)), seed)


def test_a_network_that_the_structure_changes_is_refused():
    message = "outputs change by .*: between its layers lies avg_pool2d.* result max_pool2d"
    with pytest.raises(StructureError, match=message):
        fuse([vgg(3, 1), averaging(vgg(1, 3, seed=1))], IMAGES)
    with pytest.raises(StructureError, match=message):
        fuse([vgg(3, 3), averaging(vgg(1, 3, seed=1))], IMAGES)
    with pytest.raises(StructureError, match=message):
        fuse([vgg(3, 3), vgg(2, 2, seed=2), averaging(vgg(1, 3, seed=1))], IMAGES)
    with pytest.raises(StructureError, match="the depth is a count"):
        fuse([shared(3), shared(2, seed=1)], DIGITS)
    assert shapes(fuse([mlp(20, 8, 8, 5), mlp(20, 8, 5, seed=1)], DIGITS).model)
