"""Fusing any number of networks, in whatever order they are averaged."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from clafusion import (
    Barycentre,
    ConvergenceWarning,
    FusionConfig,
    InputError,
    StructureError,
    align,
    fuse,
)
from clafusion.fusion import fuse_aligned
from tests.support.data import CALIBRATIONS
from tests.support.networks import mlp, output, permuted_copy, resnet, vgg

VECTORS = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STRATEGIES = ["iterative", "many_to_one", "barycentre"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_models_that_differ_between_their_layers_are_refused(strategy):
    def chain(pooling, count):
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
        for _ in range(count):
            layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, pooling, nn.Flatten(), nn.Linear(96, 5)).eval()

    models = [chain(nn.MaxPool2d(2), 2), chain(nn.AvgPool2d(2), 1)]
    for given in (models, [models[0], *models]):
        with pytest.raises(StructureError, match="between its layers lies"):
            fuse(given, IMAGES, merging=strategy)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_of_two_models_all_strategies_but_the_barycentre_are_the_same(calibration):
    first, second = mlp(12, 9, 9, 5), mlp(12, 10, 5, seed=1)
    settings = {"calibration": calibration}
    expected = fuse([first, second], VECTORS, [0.75, 0.25], **settings)
    for weights in ([3, 1], (0.75, 0.25)):
        for strategy in ("iterative", "many_to_one"):
            result = fuse([first, second], VECTORS, weights, merging=strategy, **settings)
            for one, other in zip(
                result.model.parameters(), expected.model.parameters(), strict=True
            ):
                assert torch.equal(one, other)
            assert result.weights == (0.75, 0.25)
            assert result.anchor == expected.anchor


def test_a_mapping_gives_names_and_takes_weights_by_them():
    models = {"r20": mlp(12, 9, 9, 5), "r32": mlp(12, 10, 5, seed=1), "r44": mlp(12, 8, 5, seed=2)}
    expected = fuse(list(models.values()), VECTORS, [3, 1, 4])
    for weights in ({"r44": 4, "r20": 3, "r32": 1}, [3, 1, 4]):
        result = fuse(models, VECTORS, weights)
        for one, other in zip(result.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert result.weights == (0.375, 0.125, 0.5)
        assert [one.name for one in result.parents] == list(result.aligned.names) == list(models)
    assert [one.name for one in expected.parents] == ["models[0]", "models[1]", "models[2]"]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_permuted_copies_fuse_to_the_original(strategy, calibration):
    model = mlp(12, 10, 9, 5)
    models = [model, *(permuted_copy(model, VECTORS, seed) for seed in (1, 2))]
    result = fuse(models, VECTORS, merging=strategy, calibration=calibration)
    torch.testing.assert_close(
        output(result.model, VECTORS), output(model, VECTORS), rtol=0, atol=1e-4
    )
    assert result.converged


@pytest.mark.parametrize(
    ("strategy", "calibration"),
    [
        ("iterative", "repair"),
        ("many_to_one", "none"),
        ("many_to_one", "repair"),
        ("many_to_one", "least_squares"),
        (Barycentre(max_rounds=3), "none"),
        (Barycentre(max_rounds=3), "least_squares"),
    ],
)
@pytest.mark.parametrize("chosen", [0, 1, 2])
@pytest.mark.parametrize(
    "family", ["resnet", pytest.param("vgg", marks=pytest.mark.nightly), "mlp"]
)
def test_all_the_weight_on_one_model_keeps_its_function(strategy, calibration, chosen, family):
    models, inputs = {
        "resnet": ([resnet(1, 1), resnet(2, 2, seed=1), resnet(1, 2, seed=2)], IMAGES),
        "vgg": ([vgg(1, 1), vgg(2, 2, seed=1), vgg(1, 2, seed=2)], IMAGES),
        "mlp": ([mlp(12, 9, 5), mlp(12, 9, 9, 9, 5, seed=1), mlp(12, 9, 9, 5, seed=2)], VECTORS),
    }[family]
    weights = [float(i == chosen) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = fuse(
            models, inputs, weights, merging={"strategy": strategy}, calibration=calibration
        )
    wanted = output(models[chosen], inputs)
    bound = 1e-3 * float(wanted.abs().max())
    torch.testing.assert_close(output(result.model, inputs), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_three_depths_give_the_deepest_architecture(strategy):
    models = [resnet(1, 1), resnet(2, 2, seed=1), resnet(1, 2, seed=2)]
    result = fuse(models, IMAGES, merging=strategy)
    shapes = [tuple(one.shape) for one in result.model.parameters()]
    assert shapes == [tuple(one.shape) for one in models[1].parameters()]
    assert torch.isfinite(output(result.model, IMAGES)).all()
    assert result.weights == (1 / 3,) * 3
    if strategy == "iterative":
        assert [[one.name for one in step.parents] for step in result.steps] == [
            ["models[0]", "models[1]"],
            ["models[0]+models[1]", "models[2]"],
        ]
    else:
        assert result.steps == ()
        assert len(result.parents) == len(result.aligned.alignments) == 3
        assert len(result.aligned.pairs) == 2
        assert result.aligned.reference == 1
        assert result.aligned.alignments[1] is None
        with pytest.raises(InputError, match="3 models have 2 alignments"):
            _ = result.alignment


@pytest.mark.parametrize("calibration", ["none", "repair"])
@pytest.mark.parametrize("family", ["mlp", "resnet"])
def test_the_weight_of_a_parent_may_be_split_over_copies_of_it(calibration, family):
    data = [VECTORS] if family == "mlp" else [IMAGES]
    first, second = (
        (mlp(12, 9, 9, 5), mlp(12, 10, 5, seed=1))
        if family == "mlp"
        else (resnet(2, 1), resnet(1, 1, seed=1))
    )
    settings = {"calibration": calibration}
    pair = fuse([first, second], data, [0.3, 0.7], **settings).model
    for models, weights in [
        ([first, second, second], [0.3, 0.3, 0.4]),
        ([second, first, second, first, second], [0.3, 0.1, 0.2, 0.2, 0.2]),
    ]:
        result = fuse(models, data, weights, **settings)
        wanted = output(pair, data[0])
        bound = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(output(result.model, data[0]), wanted, rtol=0, atol=bound)


def vectors(count, seed):
    """Return inputs and labels by a network of fixed weights."""
    fixed = torch.Generator().manual_seed(5)
    into, out = torch.randn(12, 16, generator=fixed), torch.randn(16, 5, generator=fixed)
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    return x, ((x @ into / 3).relu() @ out).argmax(1)


def images(count, seed):
    """Return noisy images of five classes, of two patterns each, and their labels."""
    patterns = torch.randn(5, 2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=draw)
    pattern = torch.randint(2, (count,), generator=draw)
    noise = 2.0 * torch.randn(count, 3, 8, 8, generator=draw)
    return patterns[labels, pattern] + noise, labels


def trained(model, x, y, seed):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(150):
        rows = torch.randint(len(x), (128,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("data", "make", "least"),
    [
        (vectors, lambda: [mlp(12, 32, 32, 5), mlp(12, 32, 32, 32, 5), mlp(12, 40, 5)], 0.01),
        (images, lambda: [resnet(1, 1), resnet(2, 2), resnet(1, 2)], 0.2),
    ],
)
def test_of_trained_networks_least_squares_keeps_more_than_repair(data, make, least):
    train, (test, labels) = data(1500, 0), data(1500, 1)
    models = [trained(model, *train, seed) for seed, model in enumerate(make())]

    def accuracy(model):
        return float((output(model, test).argmax(1) == labels).double().mean())

    parents = [accuracy(model) for model in models]
    for strategy in ("many_to_one", "barycentre"):
        found = {
            calibration: accuracy(
                fuse(
                    models, train[0], merging=strategy, calibration=calibration, verify=False
                ).model
            )
            for calibration in ("repair", "least_squares")
        }
        assert found["least_squares"] >= found["repair"] + least, (strategy, found)
        assert found["least_squares"] >= sum(parents) / 3 - 0.03, (strategy, found, parents)


def test_refusals_by_name():
    models = [mlp(12, 9, 5), mlp(12, 9, 5, seed=1)]
    for arguments, message in [
        ({"models": models[:1]}, "at least two"),
        ({"models": models[0]}, "at least two"),
        ({"models": {"one": models[0]}}, "at least two networks; got 1"),
        ({"models": 3}, "models must be a list or a mapping of at least two networks; got int"),
        (
            {"models": {1: models[0], 2: models[1]}},
            "a name must be text on one line; got 1",
        ),
        (
            {"models": {"": models[0], "b": models[1]}},
            "a name must be text on one line; got ''",
        ),
        (
            {"models": [models[0], None]},
            r"models\[1\] must be a torch\.nn\.Module or a clafusion\.ModelFile; got NoneType",
        ),
        ({"models": {"a": models[0], "b": "b.pt"}}, r"models\['b'\] must be a torch\.nn\.Module"),
        ({"weights": [1.0]}, "weights must have one entry for each model, 2; got 1"),
        ({"weights": [1.0, 1.0, 1.0]}, "weights must have one entry for each model, 2; got 3"),
        ({"weights": [1.0, -1.0]}, r"weights\[1\] must be a number of at least 0; got -1.0"),
        ({"weights": [1.0, float("nan")]}, r"weights\[1\] must be a number of at least 0; got nan"),
        ({"weights": [float("inf"), 1.0]}, r"weights\[0\] must be a number of at least 0; got inf"),
        ({"weights": [0.0, 0.0]}, "weights must not be all 0"),
        ({"weights": torch.ones(2, 2)}, "weights must be a list of numbers"),
        ({"merging": "other"}, r"merging\.strategy must be one of"),
        (
            {"merging": {"strategy": {"name": "barycentre", "max_rounds": 0}}},
            r"merging\.strategy\.max_rounds must be a whole number of at least 1; got 0",
        ),
        ({"weight": 0.5}, "'weight' is no option; did you mean 'weights'?"),
        ({"wieght": 0.5}, "'wieght' is no option; did you mean 'weights'?"),
        ({"method": "barycentre"}, "'method' is no option"),
    ]:
        given = {"models": models, **arguments}
        with pytest.raises(InputError, match=message):
            fuse(given.pop("models"), VECTORS, **given)


def test_any_numbers_may_be_weights_also_huge_ones():
    models = [mlp(12, 9, 5), mlp(12, 9, 5, seed=1)]
    for weights in (np.array([1, 3]), torch.tensor([1.0, 3.0]), [np.float32(1), np.int64(3)]):
        assert fuse(models, VECTORS, weights).weights == (0.25, 0.75)
    assert fuse(models, VECTORS, [1e308, 1e308]).weights == (0.5, 0.5)


def test_aligned_models_are_not_fused_one_after_another():
    models = [mlp(12, 9, 5, seed=i) for i in range(3)]
    aligned = align(models, VECTORS)
    with pytest.raises(InputError, match=r"these 3 are aligned already: call clafusion\.fuse"):
        fuse_aligned(aligned, VECTORS, config=FusionConfig(merging="iterative"))


def test_a_model_with_the_name_of_a_width_is_given_by_its_position():
    models = {"narrow": mlp(12, 9, 5), "b": mlp(12, 6, 5, seed=1)}
    with pytest.raises(InputError, match="also the name of a model: give the model's position, 0"):
        fuse(models, VECTORS, target={"name": "deeper", "width": "narrow"})
    result = fuse(models, VECTORS, target={"name": "deeper", "width": 1})
    assert result.model[0].out_features == 6


def test_a_mapping_of_weights_names_every_model_and_no_other():
    models = {"a": mlp(12, 9, 5), "b": mlp(12, 9, 5, seed=1), "c": mlp(12, 9, 5, seed=2)}
    for weights, message in [
        ({"a": 1.0, "b": 1.0}, "weights must have one entry for each model; none for 'c'"),
        ({"a": 1.0, "b": 1.0, "d": 1.0}, "weights must have one entry for each model; unknown 'd'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0, 0: 1.0}, "one entry for each model; unknown 0"),
        ({"a": 1.0, "b": -2.0, "c": 1.0}, r"weights\['b'\] must be a number of at least 0"),
    ]:
        with pytest.raises(InputError, match=message):
            fuse(models, VECTORS, weights)
    with pytest.raises(InputError, match="unknown 'a'"):
        fuse(list(models.values()), VECTORS, {"a": 1.0, "b": 1.0, "c": 1.0})


def test_a_model_may_have_the_name_of_a_step():
    models = {"a": mlp(12, 9, 5), "b": mlp(12, 9, 5, seed=1), "a+b": mlp(12, 8, 5, seed=2)}
    result = fuse(models, VECTORS, merging="iterative")
    assert [step.aligned.names for step in result.steps] == [("a", "b"), ("(a+b)", "a+b")]
    wanted = fuse(list(models.values()), VECTORS, merging="iterative").model
    for one, other in zip(result.model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_errors_name_the_model_as_the_caller_did(strategy):
    good, broken = mlp(12, 9, 5), mlp(12, 9, 5, seed=1)
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.inf
    other = mlp(12, 9, 5, activation=nn.GELU)
    for models, error, message in [
        ([good, good, broken], InputError, r"models\[2\]: parameter '2.weight' holds 1"),
        ({"r20": good, "r32": good, "r44": broken}, InputError, r"models\['r44'\]: parameter"),
        ([good, good, mlp(12, 9, 6)], StructureError, r"models\[2\] \('batch', 6\)"),
        ({"a": good, "b": good, "r20": mlp(12, 9, 6)}, StructureError, r"models\['r20'\] \('batch"),
        ([good, other, good], StructureError, r"layer '0' of models\[1\] has no counterpart"),
        (
            {"r20": good, "r32": other, "r44": good},
            StructureError,
            r"layer '0' of models\['r32'\] has no counterpart .* in models\['r20'\]",
        ),
    ]:
        with pytest.raises(error, match=message):
            fuse(models, VECTORS, merging=strategy)


def test_a_barycentre_that_is_not_at_rest_says_so():
    models = [mlp(12, 9, 9, 5), mlp(12, 9, 5, seed=1), mlp(12, 9, 5, seed=2)]
    with pytest.warns(ConvergenceWarning, match="not at rest after 1 round"):
        result = fuse(models, VECTORS, merging={"strategy": Barycentre(max_rounds=1)})
    assert not result.converged


def test_all_parents_together_are_the_measure_however_they_are_averaged():
    def sure_of(seed, *classes):
        model = mlp(12, 16, 4, seed=seed)
        with torch.no_grad():
            model[-1].bias[list(classes)] += 6
        return model

    models = [sure_of(0, 0, 1), sure_of(1, 2, 3), mlp(12, 16, 4, seed=2)]
    found = [fuse(models, VECTORS, merging=strategy, calibration="none") for strategy in STRATEGIES]
    assert found[0].steps[-1].combination.means == "logits"
    for one in found:
        assert one.combination == found[1].combination
        assert one.combination.means == "probabilities"
        assert one.assessment.parents == found[1].assessment.parents
