"""Dense blocks of other lengths are completed by layers that nothing reads."""

import pytest
import torch

from clafusion import StructureError, explain, fuse, trace
from clafusion.targets.dense_blocks import with_equal_dense_blocks
from tests.support import networks
from tests.support.dense import dense

IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def gap(model, other):
    with torch.no_grad():
        found, wanted = model(IMAGES), other(IMAGES)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def pair():
    """Return two networks, each with more layers in one of the blocks."""
    return dense(2, 4), dense(3, 2, seed=1)


def test_a_completed_network_computes_the_same(pair):
    traced = [trace(one, IMAGES[:3], verify=False) for one in pair]
    found = with_equal_dense_blocks(traced)
    for one, model in zip(found, pair, strict=True):
        assert [len(block) for block in one.model.blocks] == [3, 4]
        assert list(one.model.blocks[0]) == ["layer1", "layer2", "layer3"]
        assert gap(one.model, model) < 1e-5
    assert [len(block) for block in pair[0].blocks] == [2, 4]  # what was given stays as it is


@pytest.mark.parametrize("given", [0, 1])
def test_all_weight_on_one_network_gives_it(pair, given):
    weights = [float(i == given) for i in range(2)]
    result = fuse(pair, IMAGES, weights, calibration="none")
    assert [len(block) for block in result.model.blocks] == [3, 4]
    assert gap(result.model, pair[given]) < 1e-5


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_calibrated_results_are_finite(pair, calibration):
    fused = fuse(pair, IMAGES, calibration=calibration).model
    assert gap(fused, pair[0]) < float("inf")


def test_a_copy_with_channels_in_other_places_fuses_to_the_network(pair):
    model = pair[0]
    copy = networks.permuted_copy(model, IMAGES[:3])
    assert gap(fuse([model, copy], IMAGES, calibration="none").model, model) < 1e-5


def test_explain_knows_of_it(pair):
    assert explain(pair, IMAGES[:3], verify=False).endswith("they can be fused")


def test_blocks_whose_code_has_another_order_are_refused():
    models = dense(2, 2, in_front=True), dense(3, 2, seed=1, in_front=True)
    with pytest.raises(StructureError, match="dense blocks do: these get one length only where"):
        fuse(models, IMAGES, calibration="none")


def test_residual_blocks_are_no_dense_ones():
    models = [
        trace(networks.resnet(*stages), IMAGES[:3], verify=False) for stages in ((1, 1), (2, 1))
    ]
    assert with_equal_dense_blocks(models) == models
