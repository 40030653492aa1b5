"""Attention heads and convolution groups: found, proved, matched and put in order."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import fuse, fuse_many, fuse_models, profile, trace
from clafusion.correspondence.correspondence import lifting
from clafusion.matching.head_order import order_heads
from clafusion.merging.naive import naive_average
from clafusion.profiling.importance import channel_importance
from clafusion.reports.tables import model_summary
from clafusion.tracing.heads import exchange_heads, group_sources, possible_heads
from tests import networks
from tests.test_fuse import assert_same_function, transformer

TOKENS = torch.randn(120, 6, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Self-attention with a shortcut; keys and values may have fewer heads than queries."""

    def __init__(self, width=12, heads=4, shared=1, bias=False, size=None):
        super().__init__()
        self.heads, self.size, self.kept = heads, size or width // heads, heads // shared
        self.queries = nn.Linear(width, self.heads * self.size)
        self.keys = nn.Linear(width, self.kept * self.size)
        self.values = nn.Linear(width, self.kept * self.size)
        self.out = nn.Linear(self.heads * self.size, width)
        self.bias = nn.Parameter(torch.randn(heads, 6, 6)) if bias else None

    def forward(self, x):
        def split(value, heads):
            return value.unflatten(2, (heads, self.size)).transpose(1, 2)

        queries = split(self.queries(x), self.heads)
        keys, values = split(self.keys(x), self.kept), split(self.values(x), self.kept)
        if self.kept < self.heads:
            keys = keys.repeat_interleave(self.heads // self.kept, 1)
            values = values.repeat_interleave(self.heads // self.kept, 1)
        scores = queries @ keys.transpose(2, 3) / self.size**0.5
        if self.bias is not None:
            scores = scores + self.bias
        mixed = scores.softmax(-1) @ values
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self, layers=2, **options):
        super().__init__()
        self.enter = nn.Linear(12, 12)
        self.layers = nn.Sequential(*(Attention(**options) for _ in range(layers)))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.layers(self.enter(x)).mean(1))


class Torch(nn.Module):
    """PyTorch's own layer."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(12, 12)
        self.layer = nn.TransformerEncoderLayer(
            12, 3, 16, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.layer(self.enter(x)).mean(1))


class Grouped(nn.Module):
    """A residual head with a grouped convolution (ResNeXt)."""

    def __init__(self, heads=2, groups=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 12, 1),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 12, 3, padding=1, groups=groups),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 8, 1),
            )
            for _ in range(heads)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for head in self.heads:
            x = F.relu(x + head(x))
        return self.head(x.mean((2, 3)))


class Logits(nn.Module):
    """A model of the transformers package that returns nothing but its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def vit():
    return Logits(transformer("ViT", 2, seed=0))


MODELS = {  # how many heads, and of how many groups each
    "attention": (lambda: Encoder(), TOKENS, (4, 2)),
    "attention, shared keys and values": (lambda: Encoder(shared=2), TOKENS, (2, 2)),
    "torch": (Torch, TOKENS, (3, 2)),
    "ViT": (vit, torch.randn(60, 3, 16, 16), (2, 2)),
    "grouped": (Grouped, IMAGES, (4, 2)),
}


def built(name):
    build, inputs, _ = MODELS[name]
    torch.manual_seed(0)
    return networks.randomise(build()).eval(), inputs


def shuffled(model, graph, seed=3):
    """Return a copy with its heads, and the channels within all groups, in another order."""
    draw = torch.Generator().manual_seed(seed)
    sources = {}
    for one in graph.heads:
        order = torch.randperm(len(one.members), generator=draw).roll(1).tolist()
        if order == sorted(order):
            order = order[::-1]
        sources |= group_sources(one, order)
    assert sources
    state = exchange_heads(graph, graph.state(), sources)
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    return networks.permuted(copied, graph, networks.orders_of(graph, seed))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_and_change_nothing_when_they_move(name):
    model, inputs = built(name)
    graph = trace(model, inputs)
    count, groups = MODELS[name][2]
    assert graph.heads
    for one in graph.heads:
        assert (len(one.members), len(one.members[0])) == (count, groups)
        assert any(layer.index == one.layer for layer in graph.layers)
    moved = shuffled(model, graph)
    assert_same_function(moved, model, inputs)
    changed = [
        name
        for name, one in moved.named_parameters()
        if not torch.equal(one, model.get_parameter(name))
    ]
    assert changed


def test_heads_with_something_of_their_own_keep_their_places():
    model = networks.randomise(Encoder(bias=True)).eval()
    graph = trace(model, TOKENS)
    assert possible_heads(graph)
    assert graph.heads == ()
    assert_same_function(fuse(model, copy.deepcopy(model), TOKENS).model, model, TOKENS, "repair")


def test_two_attentions_of_a_block_have_orders_of_their_own():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(12, 3, 16, 0.0, batch_first=True, norm_first=True)
    model = networks.randomise(Decoder(layer)).eval()
    graph = trace(model, TOKENS)
    assert [(len(one.members), len(one.members[0])) for one in graph.heads] == [(3, 2), (3, 2)]
    sources = group_sources(graph.heads[0], [1, 2, 0]) | group_sources(graph.heads[1], [0, 2, 1])
    moved = copy.deepcopy(model)
    moved.load_state_dict(exchange_heads(graph, graph.state(), sources))
    assert_same_function(moved, model, TOKENS)
    assert_same_function(fuse(model, moved, TOKENS, calibration="none").model, model, TOKENS)


class Decoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.enter, self.layer, self.head = nn.Linear(12, 12), layer, nn.Linear(12, 5)

    def forward(self, x):
        x = self.enter(x)
        return self.head(self.layer(x, x.flip(1)).mean(1))


def test_heads_that_differ_are_not_taken_for_alike_by_blank_examples():
    class Slopes(nn.Module):
        """Attention with a slope of its own for each head (as in ALiBi)."""

        def __init__(self):
            super().__init__()
            self.enter, self.inner = nn.Linear(12, 12), Attention(bias=True)
            with torch.no_grad():
                distances = (torch.arange(6)[:, None] - torch.arange(6)).abs()
                self.inner.bias.copy_(distances * torch.tensor([0.1, 0.5, 1.0, 2.0])[:, None, None])
            self.inner.bias.requires_grad_(False)
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            return self.head(self.inner(self.enter(x)).mean(1))

    blank = torch.cat([TOKENS[:1, :1].expand(3, 6, 12), TOKENS])
    assert trace(networks.randomise(Slopes()).eval(), blank).heads == ()


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_a_shuffled_copy_is_itself(name, calibration):
    model, inputs = built(name)
    other = shuffled(model, trace(model, inputs))
    for order in ((model, other), (other, model)):
        result = fuse(*order, inputs, calibration=calibration)
        assert_same_function(result.model, model, inputs, calibration)
        assert result.head_orders


@pytest.mark.parametrize(
    "settings",
    [
        {"channel_cost": "euclidean"},
        {"channel_cost": "dual"},
        {"solver": "zip", "zip_budget": 0.0},
        {"importance": "activation", "solver": "exact"},
    ],
    ids=str,
)
def test_every_way_to_match_goes_with_blocks(settings):
    model, inputs = built("attention")
    other = shuffled(model, trace(model, inputs))
    fused = fuse(model, other, inputs, calibration="none", **settings).model
    assert_same_function(fused, model, inputs)


@pytest.mark.parametrize("method", ["iterative", "many_to_one", "barycentre"])
def test_three_shuffled_copies_fuse_to_the_model(method):
    model, inputs = built("attention")
    graph = trace(model, inputs)
    models = [model, shuffled(model, graph, 3), shuffled(model, graph, 4)]
    fused = fuse_models(models, inputs, method=method).model
    assert_same_function(fused, model, inputs, "repair")


def test_depths_may_differ():
    torch.manual_seed(0)
    deep, shallow = (networks.randomise(Encoder(n), seed=n).eval() for n in (3, 1))
    graph = trace(shallow, TOKENS)
    moved = shuffled(shallow, graph)
    expected = fuse(deep, shallow, TOKENS).model
    # Whatever order the heads come in, they go to the same places.
    assert_same_function(fuse(deep, moved, TOKENS).model, expected, TOKENS, "repair")


def test_shares_are_told_where_heads_change_places():
    deep, shallow = (networks.randomise(Encoder(n), seed=n).eval() for n in (3, 1))
    moved = shuffled(shallow, trace(shallow, TOKENS))
    for order, share in (((deep, moved), 0.7), ((moved, deep), 0.3)):
        result = fuse(*order, TOKENS, weight=0.3, calibration="none")
        assert result.head_orders
        assert result.shares == pytest.approx(dict.fromkeys(result.alignment.pairs, share))


def test_a_moved_signature_is_that_of_the_moved_model():
    model, inputs = built("grouped")
    graph = trace(model, inputs)
    other = shuffled(model, graph)
    one, two = profile(model, inputs), profile(other, inputs)
    two = replace(two, importance=channel_importance(two.traced, inputs, "activation"))
    layers = tuple(range(len(graph.layers)))
    _, moved, orders = order_heads(lifting(one.traced, two.traced, layers), one, two)
    assert orders
    again = profile(moved.traced.model, inputs)
    for key, rows in again.rows.items():
        torch.testing.assert_close(moved.rows[key], rows)
    for ours, theirs in zip(
        moved.importance, channel_importance(again.traced, inputs, "activation"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_naive_average_leaves_heads_where_they_are():
    model, inputs = built("attention")
    other = shuffled(model, trace(model, inputs))
    averaged = naive_average(fuse(model, other, inputs, calibration="none")).state_dict()
    for name, one in model.state_dict().items():
        torch.testing.assert_close(averaged[name], (one + other.state_dict()[name]) / 2)


def test_many_pairs_are_matched_like_one():
    model, inputs = built("attention")
    other = shuffled(model, trace(model, inputs))
    (result,) = fuse_many({"one": model, "other": other}, inputs)
    expected = fuse(model, other, inputs).model.state_dict()
    for name, one in result.state.items():
        assert torch.equal(one, expected[name]), name


def test_reports_name_the_layers_whose_blocks_move():
    model, inputs = built("attention")
    graph = trace(model, inputs)
    assert "heads       exchangeable as wholes: 4 in layers.0, 4 in layers.1" in model_summary(
        graph
    )
    summary = fuse(model, shuffled(model, graph), inputs).summary()
    assert "heads       reordered in layers.0, layers.1" in summary
    assert "heads" not in fuse(model, model, inputs).summary()
