"""Mixtures whose experts are modules of a list fuse in whatever order these stand."""

import pytest
import torch

from clafusion import Barycentre, fuse, naive_average, trace
from tests.support.attention import shuffled
from tests.support.mixtures import VECTORS, listed


def gap(model, other):
    with torch.no_grad():
        found, wanted = model(VECTORS), other(VECTORS)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module", params=[("one after another", 2), ("stacked", None)])
def mixtures(request):
    """Return a mixture, a copy with its experts and channels in other places, and another one."""
    sums, chosen = request.param
    model, other = (listed(sums, chosen=chosen, seed=seed) for seed in (3, 4))
    return model, shuffled(model, trace(model, VECTORS[:4])), other


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_experts_in_another_order_fuse_to_the_network(mixtures, calibration):
    model, copy, _ = mixtures
    assert gap(copy, model) < 1e-5
    result = fuse([model, copy], VECTORS, calibration=calibration)
    assert [len(one.head_orders) for one in result.parents] == [0, 1]
    assert gap(result.model, model) < 1e-4


def test_all_weight_on_one_mixture_gives_it(mixtures):
    model, _, other = mixtures
    for weights, one in (([1, 0], model), ([0, 1], other)):
        fused = fuse([model, other], VECTORS, weights, calibration="none").model
        assert gap(fused, one) < 1e-5


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_calibrations_are_finite(mixtures, calibration):
    model, _, other = mixtures
    fused = fuse([model, other], VECTORS, calibration=calibration).model
    assert gap(fused, model) < float("inf")


def test_the_naive_average_has_the_experts_in_their_own_order(mixtures):
    model, copy, _ = mixtures
    problem = fuse([model, copy], VECTORS, calibration="none").problem
    assert gap(naive_average(problem, [0, 1]), copy) < 1e-5


def test_a_barycentre_moves_experts_as_well(mixtures):
    model, copy, _ = mixtures
    strategy = {"strategy": Barycentre(max_rounds=3)}
    fused = fuse([model, copy], VECTORS, calibration="none", merging=strategy).model
    assert gap(fused, model) < 1e-4
