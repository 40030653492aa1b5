"""Fuse two convolutional networks of different depth.

A network of five layers and one of three learn handwritten digits from different starts, and are
fused into one of five layers, without training. Averaging their weights as they are destroys both;
once layers and channels are matched and the outputs of every layer regressed onto the parents', any
mixture of the two works.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import clafusion

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output/two_depths.png")
parser.add_argument("--quick", action="store_true", help="train briefly, fuse at fewer weights")
arguments = parser.parse_args()

# --- two networks that learnt the same task -----------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]


def network(convolutions):
    """Two stages of convolutions, each of which ends in a pooling."""
    layers, into = [], 1
    for width in (16, 32):
        for _ in range(convolutions):
            layers += [nn.Conv2d(into, width, 3, padding=1), nn.ReLU()]
            into = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * into, 10))


def trained(convolutions, seed):
    torch.manual_seed(seed)
    model = network(convolutions)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4 if arguments.quick else 15):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return 100 * float((model(images[test]).argmax(1) == labels[test]).float().mean())


deep, shallow = trained(2, seed=1), trained(1, seed=2)

# --- fused, at every weight of the deep one ------------------------------------------------------

WAYS = {"matched": "none", "matched, REPAIR": "repair", "matched, least squares": "least_squares"}
ENDS = {0.0: "shallow\nalone", 1.0: "deep\nalone"}
weights = (0.5,) if arguments.quick else (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
curves = {name: [] for name in ("averaged as they are", *WAYS)}
for weight in weights:
    for name, calibration in WAYS.items():
        result = clafusion.fuse(
            {"deep": deep, "shallow": shallow},
            images[train],
            {"deep": weight, "shallow": 1 - weight},
            calibration=calibration,
        )
        curves[name].append(accuracy(result.model))
    curves["averaged as they are"].append(accuracy(clafusion.naive_average(result.problem)))

print("right of 597 test images, both parents with a weight of one half")
print(f"{'deep parent':28s} {accuracy(deep):5.1f} %")
print(f"{'shallow parent':28s} {accuracy(shallow):5.1f} %")
for name, values in curves.items():
    print(f"{name:28s} {values[weights.index(0.5)]:5.1f} %")

# --- the picture ----------------------------------------------------------------------------------

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
COLOURS = ("#999999", "#ddaa33", "#4477aa", "#228833")
for (name, values), colour in zip(curves.items(), COLOURS, strict=True):
    axes.plot(weights, values, "o-", color=colour, label=name)
axes.set_xlabel("weight of the deep network")
axes.set_ylabel("right of the test images (%)")
axes.set_title("Five layers and three, fused into five without training")
axes.set_xticks(weights, [ENDS.get(one, f"{one:g}") for one in weights])
axes.set_ylim(0, 103)
axes.grid(alpha=0.3)
figure.legend(loc="outside lower center", ncols=4, frameon=False)
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
