"""Merge three classifiers that were trained from one base, by each published rule.

    CLAFUSION_DATA=... python -m benchmarks.experiments.one_origin [--quick]

A perceptron is trained briefly on the digits of MNIST, and then a copy of it on each of three
tasks: digits that are turned, inverted or mirrored. The copies are merged by their task vectors,
with the published scalings, and calibrated by unlabelled images of all tasks: towards the models'
mean, or *by task*, towards each model on images of its own task. Each row is the mean accuracy over
the tests of the three tasks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets import accuracy, logits, mnist
from benchmarks.experiments.experiment import arguments, run, trained
from benchmarks.mnist_mlp import mlp
from clafusion import Average, Dare, MergeMethod, Sensitivity, TaskArithmetic, Ties, merge

CALIBRATIONS = ("repair", "least_squares")
METHODS: dict[str, MergeMethod] = {
    "average": Average(),
    "task arithmetic": TaskArithmetic(),
    "TIES": Ties(),
    "DARE": Dare(),
    "DARE, elect": Dare(elect=True, scaling=1.0),
    "sensitivity": Sensitivity(),
}
QUICK: dict[str, Any] = {
    "images": 10_000,
    "hidden": [200, 100, 50],
    "base_epochs": 1,
    "epochs": 2,
    "learning_rate": 1e-3,
    "unlabelled": 900,
}
FULL: dict[str, Any] = {
    "images": 60_000,
    "hidden": [400, 200, 100],
    "base_epochs": 2,
    "epochs": 4,
    "learning_rate": 1e-3,
    "unlabelled": 3000,
}


def tasks(images: Tensor) -> dict[str, Tensor]:
    """Return the same digits as each task shows them."""
    square = images.view(-1, 28, 28)
    return {
        "turned": square.rot90(1, (1, 2)).flatten(1),
        "inverted": images.amin() + images.amax() - images,
        "mirrored": square.flip(2).flatten(1),
    }


def main() -> None:
    given = arguments(__doc__, seeds=5)
    settings = QUICK if given.quick else FULL
    images, labels = (one.to(given.device) for one in mnist("train", settings["images"]))
    test_images, test_labels = (one.to(given.device) for one in mnist("test"))
    tests = tasks(test_images)

    def mean_accuracy(model: nn.Module) -> float:
        return sum(accuracy(model, one, test_labels) for one in tests.values()) / len(tests)

    def further(model: nn.Module, seen: Tensor, epochs: int, seed: int) -> nn.Module:
        return trained(
            model,
            seen,
            labels,
            epochs,
            seed,
            optimizer=lambda parameters: torch.optim.AdamW(
                parameters, lr=settings["learning_rate"]
            ),
        )

    def one_seed(seed: int) -> dict[str, float]:
        start = mlp((784, *settings["hidden"], 10), seed).to(given.device)
        base = further(start, images, settings["base_epochs"], seed)
        models = {
            name: further(base, seen, settings["epochs"], seed + 1)
            for name, seen in tasks(images).items()
        }
        found = {"base": mean_accuracy(base)}
        own = [accuracy(models[name], one, test_labels) for name, one in tests.items()]
        found["each model on its own task"] = sum(own) / len(own)
        alone = [mean_accuracy(one) for one in models.values()]
        found["one model on all tasks, mean"] = sum(alone) / len(alone)
        found["best model on all tasks"] = max(alone)
        together = [
            torch.stack([logits(model, one).softmax(1) for model in models.values()]).sum(0)
            for one in tests.values()
        ]
        right = [float((one.argmax(1) == test_labels).double().mean()) for one in together]
        found["side by side"] = sum(right) / len(right)
        generator = torch.Generator().manual_seed(seed)
        of_task = settings["unlabelled"] // len(tests)
        chosen = torch.randperm(len(images), generator=generator)[:of_task].to(images.device)
        of_tasks = {name: one[chosen] for name, one in tasks(images).items()}
        mixed = torch.stack([*of_tasks.values()], 1).flatten(0, 1)
        for method, rule in METHODS.items():
            by_task = isinstance(rule, Sensitivity)  # which needs to know whose inputs are whose
            rows: dict[str, tuple[str, Any]] = {method: ("none", of_tasks if by_task else None)}
            for calibration in CALIBRATIONS:
                if not by_task:
                    rows[f"{method}, {calibration}"] = calibration, mixed
                rows[f"{method}, {calibration}, by task"] = calibration, of_tasks
            for row, (calibration, data) in rows.items():
                result = merge(base, models, data, method=rule, calibration=calibration, seed=seed)
                found[row] = mean_accuracy(result.model.eval())
                print(f"{row:40s} {100 * found[row]:6.2f} %", flush=True)
        print({name: round(far, 3) for name, far in result.distances.items()}, flush=True)
        return found

    run("one_origin", given, settings, one_seed, title="Mean accuracy over three tasks")


if __name__ == "__main__":
    main()
