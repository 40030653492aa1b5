"""Fuse two transformers with different numbers of heads.

A vision transformer of three layers with four heads and one of two layers with two heads learn
handwritten digits. Heads have no order, so whole heads are matched first, those of the smaller
network with more than one of the larger, and then the channels in them.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import clafusion

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument(
    "--out", type=Path, default=Path(__file__).parent / "output/attention_heads.png"
)
parser.add_argument("--quick", action="store_true", help="train briefly")
arguments = parser.parse_args()

# --- two vision transformers ----------------------------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]
WIDTH, HEAD = 32, 8


class Layer(nn.Module):
    """Pre-norm attention and a feed-forward network."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * heads * HEAD), nn.Linear(heads * HEAD, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (self.heads, HEAD)).transpose(1, 2) for one in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class Transformer(nn.Module):
    """Sixteen patches of two by two pixels."""

    def __init__(self, depth, heads):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.layers = nn.Sequential(*(Layer(heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(1))


def trained(depth, heads, seed):
    torch.manual_seed(seed)
    model = Transformer(depth, heads)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(6 if arguments.quick else 20):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return 100 * float((model(images[test]).argmax(1) == labels[test]).float().mean())


models = {"four heads": trained(3, 4, seed=1), "two heads": trained(2, 2, seed=2)}

# --- fused ----------------------------------------------------------------------------------------

plain = clafusion.fuse(models, images[train], calibration="none")
scores = {
    "three layers, four heads": accuracy(models["four heads"]),
    "two layers, two heads": accuracy(models["two heads"]),
    "averaged as they are": accuracy(clafusion.naive_average(plain.problem)),
    "matched": accuracy(plain.model),
    "matched, REPAIR": accuracy(clafusion.fuse(models, images[train]).model),
    "matched, least squares": accuracy(
        clafusion.fuse(models, images[train], calibration="least_squares").model
    ),
}
print("right of 597 test images")
for name, score in scores.items():
    print(f"{name:28s} {score:5.1f} %")

# How much of each head of the small network goes to each head of the large one, layer by layer.
small = next(one for one in plain.parents if not one.is_identity)
shared = []
for heads in small.correspondence.target.united_heads:
    plan = small.plans[heads.groups[0]]
    if plan is not None:
        shared.append(plan.dense().unflatten(0, (2, -1)).unflatten(2, (4, -1)).sum((1, 3)))
        shared[-1] /= shared[-1].sum()

# --- the picture ----------------------------------------------------------------------------------

figure = plt.figure(figsize=(9, 4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
axes = left.subplots()
colours = ("#4477aa", "#4477aa", "#bbbbbb", "#bbbbbb", "#bbbbbb", "#228833")
axes.bar_label(
    axes.barh(list(scores), list(scores.values()), color=colours), fmt="%.1f %%", padding=4
)
axes.invert_yaxis()
axes.set_xlim(0, 118)
axes.set_xlabel("right of the test images (%)")
axes.spines[["top", "right"]].set_visible(False)
left.suptitle("Fused without training")
parts = right.subplots(len(shared), 1, squeeze=False)[:, 0]
for i, (part, of) in enumerate(zip(parts, shared, strict=True)):
    part.imshow(of.numpy(), cmap="Blues", vmin=0, vmax=0.5)
    for (head, place), value in [((a, b), of[a, b]) for a in range(2) for b in range(4)]:
        part.text(place, head, f"{100 * float(value):.0f} %", ha="center", va="center", fontsize=8)
    part.set_xticks(range(4), [f"head {one}" for one in range(4)])
    part.set_yticks(range(2), [f"head {one}" for one in range(2)])
    part.set_ylabel("small network")
    part.set_title(f"attention {i} of the large network", fontsize=10)
part.set_xlabel("large network")
right.suptitle("Which heads belong together")
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
