"""Two networks of five classes each share a trunk: over how much of it is shared."""

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar_resnet import CifarResNet
from benchmarks.datasets import logits, mnist
from benchmarks.experiments.cifar_pairs import data as cifar
from benchmarks.experiments.experiment import run, trained
from benchmarks.mnist_mlp import DEEP, SHALLOW, mlp
from clafusion import FusionConfig, NoCalibration
from clafusion.fusion import align, fuse_aligned
from clafusion.merging.naive import unmatched
from clafusion.shared_trunk.fuse import assembled

CLASSES = {
    "classes_mnist": "MNIST perceptrons of the digits 0 to 4 and 5 to 9",
    "classes_resnet": "ResNets of CIFAR-10, the first five and the last five classes",
}
FIVE = 5
SHARED = (0.25, 0.5, 0.75, 1.0)
METHODS = {
    "matched, averaged": "none",
    "matched, REPAIR": "repair",
    "least squares": "least_squares",
}
SETTINGS: dict[str, dict[bool, dict[str, Any]]] = {
    "mnist": {
        True: {"images": 20_000, "epochs": 4, "unlabelled": 2000, "shared": SHARED},
        False: {"images": 60_000, "epochs": 20, "unlabelled": 2000, "shared": SHARED},
    },
    "resnet": {
        True: {
            "images": 10_000,
            "pooled": 2,
            "test": 2000,
            "epochs": 8,
            "unlabelled": 1000,
            "blocks": (2, 1),
            "widths": (16, 32, 64),
            "shared": SHARED,
        },
        False: {
            "images": 50_000,
            "pooled": 1,
            "test": None,
            "epochs": 100,
            "unlabelled": 2000,
            "blocks": (5, 3),
            "widths": (16, 32, 64),
            "shared": SHARED,
        },
    },
}


def run_classes(kind: str, given: argparse.Namespace) -> None:
    """Train, fuse and compare for every seed."""
    settings = SETTINGS[kind][given.quick]
    if kind == "mnist":
        train, test = mnist("train", settings["images"]), mnist("test")
    else:
        train, test = cifar(settings, given.device)

    def one_seed(seed: int) -> dict[str, float]:
        parents = [
            of_classes(kind, settings, train, task, seed + 1000 * task, given.device)
            for task in range(2)
        ]
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
        unlabelled = train[0][order[: settings["unlabelled"]]]
        return accuracies(parents, unlabelled, test, settings["shared"], seed)

    run(
        f"unequal_classes_{kind}",
        given,
        settings,
        one_seed,
        title=f"{CLASSES[f'classes_{kind}']}: test accuracy over all ten",
    )


def of_classes(
    kind: str,
    settings: dict[str, Any],
    data: tuple[Tensor, Tensor],
    task: int,
    seed: int,
    device: str,
) -> nn.Module:
    """Return a network of the first five classes (task 0) or of the last five (task 1)."""
    rows = data[1] // FIVE == task
    if kind == "mnist":
        model: nn.Module = mlp((*(DEEP, SHALLOW)[task][:-1], FIVE), seed)
    else:
        torch.manual_seed(seed)
        model = CifarResNet(settings["blocks"][task], tuple(settings["widths"]))
        model.linear = nn.Linear(settings["widths"][-1], FIVE)
    rate, decay = (2e-3, 0.01) if kind == "mnist" else (2e-3, 0.05)
    return trained(
        model.to(device),
        data[0][rows],
        data[1][rows] - FIVE * task,
        settings["epochs"],
        seed,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay),
    )


def accuracies(
    parents: list[nn.Module],
    unlabelled: Tensor,
    test: tuple[Tensor, Tensor],
    shares: tuple[float, ...],
    seed: int,
) -> dict[str, float]:
    """Return the accuracy of every way, by what its row is called."""
    labels = test[1]
    found = {
        f"parent {task} on its five classes": right(
            logits(parent, test[0][labels // FIVE == task]),
            labels[labels // FIVE == task] - FIVE * task,
        )
        for task, parent in enumerate(parents)
    }
    side = torch.cat([logits(one, test[0]) for one in parents], 1)
    found["side by side"] = right(side, labels)
    found["side by side, by probabilities"] = right(by_probabilities(side), labels)
    config = FusionConfig(outputs="both", calibration="repair", seed=seed)
    aligned = align(parents, unlabelled, config)
    for shared in shares:
        for name, calibration in METHODS.items():
            settings = replace(config, shared=shared, calibration=calibration)
            result = fuse_aligned(aligned, unlabelled, config=settings)
            row = f"{shared:.0%} shared"
            if not any(one.startswith(f"{row}, naive") for one in found):
                plain = replace(settings, calibration=NoCalibration())
                naive = assembled(
                    result.aligned,
                    result.split,
                    unmatched(result.problem),
                    result.sizes,
                    unlabelled,
                    plain,
                ).model.eval()
                found[f"{row}, naive average"] = right(logits(naive, test[0]), labels)
                size = sum(one.numel() for one in result.model.parameters())
                whole = sum(one.numel() for of in parents for one in of.parameters())
                print(f"{row}: {result.shared_text}, {size / whole:.0%} of both", flush=True)
            outputs = logits(result.model.eval(), test[0])
            found[f"{row}, {name}"] = right(outputs, labels)
            if calibration == "least_squares":
                found[f"{row}, {name}, by probabilities"] = right(by_probabilities(outputs), labels)
                found[f"{row}, {name}, each on its five classes"] = of_tasks(outputs, labels)
    return found


def of_tasks(outputs: Tensor, labels: Tensor) -> float:
    """Return the share of inputs for which the largest output of their own task is the label."""
    tasks = outputs.view(len(outputs), 2, FIVE)[torch.arange(len(labels)), labels // FIVE]
    return right(tasks, labels % FIVE)


def by_probabilities(outputs: Tensor) -> Tensor:
    """Return each task's probabilities in place of its logits."""
    return outputs.view(len(outputs), 2, FIVE).softmax(2).flatten(1)


def right(outputs: Tensor, labels: Tensor) -> float:
    """Return the share of inputs for which the largest output is the label."""
    return float((outputs.argmax(1) == labels).double().mean())
