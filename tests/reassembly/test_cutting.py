"""Where models can be cut, where they are, and that their blocks in a row are the model."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clafusion import trace
from clafusion.execution.call import call_model
from clafusion.reassembly.blocks import block_module, blocks_between
from clafusion.reassembly.cutting import chosen_cuts, cuts_of
from tests.support.networks import mlp, resnet

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """Patches, attention over them, and a reshaping by the number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(12, 36) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            parts = qkv(norm(x)).chunk(3, -1)
            q, k, v = (one.view(x.size(0), -1, 3, 4).transpose(1, 2) for one in parts)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + out(mixed.transpose(1, 2).reshape(x.size(0), -1, 12))
        return self.head(x.mean(1))


class Masked(nn.Module):
    """Two layers that both read what the input says, so that nothing passes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x.dtype)
        return self.third(self.second(self.first(x).relu() * mask).relu() * mask)


def traced(model: nn.Module, inputs: Tensor):
    return trace(model.eval(), inputs, verify=False)


MODELS = {
    "perceptron": (lambda: mlp(12, 20, 16, 10, 4), VECTORS),
    "residual": (lambda: resnet(2, 1, widths=(8, 12)), IMAGES),
    "tokens": (Tokens, IMAGES),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 9, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(144, 10),
            nn.ReLU(),
            nn.Linear(10, 4),
        ),
        IMAGES,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_in_a_row_are_the_model(kind):
    make, inputs = MODELS[kind]
    model = traced(make(), inputs)
    places = cuts_of(model)
    assert len(places) >= 3
    for cuts in (*combinations(places, 1), *combinations(places, 2), places):
        blocks = blocks_between("m", model, cuts)
        assert sum(one.parameters for one in blocks) == sum(
            one.numel() for one in model.model.parameters()
        )
        x = call_model(block_module(model, blocks[0]), (inputs,))[0]
        for one in blocks[1:]:
            x = block_module(model, one)(x)
        assert torch.equal(x, model.model(inputs))
        more = torch.cat([inputs, inputs])  # blocks take any number of inputs
        x = block_module(model, blocks[0])(more)
        for one in blocks[1:]:
            x = block_module(model, one)(x)
        assert torch.allclose(x, model.model(more), atol=1e-5)


def test_cuts_say_what_passes():
    model = traced(MODELS["convolutions"][0](), IMAGES)
    found = [(one.channels, one.positions, one.axis, one.is_positive) for one in cuts_of(model)]
    assert found == [(6, (4, 4), 1, True), (9, (4, 4), 1, True), (10, (), 1, True)]
    tokens = cuts_of(traced(Tokens(), IMAGES))
    assert [one.positions for one in tokens] == [(2, 2), (4,), ()]
    assert [one.axis for one in tokens] == [1, 2, 1]
    assert not any(one.is_positive for one in tokens)


def test_what_several_layers_read_leaves_no_place_before_the_last_of_them():
    (only,) = cuts_of(traced(Masked(), VECTORS))
    assert only.node == "mul_1"


def test_a_residual_block_is_not_cut():
    model = traced(MODELS["residual"][0](), IMAGES)
    nodes = {one.node for one in cuts_of(model)}
    joins = {layer.output for layer in model.layers if layer.kind == "residual_block"}
    inner = {
        name for layer in model.layers if layer.kind == "residual_block" for name in layer.nodes
    } - joins
    assert not nodes & inner


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("total", [3, 7, 10])
def test_the_chosen_cuts_change_least(total, count):
    change = np.random.default_rng(total).random(total)
    apart = max(-(-(total + 1) // (2 * (count + 1))), 1)

    def is_apart(cuts):
        ends = (-1, *cuts, total)
        return all(b - a >= apart for a, b in pairwise(ends))

    possible = [one for one in combinations(range(total), count) if is_apart(one)]
    found = chosen_cuts(change, count)
    assert found in possible
    assert sum(change[list(found)]) == min(sum(change[list(one)]) for one in possible)
