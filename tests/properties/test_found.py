"""What generated networks have found: each by the smallest network that shows it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from clafusion import fuse, trace
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.attention import shuffled
from tests.support.data import CALIBRATIONS, VECTORS


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_reloaded_network_computes_the_same_to_the_bit(calibration):
    """What least squares had solved lay transposed in memory, which no file keeps."""
    models = [networks.mlp(12, 9, 8, 5, seed=seed) for seed in range(2)]
    model = fuse(models, VECTORS, calibration=calibration).model
    assert all(one.is_contiguous() for one in model.state_dict().values())
    assert save(model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = networks.mlp(12, 9, 8, 5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(networks.output(fresh, VECTORS), networks.output(model, VECTORS))


class Joined(nn.Module):
    """Branches that are joined behind a norm over channels and a ReLU, as in Inception.

    What a block reads "inside" is no output of a layer of its own.
    """

    def __init__(self, how):
        super().__init__()
        self.how = how
        widths = (8, 8, 8) if how == "sums" else (8, 9, 7)
        self.stem = nn.Linear(12, 8)
        self.branches = nn.ModuleList(nn.Linear(8, width) for width in widths)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.head = nn.Linear(8 if how == "sums" else sum(widths), 5)
        self.back = nn.Linear(sum(widths), 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        parts = [
            F.relu(norm(branch(x))) for branch, norm in zip(self.branches, self.norms, strict=True)
        ]
        if self.how == "sums":
            return self.head(parts[0] + parts[1] + parts[2])
        joined = torch.cat(parts, -1)
        return self.last(x + self.back(joined)) if self.how == "inside" else self.head(joined)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("how", ["concatenated", "sums", "inside"])
def test_channels_that_are_dead_behind_a_norm_find_each_other(how, calibration):
    """Dead ones were all alike where what joins them is read, but the norm reads them."""
    model = networks.randomise(Joined(how))
    with torch.no_grad():
        for norm in model.norms:
            norm.bias[:4] = -3.0
    data = VECTORS[:120]
    copied = networks.permuted_copy(model, data)
    found = fuse([model, copied], data, calibration=calibration).model
    assert_same_function(found, model, data, calibration)


class Twice(nn.Module):
    """One layer is applied twice."""

    def __init__(self):
        super().__init__()
        self.first, self.both, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        for _ in range(2):
            x = F.relu(self.both(x))
        return self.last(x)


def test_repair_leaves_alone_what_two_operations_read():
    """The factors of both were multiplied, and the outputs were several times too large."""
    models = [networks.randomise(Twice(), seed) for seed in range(2)]
    plain, repaired = (fuse(models, VECTORS, calibration=one).model for one in ("none", "repair"))
    assert torch.equal(repaired.both.weight, plain.both.weight)
    assert torch.equal(repaired.both.bias, plain.both.bias)
    assert not torch.equal(repaired.first.weight, plain.first.weight)
    assert not torch.equal(repaired.last.weight, plain.last.weight)
    want = sum(networks.output(one, VECTORS) for one in models) / 2
    error = (networks.output(repaired, VECTORS) - want).square().mean() / want.square().mean()
    assert error < 1.5


class Mirrored(nn.Module):
    """Some residual-free blocks read one weight twice, the second time transposed."""

    def __init__(self, blocks):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.linear(F.relu(block(x)), block.weight.t())
        return self.head(x)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_an_inserted_weight_that_two_operations_read_stays_an_identity(calibration):
    """Least squares solved it for one of them."""
    models = [networks.randomise(Mirrored(1), 1), networks.randomise(Mirrored(0), 2)]
    data = VECTORS[:90]
    found = fuse(models, data, [0.0, 1.0], calibration=calibration).model
    assert_same_function(found, models[1], data, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_channels_that_are_dead_before_a_norm_find_themselves(norm, calibration):
    """Behind one over all channels each is correlated with all, else each is a constant."""
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), norm(8), nn.Linear(8, 5))
    model = networks.randomise(model)
    with torch.no_grad():
        model[0].bias[2:6] = -30.0
    for other in (copy.deepcopy(model), networks.permuted_copy(model, VECTORS)):
        found = fuse([other, model], VECTORS, calibration=calibration).model
        assert_same_function(found, model, VECTORS, calibration)


class SharedKeys(nn.Module):
    """Queries share keys and values, and the heads are positions of what the softmax joins."""

    def __init__(self, heads=3, size=4):
        super().__init__()
        self.heads, self.size = heads, size
        self.stem, self.queries = nn.Linear(6, 8), nn.Linear(8, heads * size)
        self.keys, self.values = nn.Linear(8, size), nn.Linear(8, size)
        self.last, self.head = nn.Linear(heads * size, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        queries = self.queries(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        keys, values = (one(x)[:, None] for one in (self.keys, self.values))
        mixed = (queries @ keys.mT).softmax(-1) @ values
        return self.head((x + self.last(mixed.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_queries_change_places_where_heads_are_positions(calibration):
    """What was sampled of the queries before they moved was compared with other heads."""
    model = networks.randomise(SharedKeys())
    data = torch.randn(80, 5, 6, generator=torch.Generator().manual_seed(0))
    traced = trace(model, data)
    assert [one.is_shared for one in traced.heads] == [True]
    moved = shuffled(model, traced)
    found = fuse([moved, model], data, calibration=calibration).model
    assert_same_function(found, model, data, calibration)
