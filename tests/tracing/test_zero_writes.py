"""Which weights make a block write zero, and that the network then computes what it did."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from clafusion import fuse, trace
from tests.support.architectures import randomise

WIDTH = 6


class Block(nn.Module):
    """Adds to its input what ``write`` makes of it by linear layers of these names."""

    def __init__(self, write, layers: str) -> None:
        super().__init__()
        self.norm, self.write = nn.LayerNorm(WIDTH), write
        for layer in layers:
            self.add_module(layer, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self, x, self.norm(x))


class Network(nn.Module):
    def __init__(self, write, layers: str, blocks: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block(write, layers) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


INPUTS = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(0))

# What a block makes, its layers, and those of which the parameters are zero then.
WRITES = {
    "a product, of which one factor can be zero": (
        lambda block, x, y: x + block.a(y).sigmoid() * block.b(y),
        "ab",
        "b",
    ),
    "an attention that ends with its values": (
        lambda block, x, y: x + (block.a(y) @ block.b(y).transpose(1, 2)).softmax(-1) @ block.c(y),
        "abc",
        "c",
    ),
    "the fused kernel of attention": (
        lambda block, x, y: (
            x + F.scaled_dot_product_attention(block.a(y), block.b(y), block.c(y), is_causal=True)
        ),
        "abc",
        "c",
    ),
    "parts side by side": (
        lambda block, x, y: x + torch.cat([block.a(y)[..., :3], block.b(y)[..., 3:]], -1),
        "ab",
        "ab",
    ),
    "branches in a stack": (
        lambda block, x, y: x + torch.stack([block.a(y), block.b(y), block.c(y)]).sum(0),
        "abc",
        "abc",
    ),
    "a product with what no weight made": (
        lambda block, x, y: x + block.a(y) * torch.linspace(0, 1, 5)[:, None],
        "a",
        "a",
    ),
    "positions in another order": (
        lambda block, x, y: x + block.a(y)[:, torch.tensor([4, 2, 3, 0, 1])],
        "a",
        "a",
    ),
    "a shortcut that is cast": (
        lambda block, x, y: (x.double() + block.a(y).double()).float(),
        "a",
        "a",
    ),
}
NONE = {
    "nothing can be zero": (lambda block, x, y: x + block.a(y).sigmoid() * block.b(y).exp(), "ab"),
    "the shortcut counts twice": (lambda block, x, y: x + x + block.a(y), "a"),
    "the shortcut loses digits": (lambda block, x, y: x.bfloat16().float() + block.a(y), "a"),
    "one of the parts cannot be zero": (
        lambda block, x, y: x + torch.stack([block.a(y), block.b(y).exp()]).sum(0),
        "ab",
    ),
}


def networks_of(write, layers, *depths):
    return [randomise(Network(write, layers, depth), seed) for seed, depth in enumerate(depths)]


@pytest.mark.parametrize("name", WRITES)
def test_a_block_writes_zero(name):
    write, layers, zero = WRITES[name]
    models = networks_of(write, layers, 2, 1)
    (block,) = (one for one in trace(models[1], INPUTS).layers if one.insertable == "zero")
    expected = {f"blocks.0.{layer}.{kind}" for layer in zero for kind in ("weight", "bias")}
    assert set(block.last_write) == expected
    for weights, model in (([1, 0], models[0]), ([0, 1], models[1])):
        fused = fuse(models, INPUTS, weights, calibration="none").model
        with torch.no_grad():
            torch.testing.assert_close(fused(INPUTS), model(INPUTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NONE)
def test_a_block_that_no_weights_silence_is_not_inserted(name):
    (model,) = networks_of(*NONE[name], 1)
    layers = trace(model, INPUTS, verify=False).layers
    assert not any(one.insertable == "zero" for one in layers)


class Computed(nn.Module):
    """A residual block that ends in a layer whose weight is computed."""

    def __init__(self, compute: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.norm, self.end = nn.LayerNorm(WIDTH), compute(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.norm(x).relu())


class Standard(nn.Linear):
    """A layer whose weight has mean 0 and variance 1 in each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, 1, keepdim=True)
        return F.linear(x, (self.weight - mean) * (variance + 1e-5).rsqrt(), self.bias)


class LowRank(nn.Linear):
    """A layer whose weight is changed by a product of two."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.left = nn.Parameter(torch.ones(WIDTH, 2))
        self.right = nn.Parameter(torch.ones(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.left @ self.right, self.bias)


NORM = {"norm.weight", "norm.bias"}
COMPUTED = {
    "a length": (parametrizations.weight_norm, {"end.parametrizations.weight.original0"}),
    "a spectral norm, which is of no zero weight": (parametrizations.spectral_norm, NORM),
    "a mean and a variance, which no factor changes": (Standard, NORM),
    "a product beside it": (LowRank, NORM),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_layer_with_a_computed_weight_writes_zero(name):
    compute, expected = COMPUTED[name]

    def net(depth: int) -> nn.Module:
        blocks = [Computed(compute) for _ in range(depth)]
        return randomise(nn.Sequential(nn.Linear(4, WIDTH), *blocks, nn.Linear(WIDTH, 3)), depth)

    deep, shallow = net(3), net(1)
    for layer in trace(shallow, INPUTS).layers[1:-1]:
        assert {one.removeprefix("1.") for one in layer.last_write} == expected | {"end.bias"}
    for weights, model in (([1, 0], deep), ([0, 1], shallow)):
        result = fuse([deep, shallow], INPUTS, weights, calibration="none").model
        with torch.no_grad():
            torch.testing.assert_close(result(INPUTS), model(INPUTS), rtol=0, atol=1e-5)
