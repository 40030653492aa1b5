"""Add a calibration and a channel cost of your own.

A class and a function make a calibration: the class holds its options, the function returns the
fused network's state. Another function makes a channel cost, and from then on both are options as
all others are.
"""

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import clafusion
from clafusion.profiling.batches import batches

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output/own_parts.png")
parser.add_argument("--quick", action="store_true", help="train briefly")
arguments = parser.parse_args()

# --- a calibration of one's own -------------------------------------------------------------------


@dataclass(frozen=True)
class OutputMoments(clafusion.Calibration, name="output_moments"):
    """Give the outputs the parents' mean and deviation, and leave all other layers as they are."""

    strength: float = clafusion.config.number(1.0, "1 is the parents', 0 the mean's own", high=1.0)


@clafusion.calibrates(OutputMoments)
@torch.no_grad()
def output_moments(problem, data, settings, **_):
    """Rescale and shift the last layer of the parents' mean."""
    state = clafusion.average(problem)
    weight, bias = problem.target.layers[-1].parameters
    inputs = list(batches(data, problem.target.example_inputs))
    outputs = torch.cat([problem.target.run(batch, state=state)[0] for batch in inputs])
    wanted = [torch.cat([one.traced.run(batch)[0] for batch in inputs]) for one in problem.parents]
    weights = [one.weights.overall for one in problem.parents]
    mean = sum(part * one.mean(0) for part, one in zip(weights, wanted, strict=True))
    deviation = sum(part * one.std(0) for part, one in zip(weights, wanted, strict=True))
    factor = (deviation / outputs.std(0)) ** settings.strength
    shift = settings.strength * (mean - outputs.mean(0))
    state[weight] = state[weight] * factor[:, None]
    state[bias] = (state[bias] - outputs.mean(0)) * factor + outputs.mean(0) + shift
    return state


# --- a channel cost of one's own ------------------------------------------------------------------


@clafusion.channel_cost("disagreement", "on how many inputs one channel is active and one is not")
def disagreement(x, y):
    """Costs of every two channels, from their values before the nonlinearity."""
    x, y = (x > 0).float(), (y > 0).float()
    return (x.T @ (1 - y) + (1 - x).T @ y) / len(x)


# --- both in use ----------------------------------------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]


def trained(widths, seed):
    torch.manual_seed(seed)
    layers = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(8 if arguments.quick else 30):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return 100 * float((model(images[test]).argmax(1) == labels[test]).float().mean())


models = [trained((64, 48, 48, 32, 32, 10), seed=1), trained((64, 64, 40, 10), seed=2)]
scores = {}
for calibration in ("none", OutputMoments(strength=1.0), "repair"):
    for cost in ("correlation", "disagreement"):
        result = clafusion.fuse(
            models, images[train], matching=clafusion.Matching(cost), calibration=calibration
        )
        scores[result.config.calibration.name, cost] = accuracy(result.model)

print("right of 597 test images")
for (calibration, cost), score in scores.items():
    print(f"{calibration + ', ' + cost:32s} {score:5.1f} %")

# --- the picture ----------------------------------------------------------------------------------

calibrations = list(dict.fromkeys(calibration for calibration, _ in scores))
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for i, (cost, colour) in enumerate((("correlation", "#4477aa"), ("disagreement", "#ee6677"))):
    places = [place + 0.36 * (i - 0.5) for place in range(len(calibrations))]
    bars = axes.bar(
        places, [scores[one, cost] for one in calibrations], 0.34, color=colour, label=cost
    )
    axes.bar_label(bars, fmt="%.1f", fontsize=9)
for model, style, name in zip(models, ("-", "--"), ("deep parent", "shallow parent"), strict=True):
    axes.axhline(accuracy(model), color="#222222", lw=1, ls=style, zorder=0, label=name)
axes.set_xticks(range(len(calibrations)), [f'"{one}"' for one in calibrations])
axes.set_xlabel("calibration")
axes.set_ylim(0, 108)
axes.set_ylabel("right of the test images (%)")
axes.set_title("A calibration and a channel cost of one's own, beside built-in ones")
figure.legend(loc="outside lower center", ncols=4, frameon=False)
arguments.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out, dpi=150)
print(f"drawn in {arguments.out}")
