"""Results of a given architecture: a module of the caller's."""

import copy

import pytest
import torch
from torch import nn

from clafusion import (
    FusionConfig,
    InputError,
    LeastSquares,
    Like,
    StructureError,
    fuse,
)
from tests.support.data import CALIBRATIONS
from tests.support.networks import mlp, output, resnet, shapes, vgg, widened

DIGITS = torch.randn(480, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def residual(*stages, widths=(8, 16), seed=0):
    return resnet(*stages, widths=widths, shortcut="conv", seed=seed)


def assert_computes(result, model, inputs=IMAGES):
    torch.testing.assert_close(
        output(result.model, inputs), output(model, inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("widths", [(8, 16), (12, 40)])
@pytest.mark.parametrize("stages", [(3, 3), pytest.param((4, 5), marks=pytest.mark.nightly)])
def test_a_larger_architecture_computes_what_the_first_does(stages, widths):
    models = [residual(3, 1), residual(1, 3, seed=1)]
    template = residual(*stages, widths=widths, seed=2)
    before = copy.deepcopy(template.state_dict())
    result = fuse(models, IMAGES, [1, 0], target=Like(template))
    assert shapes(result.model) == shapes(template)
    assert_computes(result, models[0])
    assert all(torch.equal(one, before[name]) for name, one in template.state_dict().items())
    other = residual(*stages, widths=widths, seed=3)  # its weights do not matter
    again = fuse(models, IMAGES, [1, 0], target=Like(other))
    assert_computes(again, models[0])


def test_the_network_with_the_wanted_widths_gives_the_channels():
    models = [residual(3, 2), residual(2, 2, widths=(6, 12), seed=1)]
    result = fuse(models, IMAGES, [0, 1], target=Like(residual(3, 3, widths=(6, 12))))
    assert_computes(result, models[1])


def test_chains_take_other_widths_and_depths():
    models = [mlp(20, 16, 16, 12, 5), mlp(20, 14, 5, seed=1)]
    template = mlp(20, 30, 30, 30, 30, 5)
    result = fuse(models, DIGITS, [1, 0], target=Like(template))
    assert shapes(result.model) == shapes(template)
    assert_computes(result, models[0], DIGITS)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_smaller_architecture_keeps_what_tells_the_most(count):
    """A network with every channel twice loses nothing when half of them go."""
    small, wide = vgg(2, 2), widened(vgg(2, 2), 2)
    result = fuse([wide] * count, IMAGES, target=Like(vgg(2, 2, seed=2)))
    assert shapes(result.model) == shapes(small)
    # Of other widths between the two, least squares makes the most.
    more = vgg(2, 2, widths=(10, 14))
    spared = fuse([wide] * count, IMAGES, target=Like(more), calibration="least_squares")
    for one in (result, spared):
        gap = output(one.model, IMAGES) - output(small, IMAGES)
        assert float(gap.abs().max()) < 1e-3 * float(output(small, IMAGES).abs().max())


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_blocks_without_a_place_are_left_out(count):
    models = [residual(3, 2), residual(1, 3, seed=1), residual(2, 3, seed=3)][:count]
    template = residual(2, 2, seed=2)
    result = fuse(models, IMAGES, target=Like(template), calibration="least_squares")
    assert shapes(result.model) == shapes(template)
    mean = sum(output(one, IMAGES) for one in models) / count
    plain = fuse(models, IMAGES, target=Like(template), calibration="none")
    errors = [float((output(one.model, IMAGES) - mean).square().mean()) for one in (result, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::clafusion.ConvergenceWarning")  # see test_union.py
@pytest.mark.parametrize("strategy", ["many_to_one", "iterative", "barycentre"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_three_models_go_into_one_architecture(strategy, position):
    models = [residual(3, 1), residual(1, 3, seed=1), residual(2, 2, seed=2)]
    template = residual(3, 4)
    weights = [float(i == position) for i in range(3)]
    result = fuse(models, IMAGES, weights, target=Like(template), merging=strategy, verify=False)
    assert shapes(result.model) == shapes(template)
    assert_computes(result, models[position])
    # Without it they become their union.
    result = fuse(models, IMAGES, weights, merging=strategy, verify=False)
    assert shapes(result.model) == shapes(residual(3, 3))
    assert_computes(result, models[position])


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_three_chains_go_into_one_that_is_wider_and_deeper(calibration):
    models = [mlp(20, 16, 16, 12, 5), mlp(20, 14, 5, seed=1), mlp(20, 9, 11, 5, seed=2)]
    template = mlp(20, 20, 20, 20, 20, 5)
    result = fuse(models, DIGITS, [1, 0, 0], target=Like(template), calibration=calibration)
    assert shapes(result.model) == shapes(template)
    wanted = output(models[0], DIGITS)
    torch.testing.assert_close(output(result.model, DIGITS), wanted, rtol=1e-3, atol=1e-3)
    mixed = fuse(models, DIGITS, target=Like(template), calibration=calibration)
    assert torch.isfinite(output(mixed.model, DIGITS)).all()


def test_refuses_what_cannot_hold_all():
    first, second, third = vgg(3, 1), vgg(1, 3, seed=1), vgg(1, 1, seed=2)
    for models in ([first, second], [first, second, third]):
        message = "target.template has 5 layers, and layer '6' of the networks"
        with pytest.raises(StructureError, match=message):
            fuse(models, IMAGES, target=Like(vgg(2, 2)))
    chains = [mlp(20, 16, 16, 5), mlp(20, 16, 5)]
    message = r"different outputs: target.template \('batch', 6\) .* and models\[0\] \('batch', 5\)"
    with pytest.raises(StructureError, match=message) as refused:
        fuse(chains, DIGITS, target=Like(mlp(20, 16, 16, 16, 6)))
    assert "outputs='both'" not in str(refused.value)  # a template has no classes of its own
    message = r"target\.template: the model does not run on the example inputs"
    with pytest.raises(InputError, match=message):
        fuse(chains, DIGITS, target=Like(vgg(3, 3)))
    message = r"target\.template must be a torch.nn.Module of the wanted structure; got 'vgg'"
    with pytest.raises(InputError, match=message):
        fuse([first, second], IMAGES, target=Like("vgg"))
    with pytest.raises(InputError, match=r"target\.template must be a torch.nn.Module"):
        fuse([first, second], IMAGES, target="like")
    with pytest.raises(InputError, match=r"template must be text or a torch\.nn\.Module; got 3"):
        Like(3)
    # A template has widths and a depth: neither is asked for beside it.
    for name, value in (("merge", "sum"), ("width", "wide")):
        with pytest.raises(InputError, match=f"target has no option '{name}'"):
            FusionConfig(target={"name": "like", "template": vgg(3, 3), name: value})


def averaging(model):
    return nn.Sequential(*(nn.AvgPool2d(2) if type(m) is nn.MaxPool2d else m for m in model))


def test_a_network_that_the_template_changes_is_refused():
    message = "outputs change by .*: between its layers lies max_pool2d.* result avg_pool2d"
    template = averaging(vgg(2, 1, widths=(7, 11)))
    with pytest.raises(StructureError, match=message):
        fuse([vgg(2, 1), vgg(1, 1, seed=1)], IMAGES, target=Like(template))


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_stage_that_one_network_lacks(calibration):
    models = [vgg(*one, widths=(8, 8, 8), seed=one[1]) for one in ((1, 0, 2), (1, 2, 0))]
    template = vgg(1, 2, 2, widths=(8, 8, 8))
    for weights, parent in (([1, 0], models[0]), ([0, 1], models[1])):
        result = fuse(models, IMAGES, weights, target=Like(template), calibration=calibration)
        assert shapes(result.model) == shapes(template)
        assert_computes(result, parent)


def test_the_result_has_the_models_type_and_mode():
    data = DIGITS.double()
    models = [one.double().train() for one in (mlp(20, 16, 16, 5), mlp(20, 14, 5, seed=1))]
    result = fuse(models, data, [1, 0], target=Like(mlp(20, 16, 16, 16, 5)))
    assert next(result.model.parameters()).dtype == torch.float64
    assert result.model.training
    torch.testing.assert_close(output(result.model, data), output(models[0], data))
    template = mlp(20, 16, 16, 16, 5).train()
    result = fuse([one.eval() for one in models], data, target=Like(template))
    assert not result.model.training


def test_an_anchor_of_the_template_is_a_parent():
    models = [residual(2, 1), residual(1, 2, seed=1)]
    template = residual(2, 2, seed=2)
    calibration = LeastSquares(anchor=1.0)
    result = fuse(models, IMAGES, [0.3, 0.7], target=Like(template), calibration=calibration)
    assert result.anchor == 1.0
    assert [one.overall for one in (p.weights for p in result.parents)] == [0.3, 0.7]
    assert torch.isfinite(output(result.model, IMAGES)).all()
