"""Whatever enters a network's function besides its weights must be the same in all parents."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import StructureError, fuse
from tests.support.assertions import assert_same_function
from tests.support.data import VECTORS

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))

# What a network of vectors does to its input, its first hidden layer and its output, given 1 or 2.
ON_VECTORS = {
    "tensor attribute": (lambda x, m: x - m.plain, None, None, "constant 'plain'"),
    "float buffer": (lambda x, m: x - m.kept, None, None, "constant 'kept'"),
    "lost buffer": (lambda x, m: x - m.lost, None, None, "constant 'lost'"),
    "whole number buffer": (lambda x, m: x[:, m.index], None, None, "constant 'index'"),
    "mask": (lambda x, m: x.masked_fill(m.mask, 0.0), None, None, "constant 'mask'"),
    "literal": (lambda x, m: x - torch.tensor([float(m.v)] * 12), None, None, "constant"),
    "number": (lambda x, m: x * float(m.v), None, None, "mul: other 2.0 and 1.0"),
    "full": (lambda x, m: x * torch.full((12,), float(m.v)), None, None, "full: fill_value"),
    "arange": (lambda x, m: x * torch.arange(12.0).mul(m.v), None, None, "mul: other"),
    "clamp": (lambda x, m: x.clamp(-m.v, m.v), None, None, "clamp: min"),
    "roll": (lambda x, m: x.roll(m.v, 1), None, None, "roll: shifts"),
    "hidden literal": (None, lambda h, m: h * torch.tensor(float(m.v)), None, "constant"),
    "hidden buffer": (None, lambda h, m: h * m.scale, None, "constant 'scale'"),
    "slope": (None, lambda h, m: F.leaky_relu(h, 0.1 * m.v), None, "negative_slope"),
    "temperature": (None, lambda h, m: (h / m.v).softmax(-1), None, "div: other"),
    "eps": (None, lambda h, m: F.layer_norm(h, (16,), eps=0.1**m.v), None, "layer_norm: eps"),
    "gelu": (
        None,
        lambda h, m: F.gelu(h, approximate="tanh" if m.v == 1 else "none"),
        None,
        "gelu: approximate none and tanh",
    ),
    "output buffer": (None, None, lambda y, m: y * m.scale, "constant 'scale'"),
    "softcap": (None, None, lambda y, m: torch.tanh(y / m.v) * m.v, "div: other"),
    "axis of softmax": (
        None,
        None,
        lambda y, m: torch.stack([y, 2 * y], 1).softmax(m.v).flatten(1),
        "softmax: dim",
    ),
}


class Net(nn.Module):
    def __init__(self, depth, v, steps):
        super().__init__()
        torch.manual_seed(10 * depth + v)
        self.v, self.steps = v, steps
        self.plain = torch.full((12,), float(v))
        self.register_buffer("kept", torch.full((12,), float(v)))
        self.register_buffer("lost", torch.full((12,), float(v)), persistent=False)
        self.register_buffer("scale", torch.tensor(float(v)))
        self.register_buffer("index", torch.arange(12).roll(v))
        self.register_buffer("mask", torch.arange(12) % (v + 1) == 0)
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 5)
        self.inner = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))

    def forward(self, x):
        before, within, after = (one or (lambda value, _: value) for one in self.steps)
        hidden = within(F.relu(self.first(before(x, self))), self)
        for one in self.inner:
            hidden = F.relu(one(hidden))
        return after(self.last(hidden), self)


@pytest.mark.parametrize("depths", [(2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("name", ON_VECTORS)
def test_what_differs_is_refused_by_name_and_what_is_equal_fuses(name, depths):
    *steps, reason = ON_VECTORS[name]
    first, second = (Net(depth, v, steps).eval() for v, depth in enumerate(depths, 1))
    same = Net(depths[1], 1, steps).eval()
    if depths[1] > depths[0]:
        reason = ".*"  # told in the other order
    with pytest.raises(StructureError, match=reason):
        fuse([first, second], VECTORS)
    fused = fuse([first, same], VECTORS, [0.0, 1.0], calibration="none").model
    assert_same_function(fused, same, VECTORS)


# What a network of images does between its layers, given 1 or 2.
BETWEEN = {
    "padding": (lambda x, v: F.pad(x, (1, 1, 1, 1), value=float(v)), "value 2.0.*value 1.0"),
    "corners": (
        lambda x, v: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=v == 1),
        "align_corners False.*align_corners True",
    ),
    "pooling": (lambda x, v: F.max_pool2d(x, 2) if v == 1 else F.avg_pool2d(x, 2), "avg.*max"),
    "rows": (lambda x, v: x[:, :, v], "index 2.*index 1"),
}


class Images(nn.Module):
    def __init__(self, depth, v, between):
        super().__init__()
        torch.manual_seed(10 * depth + v)
        self.v, self.between = v, between
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))

    def forward(self, x):
        x = F.relu(self.first(x))
        for one in self.inner:
            x = F.relu(one(x))
        return self.last(self.between(x, self.v).flatten(2).mean(-1))


@pytest.mark.parametrize("name", BETWEEN)
def test_what_differs_between_layers_is_named(name):
    between, reason = BETWEEN[name]
    first, second = Images(3, 1, between).eval(), Images(2, 2, between).eval()
    with pytest.raises(StructureError, match=f"between its layers lies .*{reason}"):
        fuse([first, second], IMAGES)


class Windowed(nn.Module):
    """One layer of attention over a window that is longer than the example inputs."""

    def __init__(self, heads, window, seed, causal=True, scale=None, eps=1e-5):
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.window, self.causal, self.scale = heads, window, causal, scale
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16, eps=eps)
        self.qkv = nn.Linear(16, 3 * 4 * heads)
        self.out = nn.Linear(4 * heads, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        h = self.embed(tokens)
        b, t, _ = h.shape
        q, k, v = self.qkv(self.norm(h)).view(b, t, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        mask = None
        if self.window:
            i = torch.arange(t)
            mask = (i[:, None] >= i) & (i[:, None] - i < self.window)
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal and mask is None, scale=self.scale
        )
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(h.mean(1))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"window": 15}, {"window": 0}),
        ({"window": 15}, {"window": 18}),
        ({"window": 0}, {"window": 0, "causal": False}),
        ({"window": 0}, {"window": 0, "scale": 1.0}),
        ({"window": 0}, {"window": 0, "eps": 0.3}),
    ],
)
def test_attention_that_differs_where_no_example_shows_it_is_refused(heads, one, other):
    tokens = torch.randint(0, 20, (40, 12), generator=torch.Generator().manual_seed(0))
    models = [Windowed(heads[0], seed=0, **one).eval(), Windowed(heads[1], seed=1, **other).eval()]
    with pytest.raises(StructureError):
        fuse(models, tokens)
    fuse([models[0], Windowed(heads[1], seed=3, **one).eval()], tokens)


class Gated(nn.Module):
    """A chain whose last hidden layer holds both halves of a product."""

    def __init__(self, depth, seed):
        super().__init__()
        torch.manual_seed(seed)
        widths = [12] + [16] * depth
        self.chain = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        for one in self.chain:
            x = F.relu(one(x))
        left, right = x.split(8, 1)
        return self.out(left * right)


@pytest.mark.parametrize("depths", [(3, 2), (2, 3), (4, 2)])
def test_what_cannot_correspond_is_forbidden_before_the_alignment(depths):
    models = [Gated(depth, seed).eval() for seed, depth in enumerate(depths)]
    for weights, parent in (([1, 0], models[0]), ([0, 1], models[1])):
        fused = fuse(models, VECTORS, weights, calibration="none").model
        assert_same_function(fused, parent, VECTORS)
