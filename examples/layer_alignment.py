"""See which layers of two residual networks belong together.

A ResNet with four blocks a stage and one with two or three learn handwritten digits. Every two
layers are compared by what they do on the same images, and the cheapest alignment that keeps their
order and their stages is found exactly.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import clafusion

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument(
    "--out", type=Path, default=Path(__file__).parent / "output/layer_alignment.png"
)
parser.add_argument("--quick", action="store_true", help="train briefly")
arguments = parser.parse_args()

# --- two residual networks ------------------------------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)


class Block(nn.Module):
    """Two convolutions and a shortcut, itself a convolution where the shape changes."""

    def __init__(self, into, width):
        super().__init__()
        stride = 1 if into == width else 2
        self.conv1 = nn.Conv2d(into, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if into == width else nn.Conv2d(into, width, 1, stride)

    def forward(self, x):
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        into, stages = 8, []
        for count, width in zip(blocks, (8, 16, 32), strict=True):
            stages.append(
                nn.Sequential(*(Block(width if i else into, width) for i in range(count)))
            )
            into = width
        self.stage1, self.stage2, self.stage3 = stages
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        return self.linear(self.stage3(self.stage2(self.stage1(self.stem(x)))).mean((2, 3)))


def trained(blocks, seed):
    torch.manual_seed(seed)
    model = ResNet(blocks)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(1 if arguments.quick else 12):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


models = {"deep": trained((4, 4, 4), seed=1), "shallow": trained((2, 3, 2), seed=2)}

# --- aligned --------------------------------------------------------------------------------------

aligned = clafusion.align(models, images)
deep, shallow = aligned.layer_names(0), aligned.layer_names(1)
alignment = aligned.alignment
for i, k in alignment.pairs:
    print(f"{deep[i]:12s} belongs to {shallow[k]:12s} cost {alignment.cost[i, k]:.3f}")
print(
    f"{len(alignment.pairs)} of {len(deep)} layers have a partner: all {len(shallow)} of the other"
)

# --- the picture ----------------------------------------------------------------------------------

figure, axes = plt.subplots(figsize=(6.6, 7), layout="constrained")
axes.set_facecolor("#dddddd")
shown = axes.imshow(np.ma.masked_invalid(alignment.cost), cmap="viridis_r", aspect="auto")
for (i, k), cost in np.ndenumerate(alignment.cost):
    if np.isfinite(cost):
        middle = alignment.cost[np.isfinite(alignment.cost)].mean()
        axes.text(k, i, f"{cost:.2f}", ha="center", va="center", fontsize=8,
                  color="white" if cost > middle else "black")  # fmt: skip
rows, columns = zip(*alignment.pairs, strict=True)
axes.plot(columns, rows, "-", color="#ee6677", lw=2, alpha=0.5)
axes.scatter(columns, rows, s=600, facecolors="none", edgecolors="#ee6677", linewidths=2)
axes.set_xticks(range(len(shallow)), shallow, rotation=45, ha="right")
axes.set_yticks(range(len(deep)), deep)
axes.set_xlabel("layers of the shallow network")
axes.set_ylabel("layers of the deep network")
axes.set_title("Which layers belong together\n(grey: of other stages or shapes, never matched)")
figure.colorbar(shown, label="cost: one minus CKA (smaller is closer)")
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
