"""Fuse three networks that saw unequal shares of the data.

Three networks of three depths learn handwritten digits; each sees mostly a few of them, and one far
fewer images than the others. They are fused at once, with names and with weights by how much they
saw, and the result knows what all of them know.
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
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output/three_parents.png")
parser.add_argument("--quick", action="store_true", help="train briefly")
arguments = parser.parse_args()

# --- three networks, each with a share of the data -----------------------------------------------

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]

NETWORKS = {  # name -> widths, and the digits that it sees; of the others a twentieth
    "0 to 4": ((64, 64, 48, 48, 32, 10), range(5)),
    "5 to 7": ((64, 80, 40, 10), range(5, 8)),
    "8 and 9": ((64, 64, 48, 32, 10), range(8, 10)),
}


def trained(widths, chosen, seed):
    torch.manual_seed(seed)
    layers = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(20 if arguments.quick else 60):
        for batch in chosen[torch.randperm(len(chosen))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


models, seen = {}, {}
for seed, (name, (widths, known)) in enumerate(NETWORKS.items()):
    is_known = torch.isin(labels[train], torch.tensor(list(known)))
    chosen = train[is_known | (torch.arange(len(train)) % 20 == seed)]
    models[name], seen[name] = trained(widths, chosen, seed), len(chosen)

# --- fused at once --------------------------------------------------------------------------------

result = clafusion.fuse(models, images[train], seen, calibration="least_squares")
networks = {
    **{f"mostly {name}, {seen[name]} images": model for name, model in models.items()},
    "averaged as they are": clafusion.naive_average(result.problem),
    "fused": result.model,
}
with torch.no_grad():
    outputs = {name: model(images[test]) for name, model in networks.items()}
    outputs["all three side by side"] = sum(
        weight * model(images[test]).softmax(1)
        for weight, model in zip(result.weights, models.values(), strict=True)
    )

right = {name: (output.argmax(1) == labels[test]).float() for name, output in outputs.items()}
table = torch.stack(
    [
        torch.stack([one[labels[test] == digit].mean() for digit in range(10)])
        for one in right.values()
    ]
)
print("right of 597 test images, all digits")
for name, one in right.items():
    print(f"{name:28s} {100 * float(one.mean()):5.1f} %")

# --- the picture ----------------------------------------------------------------------------------

figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
axes.imshow((100 * table).numpy(), cmap="viridis", vmin=0, vmax=100, aspect="auto")
for row, values in enumerate(table.tolist()):
    for digit, value in enumerate(values):
        axes.text(digit, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9,
                  color="black" if value > 0.6 else "white")  # fmt: skip
axes.set_xticks(range(10))
axes.set_yticks(
    range(len(right)), [f"{name}:  {100 * float(one.mean()):.0f} %" for name, one in right.items()]
)
for line in (2.5, 4.5):
    axes.axhline(line, color="white", lw=3)
axes.set_xlabel("digit")
axes.set_title("How many of each digit's test images are right (%)")
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
