"""Attention heads and convolution groups: found and proved."""

import copy

import pytest
import torch
from torch import nn

from clafusion import fuse, trace
from clafusion.tracing.heads import exchange_heads, restored_heads
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.attention import IMAGES, MODELS, TOKENS, Attention, built, shuffled


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_found_and_change_nothing_when_they_move(name):
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


@pytest.mark.parametrize("name", MODELS)
def test_heads_go_back_to_where_they_were(name):
    graph = trace(*built(name))
    state = graph.state()
    generator = torch.Generator().manual_seed(0)
    orders = [
        (one, torch.randperm(len(one.members), generator=generator).tolist())
        for one in reversed(graph.heads)
    ]
    moved = exchange_heads(graph, state, orders)
    assert any(not torch.equal(moved[one], value) for one, value in state.items())
    back = restored_heads(graph, moved, orders)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[one], value) for one, value in state.items())


def test_channels_of_an_image_are_not_taken_for_heads():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = (nn.Parameter(torch.ones(3, 1, 1)) for _ in range(2))
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x):
            x = (x * self.scale + self.shift).relu()
            return self.head(self.conv(x).relu().mean((2, 3)))

    graph = trace(networks.randomise(Scaled()).eval(), IMAGES)
    assert [one.size for one in graph.groups] == [8]
    assert not graph.heads


def test_two_attentions_of_a_block_have_orders_of_their_own():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(12, 3, 16, 0.0, batch_first=True, norm_first=True)
    model = networks.randomise(Decoder(layer)).eval()
    graph = trace(model, TOKENS)
    assert [(len(one.members), len(one.members[0])) for one in graph.heads] == [(3, 2), (3, 2)]
    orders = [(graph.heads[0], [1, 2, 0]), (graph.heads[1], [0, 2, 1])]
    moved = copy.deepcopy(model)
    moved.load_state_dict(exchange_heads(graph, graph.state(), orders))
    assert_same_function(moved, model, TOKENS)
    assert_same_function(fuse([model, moved], TOKENS, calibration="none").model, model, TOKENS)


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
            slopes = self.inner.bias.detach()
            del self.inner.bias
            self.inner.register_buffer("bias", slopes)
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            return self.head(self.inner(self.enter(x)).mean(1))

    blank = torch.cat([TOKENS[:1, :1].expand(3, 6, 12), TOKENS])
    assert trace(networks.randomise(Slopes()).eval(), blank).heads == ()
