"""Channels that are added up without weights are found, and told where widths differ there."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clafusion
from clafusion import Barycentre, Deeper, Like, WidthWarning, fuse, trace
from tests.support import families, networks

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


def spread(function, **options):
    """Divide by a standard deviation or variance, as "The Annotated Transformer" does."""

    def make(width=8):
        return Net(lambda h: (h / (function(h, -1, keepdim=True, **options) + 1)).relu(), width)

    return make


COUNTED = {
    "std": (spread(torch.std), INPUTS),
    "var": (spread(torch.var), INPUTS),
    "correction": (spread(torch.var, correction=2), INPUTS),
    "std_mean": (spread(lambda *a, **k: torch.std_mean(*a, **k)[0]), INPUTS),
    "var_mean": (spread(lambda *a, **k: torch.var_mean(*a, **k)[0], unbiased=True), INPUTS),
    "softmax": (softmax, INPUTS),
    "sum": (Summed, INPUTS),
    "ones": (Ones, INPUTS),
    "queries and keys": (Scores, INPUTS),
    "tied embedding": (Tied, TOKENS),
}
WEIGHED = {
    "biased std": (spread(torch.std, unbiased=False), INPUTS),
    "biased var": (spread(torch.var, correction=0), INPUTS),
    "biased var_mean": (spread(lambda *a, **k: torch.var_mean(*a, **k)[0], correction=0), INPUTS),
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
    with pytest.warns(WidthWarning, match="5 in .* and 8 in the result"):
        fuse([wide, narrow], inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WidthWarning)
        fuse([wide, wide], inputs)


@pytest.mark.parametrize("name", WEIGHED)
def test_channels_that_only_layers_read_are_not(name):
    make, inputs = WEIGHED[name]
    wide, narrow = pair(make)
    assert not any(one.is_counted for one in trace(wide, inputs).groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WidthWarning)
        fuse([wide, narrow], inputs)


@pytest.mark.parametrize("strategy", ["many_to_one", "iterative", Barycentre(max_rounds=5)])
def test_users_of_more_than_two_models_are_told_as_well(strategy):
    wide, narrow = pair(Scores)
    for models in ([wide, narrow], [wide, wide, narrow]):
        with pytest.warns(WidthWarning, match="5 in .* and 8 in the result"):
            fuse(models, INPUTS, merging={"strategy": strategy})


def test_the_warning_points_to_the_callers_line():
    wide, narrow = pair(Scores)
    with pytest.warns(WidthWarning) as told:
        fuse([wide, narrow], INPUTS)
    assert told[0].filename == __file__


def test_widths_of_another_parent_are_told_as_well():
    wide, narrow = pair(Scores)
    with pytest.warns(WidthWarning, match="8 in .* and 5 in the result"):
        fuse([wide, narrow], INPUTS, target=Deeper(width="narrow"))


def test_a_template_is_told_as_well():
    narrow = networks.randomise(softmax(5))
    with pytest.warns(WidthWarning, match="5 in .* and 8 in the result"):
        fuse([narrow, narrow], INPUTS, target=Like(softmax(8)))


def test_many_pairs_keep_the_warning():
    wide, narrow = pair(Scores)
    with pytest.warns(WidthWarning, match="added up without weights"):
        (result,) = clafusion.fuse_pairs(
            {"wide": wide, "narrow": narrow}, INPUTS, assessment="none"
        )
    assert any("added up without weights" in text for text in result.warnings)


@pytest.mark.parametrize("widths", [(64, 48), (48, 64)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_size_of_head_that_the_code_fixes_is_told_in_either_order(widths, implementation):
    transformers = pytest.importorskip("transformers")
    models = []
    for i, width in enumerate(widths):
        torch.manual_seed(i)
        config = transformers.BertConfig(
            vocab_size=40,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=16,
            attn_implementation=implementation,
        )
        models.append(transformers.BertForSequenceClassification(config).eval())
    tokens = torch.randint(0, 40, (60, 9), generator=torch.Generator().manual_seed(0))
    with pytest.warns(WidthWarning):
        fused = fuse(models, tokens, [1, 0], calibration="none").model
    with torch.no_grad():
        torch.testing.assert_close(fused(tokens).logits, models[0](tokens).logits)


def test_heads_of_queries_that_have_no_place_are_told():
    pytest.importorskip("transformers")
    many = families.llama(1, heads=8, keys=2, seed=1)
    few = families.llama(2, heads=4, keys=2)
    with pytest.warns(WidthWarning, match="4 heads of queries share .* and 2 in the result"):
        fuse([few, many], [families.TEXT], example_inputs=families.TEXT, calibration="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error", WidthWarning)
        more = families.llama(2, heads=8, keys=4)
        fuse([more, many], [families.TEXT], example_inputs=families.TEXT, calibration="none")
