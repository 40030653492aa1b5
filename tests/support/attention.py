"""Networks with attention heads or convolution groups, and copies with these in other orders."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from clafusion.tracing.heads import exchange_heads
from tests.support import networks
from tests.support.transformers import transformer

TOKENS = torch.randn(120, 6, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Self-attention with a shortcut; keys and values may have fewer heads than queries."""

    def __init__(self, width=12, heads=4, shared=1, bias=False, size=None, temperature=False):
        super().__init__()
        self.heads, self.size, self.kept = heads, size or width // heads, heads // shared
        self.queries = nn.Linear(width, self.heads * self.size)
        self.keys = nn.Linear(width, self.kept * self.size)
        self.values = nn.Linear(width, self.kept * self.size)
        self.out = nn.Linear(self.heads * self.size, width)
        self.bias = nn.Parameter(torch.randn(heads, 6, 6)) if bias else None
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1)) if temperature else None

    def forward(self, x):
        def split(value, heads):
            return value.unflatten(2, (heads, self.size)).transpose(1, 2)

        queries = split(self.queries(x), self.heads)
        keys, values = split(self.keys(x), self.kept), split(self.values(x), self.kept)
        if self.kept < self.heads:
            keys = keys.repeat_interleave(self.heads // self.kept, 1)
            values = values.repeat_interleave(self.heads // self.kept, 1)
        scores = queries @ keys.transpose(2, 3) / self.size**0.5
        if self.temperature is not None:
            scores = scores * self.temperature
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
    """Residual blocks, each with a grouped convolution (ResNeXt)."""

    def __init__(self, blocks=2, groups=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 12, 1),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 12, 3, padding=1, groups=groups),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 8, 1),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
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
    "attention, temperatures": (lambda: Encoder(temperature=True), TOKENS, (4, 3)),
    "attention, biases": (lambda: Encoder(layers=1, bias=True), TOKENS, (4, 38)),
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
    orders = []
    for one in graph.heads:
        order = torch.randperm(len(one.members), generator=draw).roll(1).tolist()
        if order == sorted(order):
            order = order[::-1]
        orders.append((one, order))
    assert orders
    state = exchange_heads(graph, graph.state(), orders)
    copied = copy.deepcopy(model)
    copied.load_state_dict(
        {name: state[graph.aliases.get(name, name)] for name in model.state_dict()}
    )
    return networks.permuted(copied, graph, networks.orders_of(graph, seed))
