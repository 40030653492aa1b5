"""Parents that are copies of each other count as one, with the sum of their weights."""

import copy
from dataclasses import replace

import pytest
import torch

from clafusion import MergeWeights, Merging, fuse
from clafusion.merging.copies import without_copies
from tests.support.networks import mlp, output, permuted_copy, resnet

VECTORS = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def mlps():
    return [mlp(8, 16, 12, 4, seed=seed) for seed in (0, 1)], VECTORS


def deeper():
    return [mlp(8, 16, 16, 12, 4, seed=0), mlp(8, 20, 12, 4, seed=1)], VECTORS


def resnets():
    return [resnet(2, 2, seed=0), resnet(1, 2, seed=1)], IMAGES


def problem_of(models, data, weights, **options):
    return fuse(models, data, weights, calibration="none", **options).problem


@pytest.mark.parametrize("importance", ["uniform", "norm"])
@pytest.mark.parametrize("make", [mlps, deeper, resnets])
def test_two_copies_have_the_weight_of_both(make, importance):
    (one, other), data = make()
    options = {"matching": {"importance": importance}}
    pair = fuse([one, other], data, [0.6, 0.4], **options)
    again = copy.deepcopy(other)
    for models, weights in (
        ([one, other, again], [0.6, 0.3, 0.1]),
        ([one, again, other], [0.6, 0.1, 0.3]),
        ([other, again, one], [0.3, 0.1, 0.6]),  # the copies' structure and order of channels
        ([other, one, again], [0.3, 0.6, 0.1]),
    ):
        three = fuse(models, data, weights, **options)
        wanted = output(pair.model, data)
        bound = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(output(three.model, data), wanted, rtol=0, atol=bound)
        assert [one.weights.overall for one in three.parents] == pytest.approx(weights)


@pytest.mark.parametrize("make", [mlps, resnets])
def test_a_network_twice_is_that_network_to_the_bit(make):
    (model, _), data = make()
    fused = fuse([model, copy.deepcopy(model)], data, [0.3, 0.7]).model
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in fused.state_dict().items()
    )


def test_the_reference_stands_for_its_copies():
    (one, other), data = mlps()
    problem = problem_of([one, other, copy.deepcopy(one)], data, [0.2, 0.3, 0.5])
    merged = without_copies(problem)
    assert merged.parents[merged.reference].correspondence is (
        problem.parents[problem.reference].correspondence
    )
    assert [parent.weights.overall for parent in merged.parents] == pytest.approx([0.7, 0.3])


def test_weights_of_layers_add_up():
    (one, other), data = mlps()
    problem = problem_of([one, other, copy.deepcopy(other)], data, [0.2, 0.3, 0.5])
    name = problem.target.layers[0].parameters[0]
    parents = [
        replace(parent, weights=MergeWeights(parent.weights.overall, own))
        for parent, own in zip(problem.parents, ({name: 0.4}, {name: 0.6}, {}), strict=True)
    ]
    parents[2] = replace(parents[2], weights=MergeWeights(0.5, {name: 0.0}))
    merged = without_copies(replace(problem, parents=tuple(parents)))
    assert [round(parent.weights.of(name), 6) for parent in merged.parents] == [0.4, 0.6]
    assert [round(parent.weights.overall, 6) for parent in merged.parents] == [0.2, 0.8]


def test_what_differs_in_anything_is_no_copy():
    (one, other), data = mlps()
    changed = copy.deepcopy(one)
    with torch.no_grad():
        changed[-1].bias[0] += 1e-6
    for models in ([one, other], [one, permuted_copy(one, data, 1)], [one, changed]):
        problem = problem_of(models, data, None)
        assert without_copies(problem) is problem


def test_layer_weights_count_copies_as_one_too():
    (one, other), data = mlps()
    options = {"merging": Merging(layer_weights="sensitivity")}
    wanted = output(fuse([one, other], data, [0.6, 0.4], **options).model, data)
    three = [one, other, copy.deepcopy(other)]
    found = output(fuse(three, data, [0.6, 0.3, 0.1], **options).model, data)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
