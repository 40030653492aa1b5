"""Fusing more than two networks."""

import warnings

import pytest
import torch
from torch import nn

from clafusion import (
    ConvergenceWarning,
    InputError,
    StructureError,
    fuse,
    fuse_models,
    trace,
)
from tests import networks
from tests.networks import mlp, resnet, vgg

VECTORS = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = ["iterative", "many_to_one", "barycentre"]


def output(model, inputs):
    with torch.no_grad():
        return model(inputs)


def permuted(model, inputs, seed):
    """Return a copy whose channels stand in another order."""
    graph = trace(model, inputs)
    return networks.permuted(model, graph, networks.orders_of(graph, seed))


@pytest.mark.parametrize("method", METHODS)
def test_models_that_differ_between_their_units_are_refused(method):
    def chain(pooling, count):
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
        for _ in range(count):
            layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, pooling, nn.Flatten(), nn.Linear(96, 5)).eval()

    models = [chain(nn.MaxPool2d(2), 2), chain(nn.AvgPool2d(2), 1)]
    with pytest.raises(StructureError, match="differ in what lies between layers"):
        fuse_models(models, IMAGES, method=method)


def test_two_models_are_what_fuse_makes_of_them():
    first, second = mlp(12, 9, 9, 5), mlp(12, 10, 5, seed=1)
    result = fuse_models([first, second], VECTORS, weights=[3, 1], calibration="repair")
    expected = fuse(first, second, VECTORS, weight=0.25, calibration="repair").model
    for one, other in zip(result.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert result.weights == (0.75, 0.25)


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
@pytest.mark.parametrize("method", METHODS)
def test_permuted_copies_fuse_to_the_original(method, calibration):
    model = mlp(12, 10, 9, 5)
    models = [model, *(permuted(model, VECTORS, seed) for seed in (1, 2))]
    result = fuse_models(models, VECTORS, method=method, calibration=calibration)
    torch.testing.assert_close(
        output(result.model, VECTORS), output(model, VECTORS), rtol=0, atol=1e-4
    )
    assert result.converged


@pytest.mark.parametrize("method", ["many_to_one", "barycentre"])
@pytest.mark.parametrize("calibration", ["none", "least_squares"])
@pytest.mark.parametrize("chosen", [0, 1, 2])
@pytest.mark.parametrize("family", ["resnet", "vgg", "mlp"])
def test_all_the_weight_on_one_model_keeps_its_function(method, calibration, chosen, family):
    models, inputs = {
        "resnet": ([resnet(1, 1), resnet(2, 2, seed=1), resnet(1, 2, seed=2)], IMAGES),
        "vgg": ([vgg(1, 1), vgg(2, 2, seed=1), vgg(1, 2, seed=2)], IMAGES),
        "mlp": ([mlp(12, 9, 5), mlp(12, 9, 9, 9, 5, seed=1), mlp(12, 9, 9, 5, seed=2)], VECTORS),
    }[family]
    weights = [float(i == chosen) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = fuse_models(
            models, inputs, method=method, weights=weights, calibration=calibration, max_rounds=3
        )
    wanted = output(models[chosen], inputs)
    bound = 1e-3 * float(wanted.abs().max())
    torch.testing.assert_close(output(result.model, inputs), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("method", METHODS)
def test_three_depths_give_the_deepest_architecture(method):
    models = [resnet(1, 1), resnet(2, 2, seed=1), resnet(1, 2, seed=2)]
    result = fuse_models(models, IMAGES, method=method)
    shapes = [tuple(one.shape) for one in result.model.parameters()]
    assert shapes == [tuple(one.shape) for one in models[1].parameters()]
    assert torch.isfinite(output(result.model, IMAGES)).all()
    assert len(result.pairs) == len(result.plans) == 2


def test_repair_of_many_is_the_two_model_one_for_two():
    first, second = mlp(12, 9, 9, 5), mlp(12, 10, 5, seed=1)
    data = [VECTORS]  # over several batches the mean of deviations is not quite the same
    both = fuse_models([first, second], data, method="many_to_one", weights=[0.3, 0.7]).model
    pair = fuse(first, second, data, weight=0.7).model
    torch.testing.assert_close(output(both, VECTORS), output(pair, VECTORS), rtol=0, atol=1e-4)


def test_least_squares_of_many_is_the_two_model_one_for_two():
    first, second = resnet(2, 1), resnet(1, 1, seed=1)
    settings = {"calibration": "least_squares"}
    both = fuse_models(
        [first, second], IMAGES, method="many_to_one", weights=[0.4, 0.6], **settings
    )
    pair = fuse(first, second, IMAGES, weight=0.6, **settings)
    wanted = output(pair.model, IMAGES)
    bound = 1e-3 * float(wanted.abs().max())
    torch.testing.assert_close(output(both.model, IMAGES), wanted, rtol=0, atol=bound)
    assert both.leans == (pair.lean,)


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
    for method in ("many_to_one", "barycentre"):
        found = {
            calibration: accuracy(
                fuse_models(
                    models, train[0], method=method, calibration=calibration, verify=False
                ).model
            )
            for calibration in ("repair", "least_squares")
        }
        assert found["least_squares"] >= found["repair"] + least, (method, found)
        assert found["least_squares"] >= sum(parents) / 3 - 0.03, (method, found, parents)


def test_refusals_by_name():
    models = [mlp(12, 9, 5), mlp(12, 9, 5, seed=1)]
    for arguments, message in [
        ({"models": models[:1]}, "at least two"),
        ({"models": models[0]}, "at least two"),
        ({"weights": [1.0]}, "one entry a model: 2; got 1"),
        ({"weights": [1.0, -1.0]}, "weights must not be negative"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"method": "other"}, "method must be one of"),
        ({"max_rounds": 0}, "max_rounds must be a positive"),
        ({"weight": 0.5}, "give weights"),
        ({"wieght": 0.5}, "settings must be those of fuse.*wieght"),
        ({"method": "barycentre", "balance": "merge"}, "balance='merge' needs method='iterative'"),
    ]:
        given = {"models": models, **arguments}
        with pytest.raises(InputError, match=message):
            fuse_models(given.pop("models"), VECTORS, **given)


def test_a_barycentre_that_is_not_at_rest_says_so():
    models = [mlp(12, 9, 9, 5), mlp(12, 9, 5, seed=1), mlp(12, 9, 5, seed=2)]
    with pytest.warns(ConvergenceWarning, match="still changed after 1 rounds"):
        result = fuse_models(models, VECTORS, method="barycentre", max_rounds=1)
    assert not result.converged
