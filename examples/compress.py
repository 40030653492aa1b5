"""Compress a deep network into a shallow one.

A network of seven layers learnt handwritten digits; one of three layers saw a twentieth of the
images.
Fused with ``target="shallower"``, the deep network's knowledge goes into the small one's structure:
the layers that it lacks are left out, and least squares makes up for them without labels.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import clafusion

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output/compress.png")
parser.add_argument("--quick", action="store_true", help="train briefly")
arguments = parser.parse_args()

# --- a deep network, and a small one that saw little ---------------------------------------------

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]


def trained(widths, chosen, steps, seed):
    torch.manual_seed(seed)
    layers = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        batch = chosen[torch.randint(len(chosen), (64,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


steps = 200 if arguments.quick else 600
models = {
    "deep parent": trained((64, 96, 96, 96, 96, 96, 96, 10), train, steps, seed=1),
    "shallow parent": trained((64, 48, 32, 10), train[::20], steps, seed=2),
}

# --- fused into the shallow one's structure -------------------------------------------------------

weights = {"deep parent": 0.8, "shallow parent": 0.2}
ways = {
    "layers left out": clafusion.fuse(
        models, images[train], weights, target="shallower", calibration="none"
    ),
    "layers multiplied, REPAIR": clafusion.fuse(
        models,
        images[train],
        weights,
        target=clafusion.Shallower(merge="majority"),
        calibration="repair",
    ),
    "layers left out, least squares": clafusion.fuse(
        models, images[train], weights, target="shallower", calibration="least_squares"
    ),
}
networks = {**models, **{name: result.model for name, result in ways.items()}}


@torch.no_grad()
def accuracy(model):
    return 100 * float((model(images[test]).argmax(1) == labels[test]).float().mean())


sizes = {name: sum(p.numel() for p in one.parameters()) for name, one in networks.items()}
scores = {name: accuracy(one) for name, one in networks.items()}
print("right of 597 test images")
for name, score in scores.items():
    print(f"{name:32s} {score:5.1f} % with {sizes[name]:6d} parameters")

# --- the picture ----------------------------------------------------------------------------------

figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
bars = axes.barh(
    [f"{name}\n{sizes[name]:,} parameters" for name in scores],
    list(scores.values()),
    color=("#4477aa", "#4477aa", "#bbbbbb", "#bbbbbb", "#228833"),
)
axes.bar_label(bars, fmt="%.1f %%", padding=4)
axes.invert_yaxis()
axes.set_xlim(0, 112)
axes.set_xlabel("right of the test images (%)")
axes.set_title("Seven layers, compressed into three without training")
axes.spines[["top", "right"]].set_visible(False)
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
