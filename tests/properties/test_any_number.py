"""What must hold for any number of parents, by every way to fuse them."""

import itertools
import warnings

import pytest
import torch

from clafusion import Barycentre, ConvergenceWarning, Like, fuse
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.data import CALIBRATIONS, VECTORS

NIGHTLY = pytest.mark.nightly
# Of two there are many tests elsewhere, and five take thrice as long as three.
COUNTS = [pytest.param(2, marks=NIGHTLY), 3, pytest.param(5, marks=NIGHTLY)]
STRATEGIES = ["iterative", "many_to_one", Barycentre(max_rounds=2)]
HIDDEN = [(9, 8), (9,), (9, 9, 8), (10, 8), (9, 9, 9, 9)]  # of five parents, none like another


def parents(count, equal_widths=False):
    hidden = [(9,) * len(one) for one in HIDDEN] if equal_widths else HIDDEN
    return [networks.mlp(12, *one, 5, seed=i) for i, one in enumerate(hidden[:count])]


def fused(models, weights=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fuse(models, VECTORS, weights, **settings).model


def every_way(function):
    for name, values in (
        ("calibration", CALIBRATIONS),
        ("strategy", STRATEGIES),
        ("count", COUNTS),
    ):
        function = pytest.mark.parametrize(name, values, ids=str)(function)
    return function


@every_way
def test_the_parent_with_all_the_weight_comes_back(count, strategy, calibration):
    models = parents(count, equal_widths=True)
    template = networks.mlp(12, *(9,) * 6, 5)  # deeper than any parent
    for chosen, target in itertools.product((0, count - 1), ("deeper", Like(template))):
        weights = [float(i == chosen) for i in range(count)]
        model = fused(models, weights, target=target, merging=strategy, calibration=calibration)
        assert_same_function(model, models[chosen], VECTORS, calibration)


@every_way
def test_shuffled_copies_of_one_network_come_back(count, strategy, calibration):
    model = networks.mlp(12, 10, 9, 5)
    copies = [model, *(networks.permuted_copy(model, VECTORS, i) for i in range(1, count))]
    found = fused(copies, merging=strategy, calibration=calibration)
    assert_same_function(found, model, VECTORS, calibration)


@every_way
def test_a_parent_without_weight_changes_nothing(count, strategy, calibration):
    """It may not even when it is first, where it would be asked first for whatever is shared."""
    first, second, *_ = parents(2, equal_widths=True)
    idle = [networks.mlp(12, 9, 5, seed=7 + i) for i in range(count - 2)]
    weights = [0.0] * len(idle)
    settings = {"merging": strategy, "calibration": calibration}
    wanted = fused([first, second], [0.3, 0.7], **settings)
    for models, shares in (
        ([first, second, *idle], [0.3, 0.7, *weights]),
        ([*idle, first, second], [*weights, 0.3, 0.7]),
    ):
        assert_same_function(fused(models, shares, **settings), wanted, VECTORS, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("count", COUNTS)
def test_the_order_of_the_parents_does_not_matter(count, calibration):
    models, weights = parents(count), [0.1, 0.4, 0.2, 0.3, 0.5][:count]
    wanted = fused(models, weights, calibration=calibration)
    backwards = fused(models[::-1], weights[::-1], calibration=calibration)
    assert_same_function(backwards, wanted, VECTORS, calibration)


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("count", [3])
def test_the_same_call_gives_the_same_bytes(count, strategy, calibration):
    models, settings = parents(count), {"merging": strategy, "calibration": calibration}
    one, other = (fused(models, **settings).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("width", [None, "narrow", "wide", 0])
@pytest.mark.parametrize("name", ["deeper", "shallower"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_target_has_the_shape_that_its_name_says(count, name, width):
    models = parents(count)
    depths = [len(one) for one in models]
    target = {"name": name} | ({} if width is None else {"width": width})
    model = fused(models, target=target)
    assert len(model) == (max(depths) if name == "deeper" else min(depths))
    rows = [len(one.weight) for one in model if hasattr(one, "weight")][:-1]
    everyone = [len(layer.weight) for one in models for layer in one if hasattr(layer, "weight")]
    assert all(5 <= one <= max(everyone) for one in rows)
    assert torch.isfinite(networks.output(model, VECTORS)).all()
