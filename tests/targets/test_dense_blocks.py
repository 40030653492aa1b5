"""Dense blocks of other lengths are completed by layers that nothing reads."""

import pytest
import torch
from torch import nn

from clafusion import StructureError, explain, fuse, trace
from clafusion.targets.dense_blocks import with_equal_dense_blocks
from tests.support import networks

IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class DenseLayer(nn.Module):
    def __init__(self, width, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, growth, 3, padding=1, bias=False)

    def forward(self, parts):
        x = self.conv1(self.norm1(torch.cat(parts, 1)).relu())
        return self.conv2(self.norm2(x).relu())


class DenseBlock(nn.ModuleDict):
    """As torchvision has it: named children, all of whose outputs are put side by side."""

    def __init__(self, count, width, growth, *, in_front=False):
        super().__init__()
        self.in_front = in_front
        for i in range(count):
            self[f"layer{i + 1}"] = DenseLayer(width + i * growth, growth)

    def forward(self, x):
        parts = [x]
        for layer in self.values():
            parts = [layer(parts), *parts] if self.in_front else [*parts, layer(parts)]
        return torch.cat(parts, 1)


class DenseNet(nn.Module):
    def __init__(self, *lengths, growth=4, **options):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(DenseBlock(n, 8, growth, **options) for n in lengths)
        widths = [8 + n * growth for n in lengths]
        self.between = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 8, 1), nn.AvgPool2d(2))
            for n in widths[:-1]
        )
        self.norm, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(4 * widths[-1], 5)

    def forward(self, x):
        x = self.stem(x)
        for block, between in zip(self.blocks, [*self.between, nn.Identity()], strict=True):
            x = between(block(x))
        return self.head(nn.functional.adaptive_avg_pool2d(self.norm(x).relu(), 2).flatten(1))


def dense(*lengths, seed=0, **options):
    return networks.randomise(DenseNet(*lengths, **options), seed).eval()


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
