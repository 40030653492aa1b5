"""Fuse four and six networks of different depth in one call, without training.

    CLAFUSION_DATA=... python -m benchmarks.experiments.several_models [--quick]

Multilayer perceptrons on MNIST and ResNets on CIFAR-10, all from different starts, by all
strategies with equal weights (CLAFusion, arXiv 2110.15538, fuses four and six, too). The quick form
takes narrower networks, and for CIFAR-10 images of half the size and a few of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar_resnet import CifarResNet
from benchmarks.datasets import accuracy, logits, mnist
from benchmarks.experiments.cifar_pairs import data
from benchmarks.experiments.experiment import arguments, run, trained
from benchmarks.mnist_mlp import mlp
from clafusion import Barycentre, Iterative, ManyToOne, Merging, fuse

COUNTS = (4, 6)
CALIBRATIONS = ("repair", "least_squares")
QUICK: dict[str, Any] = {
    "mnist_images": 10_000,
    "mlp_hidden": [200, 100, 50, 25],
    "mlp_depths": [4, 3, 2, 4, 3, 2],
    "mlp_epochs": 4,
    "images": 4000,
    "pooled": 2,
    "test": 4000,
    "widths": [8, 16, 32],
    "blocks": [3, 2, 1, 3, 2, 1],
    "epochs": 8,
    "unlabelled": 500,
    "max_rounds": 4,  # of a barycentre, which rarely comes to rest with ResNets
}
FULL: dict[str, Any] = {
    "mnist_images": 60_000,
    "mlp_hidden": [400, 200, 100, 50, 25],
    "mlp_depths": [5, 4, 3, 2, 5, 3],
    "mlp_epochs": 10,
    "images": 50_000,
    "pooled": 1,
    "test": None,
    "widths": [16, 32, 64],
    "blocks": [5, 3, 4, 2, 6, 3],
    "epochs": 100,
    "unlabelled": 2000,
    "max_rounds": 10,
}


def scores(
    family: str,
    models: Sequence[nn.Module],
    images: Tensor,
    test: tuple[Tensor, Tensor],
    settings: dict[str, Any],
    seed: int,
) -> dict[str, float]:
    """Return the accuracy of the first four and of all models, alone, together and fused."""
    found = {}
    parents = [accuracy(model, *test) for model in models]
    outputs = [logits(model, test[0]).softmax(1) for model in models]
    for count in COUNTS:
        name = f"{family}, {count} models"
        found[f"{name}: parents' mean"] = sum(parents[:count]) / count
        found[f"{name}: best parent"] = max(parents[:count])
        right = torch.stack(outputs[:count]).sum(0).argmax(1) == test[1]
        found[f"{name}: side by side"] = float(right.double().mean())
        for strategy in (Iterative(), ManyToOne(), Barycentre(settings["max_rounds"])):
            for calibration in CALIBRATIONS:
                fused = fuse(
                    models[:count],
                    images[: settings["unlabelled"]],
                    merging=Merging(strategy),
                    calibration=calibration,
                    seed=seed,
                ).model.eval()
                row = f"{name}: {strategy.name}, {calibration}"
                found[row] = accuracy(fused, *test)
                print(f"{row:50s} {100 * found[row]:6.2f} %", flush=True)
    return found


def main() -> None:
    given = arguments(__doc__, seeds=3)
    settings = QUICK if given.quick else FULL
    digits, digit_labels = (
        one.to(given.device) for one in mnist("train", settings["mnist_images"])
    )
    digits_test = tuple(one.to(given.device) for one in mnist("test"))
    train, test = data(settings, given.device)

    def one_seed(seed: int) -> dict[str, float]:
        mlps = [
            trained(
                mlp((784, *settings["mlp_hidden"][:depth], 10), seed + 1000 * i).to(given.device),
                digits,
                digit_labels,
                settings["mlp_epochs"],
                seed + 1000 * i,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
            )
            for i, depth in enumerate(settings["mlp_depths"])
        ]
        found = scores("MNIST", mlps, digits, digits_test, settings, seed)
        resnets = []
        for i, blocks in enumerate(settings["blocks"]):
            torch.manual_seed(seed + 1000 * i)
            start = CifarResNet(blocks, tuple(settings["widths"])).to(given.device)
            resnets.append(
                trained(
                    start,
                    *train,
                    settings["epochs"],
                    seed + 1000 * i,
                    learning_rate=0.1,
                    weight_decay=5e-4,
                )
            )
        return found | scores("CIFAR-10", resnets, train[0], test, settings, seed)

    run("several_models", given, settings, one_seed, title="Test accuracy")


if __name__ == "__main__":
    main()
