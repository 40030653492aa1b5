"""Mixtures with other numbers of experts get as many where that changes nothing."""

import pytest
import torch

from clafusion import StructureError, explain, fuse, trace
from clafusion.targets.equal_experts import with_equal_experts
from tests.support import families, networks
from tests.support.mixtures import VECTORS, listed


def gap(model, other):
    with torch.no_grad():
        found, wanted = model(VECTORS), other(VECTORS)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def pair():
    return listed(count=5), listed(count=3, seed=1)


def test_copies_of_experts_divide_their_shares(pair):
    many, few = (trace(one, VECTORS[:4], verify=False) for one in pair)
    same, completed = with_equal_experts([many, few])
    assert same is many
    assert len(completed.model.experts) == 5
    assert len(pair[1].experts) == 3  # what was given stays as it is
    assert gap(completed.model, pair[1]) < 1e-5
    bias, own = completed.model.router.bias, pair[1].router.bias
    expected = own[[0, 1, 2, 0, 1]] - torch.tensor([2.0, 2.0, 1.0, 2.0, 2.0]).log()
    torch.testing.assert_close(bias, expected)


@pytest.mark.parametrize("given", [0, 1])
def test_all_weight_on_one_mixture_gives_it(pair, given):
    weights = [float(i == given) for i in range(2)]
    result = fuse(pair, VECTORS, weights, calibration="none")
    assert len(result.model.experts) == 5
    assert gap(result.model, pair[given]) < 1e-5


def test_a_copy_in_other_places_fuses_to_the_mixture(pair):
    copy = networks.permuted_copy(pair[1], VECTORS[:4])
    assert gap(fuse([pair[1], copy], VECTORS, calibration="none").model, pair[1]) < 1e-5


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_calibrated_results_are_finite(pair, calibration):
    fused = fuse(pair, VECTORS, calibration=calibration).model
    assert gap(fused, pair[0]) < float("inf")


def test_explain_knows_of_it(pair):
    assert explain(pair, VECTORS[:4], verify=False).endswith("they can be fused")


def test_where_a_router_chooses_twice_as_many_of_twice_as_many_experts_copies_change_nothing():
    pair = listed(count=6, chosen=4), listed(count=3, chosen=2, seed=1)
    _, completed = with_equal_experts([trace(one, VECTORS[:4], verify=False) for one in pair])
    assert (len(completed.model.experts), completed.model.chosen) == (6, 4)
    assert (len(pair[1].experts), pair[1].chosen) == (3, 2)
    for weights, model in (([1, 0], pair[0]), ([0, 1], pair[1])):
        assert gap(fuse(pair, VECTORS, weights, calibration="none").model, model) < 1e-5


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_in_one_tensor_may_be_other_multiples(kind):
    pair = families.stacked(kind, 6, 4), families.stacked(kind, 3, 2, seed=1)
    fused = fuse(pair, [families.TEXT], [0, 1], calibration="none", example_inputs=families.TEXT)
    with torch.no_grad():
        found, wanted = fused.model(*families.TEXT), pair[1](*families.TEXT)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_where_few_are_chosen_nothing_is_added():
    models = [listed(count=5, chosen=2), listed(count=3, chosen=2, seed=1)]
    with pytest.raises(StructureError, match="has no counterpart of its structure"):
        fuse(models, VECTORS, calibration="none")
