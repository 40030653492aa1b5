"""Channels that could change places, but that the analysis loses, are told."""

import copy
import warnings

import pytest
import torch
from torch import nn

from clafusion import PinnedWarning, fuse, summary, trace
from clafusion.cli.facts import model_facts
from tests.support.assertions import assert_same_function

IMAGES = torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(40, 7, 6, generator=torch.Generator().manual_seed(1))


class Bilinear(nn.Module):
    """Products of all pairs of channels."""

    data = IMAGES

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(64, 5)

    def forward(self, x):
        x = self.first(x).relu().flatten(2)
        return self.head((x @ x.mT).flatten(1) / 9)

    def permute(self, order):
        permute_rows(self.first, order)
        self.head.weight.data = self.head.weight.view(5, 8, 8)[:, order][:, :, order].flatten(1)


class Attention(nn.Module):
    """Queries, keys and values of several heads, and what reads them."""

    data = WORDS

    def __init__(self, heads=1):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(6, 12)
        self.query, self.key, self.value = (nn.Linear(12, 8) for _ in range(3))
        self.out, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.embed(x).relu()
        parts = (one(x) for one in (self.query, self.key, self.value))
        mixed = self.mix(*(one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in parts))
        return self.head((x + self.out(mixed.transpose(1, 2).flatten(2))).mean(1))


class BetweenChannels(Attention):
    """Attention whose scores are between channels."""

    def mix(self, query, key, value):
        return ((query.mT @ key).softmax(-1) @ value.mT).mT

    def permute(self, order):
        permute_rows(self.query, order)
        self.out.weight.data = self.out.weight[:, order]


class Linear(Attention):
    """Keys are multiplied with values first."""

    def mix(self, query, key, value):
        return query.sigmoid() @ (key.softmax(-2).mT @ value)

    def permute(self, order):
        permute_rows(self.query, order)
        permute_rows(self.key, order)


class Sorted(nn.Module):
    """Channels in the order of their values."""

    data = WORDS[:, 0]

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.first(x).sort(-1).values)

    def permute(self, order):
        permute_rows(self.first, order)


class Maxout(Sorted):
    """Units of two channels, of which the larger counts."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.first(x).unflatten(-1, (4, 2)).amax(-1))

    def permute(self, order):
        units = order[order % 2 == 0] // 2
        permute_rows(self.first, torch.stack([2 * units, 2 * units + 1], 1).flatten())
        self.head.weight.data = self.head.weight[:, units]


class OuterSum(nn.Module):
    """Sums of all pairs of channels of two layers."""

    data = WORDS[:, 0]

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(6, 9), nn.Linear(72, 5)

    def forward(self, x):
        pairs = self.first(x)[:, :, None] + self.second(x)[:, None]
        return self.head(pairs.relu().flatten(1))

    def permute(self, order):
        permute_rows(self.first, order)
        self.head.weight.data = self.head.weight.view(5, 8, 9)[:, order].flatten(1)


def permute_rows(layer, order):
    layer.weight.data, layer.bias.data = layer.weight[order], layer.bias[order]


NETWORKS = {
    "bilinear pooling": (Bilinear, {"first.weight"}),
    "attention between channels": (BetweenChannels, {"query.weight"}),
    "the same, two heads": (lambda: BetweenChannels(2), {"query.weight"}),
    "linear attention, two heads": (lambda: Linear(2), {"query.weight", "key.weight"}),
    "sorted channels": (Sorted, {"first.weight"}),
    "maxout": (Maxout, {"first.weight"}),
    "outer sum": (OuterSum, {"first.weight"}),
}


def within_heads(heads):
    """Return an order of eight channels that leaves each in its head."""
    parts = torch.arange(8).view(heads, -1)
    return parts.roll(1, 1).flatten()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_cannot_be_moved_is_told(name):
    make, parameters = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.permute(within_heads(getattr(model, "heads", 1)))
    assert_same_function(other, model, model.data)
    traced = trace(model, model.data)
    assert {one.parameter for one in traced.pinned} == parameters
    assert all(one.size == 8 and one.module == "" for one in traced.pinned)
    with pytest.warns(PinnedWarning) as told:
        result = fuse([model, other], model.data)
    (warning,) = (one for one in told if one.category is PinnedWarning)
    pinned = result.aligned.to_dict()["models"][1]["pinned"]
    assert pinned == model_facts(traced)["pinned"]
    assert {one["parameter"] for one in pinned} == parameters
    for one in traced.pinned:
        assert str(one) in str(warning.message)
        assert str(one) in summary(traced)
        assert str(one) in summary(result)
    assert "models[0] and models[1]" in str(warning.message)


def test_the_module_that_loses_channels_is_named():
    model = nn.Sequential(nn.Identity(), Bilinear())
    (pinned,) = trace(model, IMAGES).pinned
    assert str(pinned) == (
        "8 of '1.first.weight' (matmul in '1': its result belongs to pairs of channels)"
    )


def test_nothing_is_averaged_where_one_model_has_all_the_weight():
    torch.manual_seed(0)
    models = [Bilinear(), Bilinear()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PinnedWarning)
        fused = fuse(models, IMAGES, [0, 1], calibration="none").model
    assert_same_function(fused, models[1], IMAGES)


class LargestPositions(nn.Module):
    """The largest positions of each channel, and where the smallest one is."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.head = nn.Conv1d(7, 8, 3), nn.Linear(24, 5)

    def forward(self, x):
        x = self.first(x).relu()
        largest, at = x.topk(2, -1)
        return self.head(
            torch.cat([largest, (at[..., :1] - x.argmin(-1, keepdim=True))], -1).flatten(1)
        )


def test_sorted_positions_move_with_their_channel():
    models = [LargestPositions(seed) for seed in (0, 1)]
    traced = trace(models[0], WORDS)
    assert [one.size for one in traced.groups] == [8]
    assert traced.pinned == ()


class Grouped(nn.Module):
    """Means over the channels of each group, whose groups change places as wholes."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x).unflatten(-1, (4, 2))
        return self.head((x - x.mean(-1, keepdim=True)).flatten(-2))


@pytest.mark.parametrize("make", [Linear, Grouped])
def test_channels_that_move_after_all_are_not_told(make):
    assert trace(make(), WORDS).pinned == ()
