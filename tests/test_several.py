"""Fusing more than two networks."""

import pytest
import torch

from clafusion import (
    ConvergenceWarning,
    InputError,
    fuse,
    fuse_models,
    permute_channels,
    trace,
)
from tests.networks import mlp, resnet

VECTORS = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = ["iterative", "many_to_one", "barycentre"]


def output(model, inputs):
    with torch.no_grad():
        return model(inputs)


def permuted(model, inputs, seed):
    """Return a copy whose channels stand in another order."""
    graph = trace(model, inputs)
    draw = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(one.size, generator=draw) for one in graph.classes]
    state = permute_channels(graph.state(), graph.classes, orders)
    copy = mlp(12, 10, 9, 5)
    copy.load_state_dict(state)
    return copy


def test_two_models_are_what_fuse_makes_of_them():
    first, second = mlp(12, 9, 9, 5), mlp(12, 10, 5, seed=1)
    result = fuse_models([first, second], VECTORS, weights=[3, 1], calibration="repair")
    expected = fuse(first, second, VECTORS, weight=0.25, calibration="repair").model
    for one, other in zip(result.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert result.weights == (0.75, 0.25)


@pytest.mark.parametrize("calibration", ["none", "repair"])
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
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_all_the_weight_on_one_model_keeps_its_function(method, chosen):
    models = [resnet(1, 1), resnet(2, 2, seed=1), resnet(1, 2, seed=2)]
    weights = [float(i == chosen) for i in range(3)]
    result = fuse_models(
        models, IMAGES, method=method, weights=weights, calibration="none", max_rounds=3
    )
    torch.testing.assert_close(
        output(result.model, IMAGES), output(models[chosen], IMAGES), rtol=0, atol=1e-3
    )


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
        ({"method": "barycentre", "calibration": "least_squares"}, "needs method='iterative'"),
    ]:
        given = {"models": models, **arguments}
        with pytest.raises(InputError, match=message):
            fuse_models(given.pop("models"), VECTORS, **given)


def test_a_barycentre_that_is_not_at_rest_says_so():
    models = [mlp(12, 9, 9, 5), mlp(12, 9, 5, seed=1), mlp(12, 9, 5, seed=2)]
    with pytest.warns(ConvergenceWarning, match="still changed after 1 rounds"):
        result = fuse_models(models, VECTORS, method="barycentre", max_rounds=1)
    assert not result.converged
