"""Which weights make a block write zero, and that the network then computes what it did."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
