"""Pre-norm transformers whose residual stream may be rotated, and rotated copies of them."""

import torch
from torch import nn
from torch.nn import functional as F

from clafusion.tracing.rotatable import folded_state, random_rotation, rotated_state
from clafusion.tracing.rotations import find_rotatable
from clafusion.tracing.trace import trace
from clafusion.weights.build import with_state
from tests.support.networks import randomise

WIDTH, HEADS, TOKENS, CHARACTERS = 12, 2, 6, 20
IMAGES = torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TEXTS = torch.randint(0, CHARACTERS, (160, TOKENS), generator=torch.Generator().manual_seed(1))


class GainPlusOne(nn.Module):
    """An RMSNorm that multiplies by one plus its gain, as Gemma's."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1.0 + self.weight.float())).type_as(x)


def no_gain(width):
    return nn.LayerNorm(width, elementwise_affine=False)


class Block(nn.Module):
    def __init__(self, norm, *, is_causal=False, has_bias=True, is_scaled=False, width=WIDTH):
        super().__init__()
        self.is_causal = is_causal
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=has_bias)
        self.out = nn.Linear(width, width, bias=has_bias)
        self.up = nn.Linear(width, 16, bias=has_bias)
        self.down = nn.Linear(16, width, bias=has_bias)
        self.scale = nn.Parameter(torch.ones(width)) if is_scaled else None

    def forward(self, x):
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (HEADS, -1)).transpose(1, 2) for one in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self._scaled(self.out(y.transpose(1, 2).flatten(2)))
        return x + self._scaled(self.down(F.gelu(self.up(self.norm2(x)))))

    def _scaled(self, x):
        return x if self.scale is None else x * self.scale


class ViT(nn.Module):
    def __init__(self, layers=2, norm=nn.LayerNorm, **options):
        super().__init__()
        width = options.get("width", WIDTH)
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 10, width))
        self.layers = nn.Sequential(*(Block(norm, **options) for _ in range(layers)))
        self.norm, self.head = norm(width), nn.Linear(width, 5)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.size(0), -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.layers(tokens))[:, 0])


class GPT(nn.Module):
    def __init__(self, layers=2, norm=nn.LayerNorm, is_tied=False, has_bias=True, **options):
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.positions = nn.Embedding(TOKENS, WIDTH)
        options = {"is_causal": True, "has_bias": has_bias, **options}
        self.layers = nn.Sequential(*(Block(norm, **options) for _ in range(layers)))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, CHARACTERS, bias=has_bias)
        if is_tied:
            self.head.weight = self.characters.weight

    def forward(self, x):
        x = self.characters(x) + self.positions(torch.arange(x.size(1), device=x.device))
        return self.head(self.norm(self.layers(x)))


MODELS = {
    "ViT, LayerNorm": (lambda: ViT(), IMAGES),
    "ViT, LayerNorm, scaled blocks": (lambda: ViT(is_scaled=True), IMAGES),
    "GPT, LayerNorm": (lambda: GPT(), TEXTS),
    "GPT, LayerNorm without gain": (lambda: GPT(norm=no_gain), TEXTS),
    "GPT, RMSNorm": (lambda: GPT(norm=nn.RMSNorm, has_bias=False), TEXTS),
    "GPT, 1 + gain": (lambda: GPT(norm=GainPlusOne, has_bias=False), TEXTS),
}


def built(name, seed=0):
    build, inputs = MODELS[name]
    return randomise(build(), seed).eval(), inputs


def rotated_copy(model, inputs, seed=5):
    """Return a copy of a model that computes the same with its norms folded, its streams turned."""
    traced = trace(model, inputs)
    groups = find_rotatable(traced).groups
    assert groups
    draw = torch.Generator().manual_seed(seed)
    folded = folded_state(traced.state(), groups)
    state = rotated_state(folded, [(one, random_rotation(one, draw)) for one in groups])
    return with_state(model, {name: state[name] for name in state}, traced.aliases)
