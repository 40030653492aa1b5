"""CLAFusion's ablation on MNIST: layer costs x alignment modes x calibration, without training.

    CLAFUSION_DATA=... python -m benchmarks.experiments.mlp_ablation [--quick]

The pair of arXiv 2110.15538, section 5.1: 784-400-200-100-50-25-10 and 784-400-200-100-10.
"""

import torch

from benchmarks.datasets import accuracy, mnist
from benchmarks.experiments.experiment import arguments, run, trained
from benchmarks.mnist_mlp import DEEP, SHALLOW, mlp
from clafusion import Alignment, FusionConfig, align
from clafusion.config import LAYER_COSTS
from clafusion.fusion import fuse_aligned

CALIBRATIONS = ("none", "repair", "least_squares")


def main() -> None:
    given = arguments(__doc__, seeds=5)
    settings = {
        "images": 10_000 if given.quick else 60_000,
        "epochs": 4 if given.quick else 10,
        "unlabelled": 1000 if given.quick else 2000,
    }
    if given.quick:
        given.seeds = min(given.seeds, 3)
    images, labels = mnist("train", settings["images"])
    test = mnist("test")
    unlabelled = images[: settings["unlabelled"]]
    ways = [("layer", cost) for cost in LAYER_COSTS] + [("chain", ""), ("random", "")]

    def one_seed(seed: int) -> dict[str, float]:
        deep, shallow = (
            trained(
                mlp(widths, seed + offset),
                images,
                labels,
                settings["epochs"],
                seed + offset,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
            )
            for widths, offset in ((DEEP, 0), (SHALLOW, 1000))
        )
        found = {"deep parent": accuracy(deep, *test), "shallow parent": accuracy(shallow, *test)}
        for mode, cost in ways:
            for calibration in CALIBRATIONS:
                config = FusionConfig(
                    alignment=Alignment(cost=cost or "cka", mode=mode),
                    calibration=calibration,
                    seed=seed,
                )
                aligned = align([deep, shallow], unlabelled, config)
                model = fuse_aligned(aligned, unlabelled, config=config).model
                row = f"{mode}, {cost or 'no cost'}, {calibration}"
                found[row] = accuracy(model, *test)
        return found

    run("mlp_ablation", given, settings, one_seed, title="MNIST test accuracy")


if __name__ == "__main__":
    main()
