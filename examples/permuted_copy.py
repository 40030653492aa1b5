"""Fuse a network with a shuffled copy of itself.

The channels of a trained network can change places without a change to what it computes, so a
network and its shuffled copy are the same function with very different weights. The mean of the
weights as they are is ruined; fusion finds which channels belong together, and every mixture is the
network itself.
"""

import argparse
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import clafusion

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output/permuted_copy.png")
parser.add_argument("--quick", action="store_true", help="train briefly")
arguments = parser.parse_args()

# --- a network, and a copy of it with all channels in another order -----------------------------

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(8 if arguments.quick else 30):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
model.eval()

traced = clafusion.trace(model, images[:2])
shuffles = [torch.randperm(group.size) for group in traced.groups]
shuffled = copy.deepcopy(model)
shuffled.load_state_dict(clafusion.permute_channels(model.state_dict(), traced.groups, shuffles))

# --- fused ---------------------------------------------------------------------------------------

result = clafusion.fuse({"network": model, "shuffled": shuffled}, images[train], calibration="none")


@torch.no_grad()
def accuracy(of):
    return 100 * float((of(images[test]).argmax(1) == labels[test]).float().mean())


def matched(weight):
    """Return the mean of both at another weight, by the same plans."""
    mixed = copy.deepcopy(model)
    of_parents = [clafusion.MergeWeights(1 - weight), clafusion.MergeWeights(weight)]
    mixed.load_state_dict(clafusion.average(result.problem, of_parents))
    return mixed


weights = torch.linspace(0, 1, 21).tolist()
by_order = [accuracy(clafusion.naive_average(result.problem, [1 - one, one])) for one in weights]
by_plans = [accuracy(matched(one)) for one in weights]
with torch.no_grad():
    gap = (result.model(images[test]) - model(images[test])).abs().max()

print("right of 597 test images")
print(f"{'network':28s} {accuracy(model):5.1f} %")
print(f"{'shuffled copy':28s} {accuracy(shuffled):5.1f} %")
print(f"{'averaged as they are':28s} {by_order[10]:5.1f} %")
print(f"{'matched':28s} {by_plans[10]:5.1f} %")
print(f"the fused network's outputs are the network's up to {float(gap):.0e}")

# --- the picture ----------------------------------------------------------------------------------

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 4), layout="constrained", width_ratios=(1, 1.3)
)
plan = next(one for one in result.parents if not one.is_identity).plans[0]
left.imshow((plan.dense() > 0).numpy(), cmap="Blues", interpolation="nearest")
left.set_xticks(range(0, 40, 10))
left.set_yticks(range(0, 40, 10))
left.set_xlabel("channel of the network")
left.set_ylabel("channel of the shuffled copy")
left.set_title("Which channels of the first layer\nbelong together")
right.plot(weights, by_order, "o-", ms=4, color="#999999", label="averaged as they are")
right.plot(weights, by_plans, "o-", ms=4, color="#228833", label="matched")
right.set_xlabel("weight of the shuffled copy")
right.set_ylabel("right of the test images (%)")
right.set_title("What their means are worth")
right.set_ylim(0, 103)
right.grid(alpha=0.3)
right.legend(loc="lower left")
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
