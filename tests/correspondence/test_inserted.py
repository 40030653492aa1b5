"""The source in the target's structure keeps its function, also with another number of heads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import StructureError, correspond, fuse, inserted_model, trace
from clafusion.correspondence.duplicated_channels import copying_plans, with_copied_channels
from clafusion.correspondence.heads import unite_models
from clafusion.correspondence.inserted import check_inserted
from clafusion.correspondence.moving import move_state
from tests.support.assertions import assert_same_function
from tests.support.networks import randomise

TOKENS = torch.randn(60, 6, 12, generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


class Block(nn.Module):
    """A pre-norm attention with everything that may be a constant of its code."""

    def __init__(
        self,
        width=12,
        heads=4,
        size=3,
        is_causal=False,
        scale=None,
        eps=1e-5,
        mask=None,
        factor=1.0,
        over=1,
        window=None,
    ):
        super().__init__()
        self.heads, self.settings = heads, {"is_causal": is_causal, "scale": scale}
        self.norm = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.out = nn.Linear(heads * size, width)
        self.register_buffer("mask", mask)
        self.factor, self.over, self.window = factor, over, window

    def forward(self, x):
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in parts)
        mask = self.mask
        if self.window is not None:
            places = torch.arange(x.size(1))
            mask = (places[:, None] - places).abs() < self.window
        mixed = F.scaled_dot_product_attention(q, k, v, mask, **self.settings)
        mixed = self.factor * mixed.transpose(1, 2).flatten(2)
        return self.out(F.layer_norm(mixed, tuple(mixed.shape[-self.over :])))


class Encoder(nn.Module):
    def __init__(self, layers=1, width=12, **settings):
        super().__init__()
        self.enter = nn.Linear(12, width)
        self.blocks = nn.ModuleList(Block(width, **settings) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def encoder(seed=0, **settings):
    torch.manual_seed(seed)
    return randomise(Encoder(**settings), seed).eval()


DIFFERENT = {
    "is_causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "eps": {"eps": 0.1},
    "mask": {"mask": CAUSAL},
    "other": {"factor": 0.5},
    "lt": {"window": 2},  # the mask's comparison of places
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (2, 4)], ids=str)
def test_a_constant_of_an_operation_that_differs_is_refused_by_name(heads, name, layers):
    plain = {"lt": {"window": 3}, "mask": {"mask": torch.ones_like(CAUSAL)}}.get(name, {})
    deep = encoder(layers=layers, heads=heads[0], **plain)
    shallow = encoder(1, heads=heads[1], **{**plain, **DIFFERENT[name]})
    with pytest.raises(StructureError, match=name):
        fuse([deep, shallow], TOKENS, [0, 1])
    equal = encoder(1, heads=heads[1], **plain)  # with the same it fuses
    assert_same_function(fuse([deep, equal], TOKENS, [1, 0]).model, deep, TOKENS, "least_squares")


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (2, 4), (4, 3)], ids=str)
def test_what_no_comparison_of_operations_sees_is_refused_by_the_trial(heads):
    """A norm over the channels in one, over tokens and channels in the other."""
    deep, shallow = encoder(layers=2, heads=heads[0]), encoder(1, heads=heads[1], over=2)
    with pytest.raises(StructureError, match="the network's outputs change by"):
        fuse([deep, shallow], TOKENS, [0, 1])


def lifted(deep, shallow, layer_map):
    models = [trace(one, TOKENS) for one in (deep, shallow)]
    return correspond(*unite_models(*models, layer_map), layer_map)


@pytest.mark.parametrize("width", [12, 8, 24, 18])
@pytest.mark.parametrize("heads", [(4, 2), (2, 4), (4, 3), (1, 5)], ids=str)
def test_a_copy_with_fewer_different_channels_fits_the_targets_widths(heads, width):
    deep = encoder(layers=3, heads=heads[0])
    shallow = encoder(1, layers=2, width=width, heads=heads[1])
    correspondence = lifted(deep, shallow, (0, 1, -1, 2, 3))
    plans = copying_plans(correspondence)
    copies = with_copied_channels(correspondence, plans.within_source)
    state = {**copies.target.state(), **move_state(copies, plans.into_target)}
    (found,), (wanted,) = (
        copies.target.run((TOKENS,), state=state),
        copies.source.output_tensors((TOKENS,)),
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert float(wanted.std(0).max()) > 1e-3  # something is left of the function
    check_inserted(correspondence)


def test_where_copies_of_channels_add_up_there_is_no_trial():
    of_other_size = lifted(encoder(heads=4), encoder(1, heads=2, size=6), (0, 1, 2))
    assert copying_plans(of_other_size) is None
    assert copying_plans(lifted(encoder(), encoder(1, width=13, heads=2), (0, 1, 2))) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_numbers_of_heads_in_half_precision_are_no_other_function(dtype):
    models = [randomise(Encoder(2, heads=heads), heads).eval().to(dtype) for heads in (4, 2)]
    pair = [trace(one, TOKENS[:4].to(dtype)) for one in models]
    target, source = unite_models(*pair, (0, 1, 2, 3))
    check_inserted(correspond(target, source, (0, 1, 2, 3)))


class ChecksItsWidth(nn.Module):
    def __init__(self, depth, width, error=AssertionError):
        super().__init__()
        self.width, self.error = width, error
        self.enter = nn.Linear(12, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.enter(x).relu()
        for layer in self.layers:
            if x.shape[-1] != self.width:
                raise self.error("a width")
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("error", [AssertionError, ValueError, RuntimeError])
def test_a_width_that_the_code_checks_may_be_another_one(error):
    models = [ChecksItsWidth(3, 8, error), ChecksItsWidth(2, 12, error)]
    fused = fuse([one.eval() for one in models], TOKENS[:, 0], calibration="none").model
    assert torch.isfinite(fused(TOKENS[:, 0])).all()


def test_an_inserted_model_keeps_its_type():
    models = [ChecksItsWidth(depth, 8).eval().bfloat16() for depth in (3, 2)]
    deep, shallow = (trace(one, TOKENS[:, 0].bfloat16()) for one in models)
    correspondence = correspond(deep, shallow, (0, 1, 2, -1, 3)[: len(deep.layers)])
    built = inserted_model(models[0], correspondence)
    assert {one.dtype for one in built.parameters()} == {torch.bfloat16}
