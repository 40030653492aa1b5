"""Channels that are added up without weights are found, and told where widths differ there."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import WidthWarning, fuse, fuse_many, fuse_models, trace
from tests import networks

INPUTS = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 9, (80, 5), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between, width=8, into=6):
        super().__init__()
        self.between = between
        self.first, self.last = nn.Linear(into, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Summed(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(6, width)
        self.last = nn.Linear(1, 4)

    def forward(self, x):
        return self.last((self.first(x) * self.second(x)).sum(1, keepdim=True))


class Ones(Summed):
    """The same by a product with ones."""

    def forward(self, x):
        ones = torch.ones(self.first.out_features, 1)
        return self.last((self.first(x) * self.second(x)) @ ones)


class Scores(nn.Module):
    """The sums of the products of all queries with all keys."""

    def __init__(self, width=8):
        super().__init__()
        self.queries, self.keys = nn.Linear(6, width), nn.Linear(6, width)
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        x = torch.stack([x, x.sin(), x.cos()], 1)
        return self.last((self.queries(x) @ self.keys(x).mT).mean(1))


class Tied(nn.Module):
    """The weights of an embedding give the outputs, too."""

    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(9, width)
        self.hidden = nn.Linear(width, width)

    def forward(self, x):
        x = self.embedding(x).mean(1)
        return F.linear(x + self.hidden(x).relu(), self.embedding.weight)


def softmax(width=8):
    return Net(nn.Softmax(1), width)


def layer_norm(width=8):
    return Net(nn.LayerNorm(width), width)


def mean(width=8):
    return Net(MeanSubtracted(), width)


class MeanSubtracted(nn.Module):
    def forward(self, x):
        return (x - x.mean(1, keepdim=True)).relu()


COUNTED = {
    "softmax": (softmax, INPUTS),
    "sum": (Summed, INPUTS),
    "ones": (Ones, INPUTS),
    "queries and keys": (Scores, INPUTS),
    "tied embedding": (Tied, TOKENS),
}
WEIGHED = {
    "norm": (layer_norm, INPUTS),
    "mean": (mean, INPUTS),
    "plain": (lambda width=8: networks.mlp(6, width, 4), INPUTS),
}


def pair(make):
    torch.manual_seed(0)
    return networks.randomise(make(8)), networks.randomise(make(5), 1)


@pytest.mark.parametrize("name", COUNTED)
def test_channels_that_are_added_up_are_found_and_told(name):
    make, inputs = COUNTED[name]
    wide, narrow = pair(make)
    assert any(one.is_counted for one in trace(wide, inputs).groups)
    with pytest.warns(WidthWarning, match="5 in one network and 8 in the other"):
        fuse(wide, narrow, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(wide, wide, inputs)


@pytest.mark.parametrize("name", WEIGHED)
def test_channels_that_only_layers_read_are_not(name):
    make, inputs = WEIGHED[name]
    wide, narrow = pair(make)
    assert not any(one.is_counted for one in trace(wide, inputs).groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(wide, narrow, inputs)


@pytest.mark.parametrize("method", ["many_to_one", "barycentre"])
def test_several_models_are_told_as_well(method):
    wide, narrow = pair(Scores)
    with pytest.warns(WidthWarning):
        fuse_models([wide, narrow], INPUTS, method=method, max_rounds=2)


def test_a_template_is_told_as_well():
    narrow = networks.randomise(softmax(5))
    with pytest.warns(WidthWarning, match="5 in one network and 8 in the other"):
        fuse(narrow, narrow, INPUTS, into=softmax(8))


def test_many_pairs_keep_the_warning():
    wide, narrow = pair(Scores)
    with pytest.warns(WidthWarning, match="added up without weights"):
        (result,) = fuse_many({"wide": wide, "narrow": narrow}, INPUTS)
    (text,) = result.warnings
    assert "added up without weights" in text
