"""Fuse two multilayer perceptrons of different depth on MNIST: CLAFusion's ablation pair.

    CLAFUSION_DATA=... python -m benchmarks.mnist_mlp [--seeds 5] [--epochs 5]

784-400-200-100-50-25-10 and 784-400-200-100-10, with biases (arXiv 2110.15538, section 5.1). Trains
both for every seed, fuses them without training and prints the zero-shot test accuracy.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.datasets import accuracy, mnist
from benchmarks.results import write_results
from clafusion import Shallower, fuse, naive_average

DEEP = (784, 400, 200, 100, 50, 25, 10)
SHALLOW = (784, 400, 200, 100, 10)
BATCH = 256


def mlp(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    arguments = parser.parse_args()
    images, labels = mnist("train")
    test = mnist("test")
    calibration = images[: arguments.images]

    ways: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
        "deep parent": lambda deep, _: deep,
        "shallow parent": lambda _, shallow: shallow,
        "naive average": lambda *pair: naive_average(
            fuse(pair, calibration, calibration="none").problem
        ),
        "matched": lambda *pair: fuse(pair, calibration, calibration="none").model,
        "matched, REPAIR": lambda *pair: fuse(pair, calibration, calibration="repair").model,
        "matched, least squares": lambda *pair: (
            fuse(pair, calibration, calibration="least_squares").model
        ),
        "merged (shallow), least squares": lambda *pair: (
            fuse(pair, calibration, target="shallower", calibration="least_squares").model
        ),
    }
    for signs in ("sum", "majority", "average"):
        ways[f"merged by signs ({signs}), REPAIR"] = lambda *pair, signs=signs: (
            fuse(pair, calibration, target=Shallower(merge=signs), calibration="repair").model
        )

    scores: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(arguments.seeds):
        deep = train(mlp(DEEP, seed), images, labels, arguments.epochs, seed)
        shallow = train(mlp(SHALLOW, seed + 1000), images, labels, arguments.epochs, seed + 1000)
        for name, way in ways.items():
            scores[name].append(accuracy(way(deep, shallow), *test))
        print(seed, {name: round(values[-1], 4) for name, values in scores.items()}, flush=True)
    table = {
        name: {"mean": statistics.mean(values), "stdev": statistics.pstdev(values), "all": values}
        for name, values in scores.items()
    }
    for name, row in table.items():
        print(f"{name:34s} {100 * row['mean']:6.2f} % +- {100 * row['stdev']:.2f}")
    write_results("mnist_mlp", {"epochs": arguments.epochs, "accuracies": table})


if __name__ == "__main__":
    main()
