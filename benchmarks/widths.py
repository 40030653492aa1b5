"""Fuse VGG networks of very different widths, into the widths of either.

    CLAFUSION_DATA=... python -m benchmarks.widths [--seeds 2] [--images 10000]

VGG-11 of half the base width and VGG-13 of double the base width, both with BatchNorm, trained
briefly on MNIST. Zero-shot test accuracy in both target widths, beside the single normalisation of
OTFusion's public code, by which a width ratio r scales every layer by 1 / r.
"""

import argparse
import statistics

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.datasets import accuracy, folder
from benchmarks.results import write_results
from clafusion import Deeper, Merging, fuse
from clafusion.training import finetune

BASE = 16
VGG11 = ((1,), (2,), (4, 4), (8, 8))
VGG13 = ((1, 1), (2, 2), (4, 4), (8, 8))


def vgg(plan: tuple[tuple[int, ...], ...], width: float, seed: int) -> nn.Sequential:
    """Make a VGG of four stages, each of which ends in a pooling."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    into = 1
    for stage in plan:
        for factor in stage:
            out = int(width * factor)
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            into = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(into, 10))


def images(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    with np.load(folder() / "mnist.npz") as arrays:
        x = torch.from_numpy(arrays[f"x_{split}"][:count]).float() / 255
        y = torch.from_numpy(arrays[f"y_{split}"][:count]).long()
    return (x.unsqueeze(1) - 0.1307) / 0.3081, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    arguments = parser.parse_args()
    train, test = images("train", arguments.images), images("test", 4000)
    calibration = train[0][:1000]
    scores: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        models = [
            finetune(model, train, epochs=2, seed=seed, held_out=0).model.eval()
            for model in (vgg(VGG13, 2 * BASE, seed), vgg(VGG11, BASE / 2, seed + 1000))
        ]
        found = {
            "VGG-13, double width": accuracy(models[0], *test),
            "VGG-11, half width": accuracy(models[1], *test),
        }
        ways = [
            ("averaged", "none"),
            ("REPAIR", "repair"),
            ("least squares", "least_squares"),
        ]
        for width in ("wide", "narrow"):
            for name, way in ways:
                model = fuse(models, calibration, target=Deeper(width), calibration=way).model
                found[f"VGG-13, {width}: {name}"] = accuracy(model, *test)
            for name, way in ways[:2]:
                model = fuse(
                    models,
                    calibration,
                    target=Deeper(width),
                    merging=Merging(normalisation="single"),
                    calibration=way,
                ).model
                found[f"VGG-13, {width}: single normalisation, {name}"] = accuracy(model, *test)
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
        print(seed, {name: round(value, 4) for name, value in found.items()}, flush=True)
    for name, values in scores.items():
        print(f"{name:48s} {100 * statistics.mean(values):6.2f} %")
    write_results("widths", {"images": arguments.images, "accuracies": scores})


if __name__ == "__main__":
    main()
