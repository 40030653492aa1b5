"""Fuse networks that learnt different things, and compare with what they put out side by side.

    CLAFUSION_DATA=... python -m benchmarks.unequal [--quick] [--mnist2] [--vgg] [--classes] [...]

Multilayer perceptrons of unlike depth and width on 2, 4 and 8 Dirichlet shares of MNIST; the
specialist and the generalist of skill transfer; VGG-11 with VGG-13 and ResNet-20 with ResNet-32 on
two Dirichlet shares of CIFAR-10; and, with --classes alone, networks of five classes each. Without
a flag all but these. The quick form takes minutes on two
cores, with narrow networks, images of half the size and few epochs; the full form wants a GPU.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.datasets import logits, mnist
from benchmarks.experiments.cifar_pairs import data as cifar
from benchmarks.experiments.experiment import arguments, run
from benchmarks.unequal.classes import CLASSES, run_classes
from benchmarks.unequal.methods import networks
from benchmarks.unequal.parents import dirichlet_shares, parents_of, specialist_and_generalist

ALPHA = 0.5  # of the Dirichlet distribution
MNIST: dict[bool, dict[str, Any]] = {
    True: {"images": 20_000, "epochs": 4, "unlabelled": 2000},
    False: {"images": 60_000, "epochs": 20, "unlabelled": 2000},
}
CIFAR: dict[bool, dict[str, Any]] = {
    True: {"images": 6000, "pooled": 2, "test": 2000, "epochs": 8, "unlabelled": 1000},
    False: {"images": 50_000, "pooled": 1, "test": None, "epochs": 100, "unlabelled": 2000},
}
TASKS: dict[str, tuple[str, int, str]] = {
    "mnist2": ("mlp", 2, "two multilayer perceptrons on Dirichlet shares of MNIST"),
    "mnist4": ("mlp", 4, "four of them"),
    "mnist8": ("mlp", 8, "eight of them"),
    "skill": ("mlp", 2, "a specialist and a generalist on MNIST"),
    "vgg": ("vgg", 2, "VGG-11 and VGG-13 on Dirichlet shares of CIFAR-10"),
    "resnet": ("resnet", 2, "ResNet-20 and ResNet-32 on Dirichlet shares of CIFAR-10"),
}
WIDTHS = {
    "vgg": {True: [16, 32, 32, 32], False: [64, 128, 256, 512, 512]},
    "resnet": {True: [8, 16, 32], False: [16, 32, 64]},
}


def main() -> None:
    flags = {name: text for name, (_, _, text) in TASKS.items()}
    given = arguments(__doc__, seeds=3, **flags, **CLASSES)
    for kind in CLASSES:
        if getattr(given, kind):
            run_classes(kind.removeprefix("classes_"), given)
    if any(getattr(given, kind) for kind in CLASSES):
        return
    for task in [name for name in TASKS if getattr(given, name)] or TASKS:
        run_task(task, given)


def run_task(task: str, given: argparse.Namespace) -> None:
    """Train, fuse and compare for every seed."""
    kind, count, text = TASKS[task]
    settings = {"alpha": ALPHA, **(MNIST if kind == "mlp" else CIFAR)[given.quick]}
    if kind == "mlp":
        train, test = mnist("train", settings["images"]), mnist("test")
    else:
        settings["widths"] = WIDTHS[kind][given.quick]
        train, test = cifar(settings, given.device)

    def right(outputs: Tensor) -> float:
        return float((outputs.argmax(1) == test[1]).double().mean())

    def one_seed(seed: int) -> dict[str, float]:
        labels = train[1].cpu()
        if task == "skill":
            shares = specialist_and_generalist(labels, seed)
        else:
            shares = dirichlet_shares(labels, count, ALPHA, seed)
        parents = parents_of(kind, settings, train, shares, seed, given.device)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        unlabelled = train[0][order[: settings["unlabelled"]]]
        outputs = [logits(one, test[0]) for one in parents]
        scores = [right(one) for one in outputs]
        fused = networks(parents, unlabelled, seed)
        return {
            "the better parent": max(scores),
            "the parents' mean": sum(scores) / count,
            "side by side, mean of logits": right(sum(outputs)),
            "side by side, mean of probabilities": right(sum(one.softmax(1) for one in outputs)),
            **{name: right(logits(one, test[0])) for name, one in fused.items()},
        }

    run(f"unequal_{task}", given, settings, one_seed, title=f"{text}: test accuracy")


if __name__ == "__main__":
    main()
