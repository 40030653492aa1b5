"""Skill transfer on MNIST: fuse a specialist and a generalist that never saw each other's data.

    CLAFUSION_DATA=... python -m benchmarks.experiments.skill_transfer [--quick]

The split of OTFusion (arXiv 1910.05653, section 5.1), with networks of different depth: the
specialist (deep) learns all of class 4 and 10 % of the other classes, the generalist (shallow) the
other 90 % and no 4.
"""

import torch
from torch import Tensor, nn

from benchmarks.datasets import logits, mnist
from benchmarks.experiments.experiment import arguments, run, trained
from benchmarks.mnist_mlp import DEEP, SHALLOW, mlp
from clafusion import fuse, naive_average

SPECIAL = 4


def skilled_pair(seed: int, images: Tensor, labels: Tensor, epochs: int) -> list[nn.Module]:
    """Train the specialist and the generalist."""
    drawn = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    to_specialist = (labels == SPECIAL) | (drawn < 0.1)
    return [
        trained(
            mlp(widths, seed + offset),
            images[chosen],
            labels[chosen],
            epochs,
            seed + offset,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
        )
        for widths, offset, chosen in (
            (DEEP, 0, to_specialist),
            (SHALLOW, 1000, ~to_specialist),
        )
    ]


def unlabelled_images(seed: int, images: Tensor, count: int) -> Tensor:
    """Draw images of all classes to fuse with."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(len(images), generator=generator)  # which image is whose
    return images[torch.randperm(len(images), generator=generator)[:count]]


def main() -> None:
    given = arguments(__doc__, seeds=5)
    settings = {
        "images": 20_000 if given.quick else 60_000,
        "epochs": 5 if given.quick else 10,
        "unlabelled": 1000 if given.quick else 2000,
        "weights": [0.25, 0.5, 0.75] if given.quick else [i / 10 for i in range(1, 10)],
    }
    if given.quick:
        given.seeds = min(given.seeds, 3)
    images, labels = mnist("train", settings["images"])
    test_images, test_labels = mnist("test")
    special = test_labels == SPECIAL

    def one_seed(seed: int) -> dict[str, float]:
        specialist, generalist = skilled_pair(seed, images, labels, settings["epochs"])
        unlabelled = unlabelled_images(seed, images, settings["unlabelled"])
        found: dict[str, float] = {}

        def record(row: str, outputs: Tensor) -> None:
            right = (outputs.argmax(1) == test_labels).double()
            found[row] = float(right.mean())
            found[f"{row}, class {SPECIAL} alone"] = float(right[special].mean())

        record("specialist (deep)", logits(specialist, test_images))
        record("generalist (shallow)", logits(generalist, test_images))
        both = [logits(one, test_images).softmax(1) for one in (specialist, generalist)]
        record("both side by side", both[0] + both[1])
        for weight in settings["weights"]:
            results = {
                name: fuse(
                    [specialist, generalist],
                    unlabelled,
                    [1.0 - weight, weight],
                    calibration=name,
                    seed=seed,
                )
                for name in ("none", "repair", "least_squares")
            }
            models: dict[str, nn.Module] = {
                f"matched, {name}": one.model for name, one in results.items()
            }
            models["naive average"] = naive_average(results["none"].problem)
            for name, model in models.items():
                record(f"{name}, generalist's share {weight}", logits(model, test_images))
        return found

    run("skill_transfer", given, settings, one_seed, title="MNIST test accuracy")


if __name__ == "__main__":
    main()
