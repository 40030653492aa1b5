"""Networks of which each is the deeper one somewhere, and results of a given architecture."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from clafusion import InputError, StructureError, align, fuse, fuse_many, fuse_models, trace
from clafusion.targets.union import placed, union_items, union_model
from tests.networks import mlp, output, randomise, resnet, shapes, vgg, widened

DIGITS = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def residual(*stages, widths=(8, 16), seed=0):
    return resnet(*stages, widths=widths, shortcut="conv", seed=seed)


# --- the union ----------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
@pytest.mark.parametrize("family", ["pad", "conv", "vgg", "no norm"])
def test_the_union_computes_what_either_parent_does(family, calibration):
    if family in ("pad", "conv"):
        first, second = resnet(3, 1, shortcut=family), resnet(1, 3, shortcut=family, seed=1)
        wanted = resnet(3, 3, shortcut=family)
    else:
        norm = family == "vgg"
        first, second = vgg(3, 1, norm=norm), vgg(1, 3, norm=norm, seed=1)
        wanted = vgg(3, 3, norm=norm)
    for weight, parent in ((0.0, first), (1.0, second)):
        result = fuse(first, second, IMAGES, weight=weight, calibration=calibration)
        assert shapes(result.model) == shapes(wanted)
        assert list(result.model.state_dict()) == list(wanted.state_dict())
        torch.testing.assert_close(
            output(result.model, IMAGES), output(parent, IMAGES), rtol=1e-4, atol=1e-4
        )
    assert (len(result.alignment.unmatched), len(result.alignment.unmatched_shallow)) == (2, 2)
    middle = fuse(first, second, IMAGES, calibration=calibration).model
    assert not torch.allclose(output(middle, IMAGES), output(first, IMAGES), atol=0.1)
    assert not torch.allclose(output(middle, IMAGES), output(second, IMAGES), atol=0.1)


def test_least_squares_brings_the_union_nearer_to_the_parents_mean():
    first, second = residual(3, 1), residual(1, 3, widths=(6, 20), seed=1)
    mean = (output(first, IMAGES) + output(second, IMAGES)) / 2

    def error(calibration):
        model = fuse(first, second, IMAGES, calibration=calibration).model
        return float((output(model, IMAGES) - mean).square().mean())

    assert error("least_squares") < 0.5 * error("repair")


def test_the_union_has_the_deep_networks_widths():
    result = fuse(vgg(3, 1), vgg(1, 3, widths=(10, 8), seed=1), IMAGES, calibration="none")
    assert shapes(result.model) == shapes(vgg(3, 3))
    assert [m.in_channels for m in result.model if isinstance(m, nn.Conv2d)] == [3, 8, 8, 8, 12, 12]
    first = residual(3, 1)
    result = fuse(first, residual(1, 3, widths=(6, 20), seed=1), IMAGES, weight=0.0)
    torch.testing.assert_close(output(result.model, IMAGES), output(first, IMAGES))


def test_a_unit_goes_behind_the_pooling_that_comes_before_it():
    first, second = vgg(2, 1, 2, widths=(8, 8, 8)), vgg(2, 2, 1, widths=(8, 8, 8), seed=1)
    result = fuse(first, second, IMAGES, weight=1.0)
    assert shapes(result.model) == shapes(vgg(2, 2, 2, widths=(8, 8, 8)))
    torch.testing.assert_close(
        output(result.model, IMAGES), output(second, IMAGES), rtol=1e-4, atol=1e-4
    )
    kinds = [type(one).__name__ for one in result.model]
    assert kinds == [type(one).__name__ for one in vgg(2, 2, 2, widths=(8, 8, 8))]


def test_units_of_one_stage_stand_together_whatever_comes_first():
    """The one network's gap is in the last stage, the other one's in the stage before."""
    for stages in [((1, 3), (2, 1)), ((2, 1), (1, 3))]:
        first, second = (vgg(*one, widths=(8, 8), seed=seed) for seed, one in enumerate(stages))
        result = fuse(first, second, IMAGES, weight=1.0)
        assert shapes(result.model) == shapes(vgg(2, 3, widths=(8, 8)))
        torch.testing.assert_close(
            output(result.model, IMAGES), output(second, IMAGES), rtol=1e-4, atol=1e-4
        )


def test_neither_parent_is_touched_and_the_bytes_repeat():
    first, second = residual(3, 1), residual(1, 3, seed=1)
    before = [copy.deepcopy(one.state_dict()) for one in (first, second)]
    once, again = (fuse(first, second, IMAGES).model.state_dict() for _ in range(2))
    for one, state in zip((first, second), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


class Loop(nn.Module):
    """Its code runs a number of blocks that it was told, not those that it holds."""

    def __init__(self, *stages: int) -> None:
        super().__init__()
        self.inside = residual(*stages)
        self.count = len(self.inside.heads)

    def forward(self, x):
        x = self.inside.stem(x)
        for i in range(self.count):
            x = self.inside.heads[i](x)
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
    with pytest.raises(StructureError, match=r"does not run what is put into it.*give into="):
        fuse(randomise(Loop(3, 1)), randomise(Loop(1, 3), 1), IMAGES)
    with pytest.raises(StructureError, match=r"in no nn.Sequential or nn.ModuleList; give into="):
        fuse(randomise(Named(True)), randomise(Named(False), 1), IMAGES)
    first, second = residual(3, 1), residual(1, 3, seed=1)
    with pytest.raises(StructureError, match="balance='merge' with width='own' is for results of"):
        fuse(first, second, IMAGES, balance="merge")
    with pytest.raises(StructureError, match="width='wide' is for results of one of them"):
        fuse(first, second, IMAGES, width="wide")
    with pytest.raises(StructureError, match="each needs gaps; they are in alignment='layer' only"):
        fuse(first, second, IMAGES, alignment="chain")
    with pytest.raises(StructureError, match=r"models\[1\] has layers for which models\[0\]"):
        fuse_models([first, second], IMAGES, method="many_to_one")
    with pytest.raises(InputError, match="into needs method='iterative'"):
        fuse_models([first, second], IMAGES, method="barycentre", into=residual(3, 3))
    (one,) = fuse_many({"a": first, "b": second}, IMAGES)
    assert "StructureError: each of the two is the deeper one somewhere" in one.error


def test_the_order_of_the_union():
    first, second = residual(3, 1), residual(1, 3, seed=1)
    pair = align(first, second, IMAGES)
    deep, shallow = pair.deep.traced, pair.shallow.traced
    items = union_items(deep, shallow, pair.alignment)
    assert sorted(one for one, _ in items if one >= 0) == list(range(6))
    assert sorted(other for _, other in items if other >= 0) == list(range(6))
    union = union_model(deep, shallow, pair.alignment)
    changes = [0.5] * 6, [0.5, 0.5, 0.5, 0.2, 0.3, 0.5]
    of_deep, of_shallow = placed(union, deep, shallow, items, changes)
    assert list(zip(of_deep, of_shallow, strict=True)) == list(items)
    # One place less: of the blocks that only one network has, that goes which does the least.
    smaller = trace(residual(3, 2), IMAGES[:3])
    of_deep, of_shallow = placed(smaller, deep, shallow, items, changes)
    left = set(range(6)) - set(of_shallow)
    only = {other for one, other in items if one < 0}
    assert left == {min(only, key=lambda other: changes[1][other])}
    assert set(of_deep) - {-1} == set(range(6))


# --- a given architecture -----------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(8, 16), (12, 40)])
@pytest.mark.parametrize("stages", [(3, 3), (4, 5)])
def test_a_larger_architecture_computes_what_the_frame_does(stages, widths):
    first, second = residual(3, 1), residual(1, 3, seed=1)
    into = residual(*stages, widths=widths, seed=2)
    before = copy.deepcopy(into.state_dict())
    result = fuse(first, second, IMAGES, into=into, weight=0.0)
    assert shapes(result.model) == shapes(into)
    torch.testing.assert_close(
        output(result.model, IMAGES), output(first, IMAGES), rtol=1e-4, atol=1e-4
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())
    other = residual(*stages, widths=widths, seed=3)  # its weights do not matter
    again = fuse(first, second, IMAGES, into=other, weight=0.0)
    torch.testing.assert_close(
        output(again.model, IMAGES), output(first, IMAGES), rtol=1e-4, atol=1e-4
    )


def test_the_network_with_the_wanted_widths_gives_the_frame():
    first, second = residual(3, 2), residual(2, 2, widths=(6, 12), seed=1)
    result = fuse(first, second, IMAGES, into=residual(3, 3, widths=(6, 12)), weight=1.0)
    torch.testing.assert_close(
        output(result.model, IMAGES), output(second, IMAGES), rtol=1e-4, atol=1e-4
    )


def test_chains_take_other_widths_and_depths():
    first, second = mlp(20, 16, 16, 12, 5), mlp(20, 14, 5, seed=1)
    into = mlp(20, 30, 30, 30, 30, 5)
    result = fuse(first, second, DIGITS, into=into, weight=0.0)
    assert shapes(result.model) == shapes(into)
    torch.testing.assert_close(
        output(result.model, DIGITS), output(first, DIGITS), rtol=1e-4, atol=1e-4
    )


def test_a_smaller_architecture_keeps_what_tells_the_most():
    """A network with every channel twice loses nothing when half of them go."""
    small, wide = vgg(2, 2), widened(vgg(2, 2), 2)
    result = fuse(wide, wide, IMAGES, into=vgg(2, 2, seed=2))
    assert shapes(result.model) == shapes(small)
    # Of other widths between the two, least squares makes the most.
    more = vgg(2, 2, widths=(10, 14))
    spared = fuse(wide, wide, IMAGES, into=more, calibration="least_squares")
    for one in (result, spared):
        gap = output(one.model, IMAGES) - output(small, IMAGES)
        assert float(gap.abs().max()) < 1e-3 * float(output(small, IMAGES).abs().max())


def test_blocks_without_a_place_are_left_out():
    first, second = residual(3, 2), residual(1, 3, seed=1)
    into = residual(2, 2, seed=2)
    result = fuse(first, second, IMAGES, into=into, calibration="least_squares")
    assert shapes(result.model) == shapes(into)
    mean = (output(first, IMAGES) + output(second, IMAGES)) / 2
    plain = fuse(first, second, IMAGES, into=into, calibration="none")
    errors = [float((output(one.model, IMAGES) - mean).square().mean()) for one in (result, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_several_models_go_into_one_architecture():
    models = [residual(3, 1), residual(1, 3, seed=1), residual(2, 2, seed=2)]
    into = residual(3, 4)
    result = fuse_models(models, IMAGES, weights=[0, 0, 1], into=into)
    assert shapes(result.model) == shapes(into)
    torch.testing.assert_close(
        output(result.model, IMAGES), output(models[2], IMAGES), rtol=1e-4, atol=1e-4
    )
    # Without it the first two become their union, which the third then joins.
    result = fuse_models(models, IMAGES, weights=[1, 0, 0])
    assert shapes(result.model) == shapes(residual(3, 3))
    torch.testing.assert_close(
        output(result.model, IMAGES), output(models[0], IMAGES), rtol=1e-4, atol=1e-4
    )


def test_refuses_what_cannot_hold_both():
    first, second = vgg(3, 1), vgg(1, 3, seed=1)
    with pytest.raises(StructureError, match="into= has 5 layers, and layer '6' of the networks"):
        fuse(first, second, IMAGES, into=vgg(2, 2))
    with pytest.raises(StructureError, match="different outputs"):
        fuse(mlp(20, 16, 16, 5), mlp(20, 16, 5), DIGITS, into=mlp(20, 16, 16, 16, 6))
    with pytest.raises(InputError, match="into: the model does not run on the example inputs"):
        fuse(mlp(20, 16, 16, 5), mlp(20, 16, 5), DIGITS, into=vgg(3, 3))
    with pytest.raises(InputError, match="into must be a module that has the wanted architecture"):
        fuse(first, second, IMAGES, into="vgg")
    with pytest.raises(InputError, match="without balance='merge'"):
        fuse(first, second, IMAGES, into=vgg(3, 3), balance="merge")
    with pytest.raises(StructureError, match="leave balance and width, which are 'add' and 'wide'"):
        fuse(first, second, IMAGES, into=vgg(3, 3), width="wide")


# --- what is shown ------------------------------------------------------------------------------


def test_the_table_and_the_picture_show_gaps_on_both_sides(tmp_path):
    result = fuse(residual(3, 1), residual(1, 3, seed=1), IMAGES)
    lines = result.summary().splitlines()
    table = lines[2 : lines.index("")]
    assert len(table) == 8 + 1  # and the total
    assert sum(line.startswith("(inserted)") for line in table) == 2
    assert sum(line.endswith("(inserted)") for line in table) == 2
    costs = [float(row.split()[-1]) for row in table if not row.endswith(")") and row[0] != "("]
    assert costs[-1] == pytest.approx(sum(costs[:-1]), abs=1e-3)
    assert "2 inserted into the shallow one, 2 into the deep one" in result.summary()
    result.plot(tmp_path / "union.png")
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
    for weight, parent in ((0.0, first), (1.0, second)):
        result = fuse(first, second, IMAGES, weight=weight, **settings)
        assert shapes(result.model) == shapes(wanted)
        torch.testing.assert_close(
            output(result.model, IMAGES), output(parent, IMAGES), rtol=1e-4, atol=1e-4
        )
    return result.model


@pytest.mark.parametrize("kind", [Body, BodyInContainer])
def test_blocks_whose_branch_is_a_container(kind):
    both_ends(body_net(2, 1, kind), body_net(1, 2, kind, seed=1), body_net(2, 2, kind))


def test_containers_in_containers_and_dropout():
    model = both_ends(nested(0, 3, 0), nested(2, 0, 1, seed=1), nested(2, 3, 1))
    assert sum(isinstance(one, nn.Dropout) for one in model.modules()) == 9
    assert type(model[2]) is nn.Dropout
    assert type(model[5]) is nn.Dropout


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_a_stage_that_one_network_lacks(calibration):
    first, second = (vgg(*one, widths=(8, 8, 8), seed=one[1]) for one in ((1, 0, 2), (1, 2, 0)))
    into = vgg(1, 2, 2, widths=(8, 8, 8))
    both_ends(first, second, into, into=into, calibration=calibration)


def test_unions_of_unions_in_a_container_with_names():
    def named(*stages, seed=0):
        layers = list(vgg(*stages, widths=(8, 8, 8), seed=seed))
        return nn.Sequential(OrderedDict((f"layer{i}", one) for i, one in enumerate(layers)))

    models = [named(1, 1, 6), named(1, 2, 1, seed=1), named(4, 1, 1, seed=2)]
    result = fuse_models(models, IMAGES, weights=[0, 0, 1])
    assert shapes(result.model) == shapes(vgg(4, 2, 6, widths=(8, 8, 8)))
    torch.testing.assert_close(
        output(result.model, IMAGES), output(models[2], IMAGES), rtol=1e-4, atol=1e-4
    )


def test_into_takes_the_models_type_and_mode():
    first, second = (one.double().train() for one in (mlp(20, 16, 16, 5), mlp(20, 14, 5, seed=1)))
    result = fuse(first, second, DIGITS.double(), into=mlp(20, 16, 16, 16, 5), weight=0.0)
    assert next(result.model.parameters()).dtype == torch.float64
    assert result.model.training
    torch.testing.assert_close(
        output(result.model, DIGITS.double()), output(first, DIGITS.double())
    )
    into = mlp(20, 16, 16, 16, 5).train()
    assert not fuse(first.eval(), second.eval(), DIGITS.double(), into=into).model.training


def test_the_union_is_as_trainable_as_the_deep_network():
    first, second = residual(3, 1), residual(1, 3, seed=1).requires_grad_(False)
    assert all(one.requires_grad for one in fuse(first, second, IMAGES).model.parameters())
    result = fuse(first.requires_grad_(False), second.requires_grad_(), IMAGES)
    assert not any(one.requires_grad for one in result.model.parameters())


def averaging(model):
    return nn.Sequential(*(nn.AvgPool2d(2) if type(m) is nn.MaxPool2d else m for m in model))


def shared(times, seed=0):
    layer = nn.Linear(8, 8)
    middle = [one for _ in range(times) for one in (layer, nn.ReLU())]
    return randomise(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), *middle, nn.Linear(8, 5)), seed)


def test_a_network_that_the_structure_changes_is_refused():
    message = "a network's outputs change by .* differ in what lies between layers"
    with pytest.raises(StructureError, match=message):
        fuse(vgg(3, 1), averaging(vgg(1, 3, seed=1)), IMAGES)
    with pytest.raises(StructureError, match=message):
        fuse(vgg(3, 3), averaging(vgg(1, 3, seed=1)), IMAGES)
    with pytest.raises(StructureError, match="or share parameters among layers"):
        fuse(shared(3), shared(2, seed=1), DIGITS)
    into = averaging(vgg(2, 1, widths=(7, 11)))
    with pytest.raises(StructureError, match=message):
        fuse(vgg(2, 1), vgg(1, 1, seed=1), IMAGES, into=into)
