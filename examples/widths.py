"""Fuse a wide and a narrow network into any width.

Two convolutional networks of different depth and width are fused into the widths of either, and of
a template of one's own. Channels of the wide one are merged, those of the narrow one are copied,
and what a channel adds to the next layer is shared out among its copies.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import clafusion

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output/widths.png")
parser.add_argument("--quick", action="store_true", help="train briefly, fuse in fewer ways")
arguments = parser.parse_args()

# --- a wide network and a narrow one --------------------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]


def network(width, convolutions):
    """Two stages of convolutions, each of which ends in a pooling."""
    layers, into = [], 1
    for out in (width, 2 * width):
        for _ in range(convolutions):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            into = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * into, 10))


def trained(width, convolutions, seed):
    torch.manual_seed(seed)
    model = network(width, convolutions)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(3 if arguments.quick else 10):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return 100 * float((model(images[test]).argmax(1) == labels[test]).float().mean())


models = {"of 24": trained(24, 1, seed=1), "of 8": trained(8, 2, seed=2)}

# --- fused into several widths --------------------------------------------------------------------

TARGETS = {
    8: clafusion.Deeper(width="narrow"),
    16: clafusion.Like(network(16, 2)),
    24: clafusion.Deeper(width="wide"),
}
WAYS = {"matched": "none", "matched, REPAIR": "repair", "matched, least squares": "least_squares"}
if arguments.quick:
    WAYS.pop("matched")
curves = {name: [] for name in WAYS}
for width, target in TARGETS.items():
    for name, calibration in WAYS.items():
        result = clafusion.fuse(models, images[train], target=target, calibration=calibration)
        assert result.model[0].out_channels == width
        curves[name].append(accuracy(result.model))

print("right of 597 test images")
for name, model in models.items():
    print(f"{name + ' parent':42s} {accuracy(model):5.1f} %")
for name, values in curves.items():
    for width, value in zip(TARGETS, values, strict=True):
        print(f"{f'{name}, {width} and {2 * width} channels':42s} {value:5.1f} %")

# --- the picture ----------------------------------------------------------------------------------

COLOURS = ("#999999", "#4477aa", "#228833")
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for i, ((name, values), colour) in enumerate(
    zip(curves.items(), COLOURS[-len(WAYS) :], strict=True)
):
    places = [place + 0.26 * (i - 1) for place in range(len(TARGETS))]
    bars = axes.bar(places, values, 0.24, color=colour, label=name)
    axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=-13, color="white")
for (name, model), style in zip(models.items(), ("-", "--"), strict=True):
    axes.axhline(accuracy(model), color="#222222", lw=1, ls=style, zorder=0, label=f"{name} parent")
axes.set_xticks(
    range(len(TARGETS)),
    [f"{width} and {2 * width} channels\n{of}" for width, of in zip(
        TARGETS, ("as the narrow parent", "as a template", "as the wide parent"), strict=True
    )],
)  # fmt: skip
axes.set_ylim(0, 108)
axes.set_ylabel("right of the test images (%)")
axes.set_title("A wide and a narrow network, fused into three widths")
figure.legend(loc="outside lower center", ncols=3, frameon=False)
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
