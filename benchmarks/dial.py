"""The dial from the average of two networks to both side by side: quality over the width.

    CLAFUSION_DATA=... python -m benchmarks.dial [--task cifar|skill] [--test 2000] [--images 2000]

Fuses two networks at equal weights at widths from 1 to 2 (``target=Wider(factor)``), averaged, by
REPAIR and by least squares, and draws the test accuracies over the width, beside those of the
parents and of both side by side, and what each costs: parameters and floating-point operations for
an input. The networks are the CIFAR-10 checkpoints ResNet-20 and ResNet-32, or the specialist and
the generalist of the skill transfer (seed 0).
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from torch import Tensor, nn

from benchmarks.datasets import checkpoint_pair, cifar10, logits, mnist
from benchmarks.experiments.skill_transfer import skilled_pair, unlabelled_images
from benchmarks.results import write_results
from clafusion import Wider, align, trace
from clafusion.batch.prepared import operations_of
from clafusion.config import FusionConfig
from clafusion.fusion import fuse_aligned

mpl.use("Agg")

FACTORS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
WAYS = ("none", "repair", "least_squares")
NAMES = {"none": "averaged", "repair": "REPAIR", "least_squares": "least squares"}


def networks(task: str, images: int, test: int | None) -> tuple[list[nn.Module], Any, Any]:
    """Return two networks, unlabelled images and labelled test images."""
    if task == "cifar":
        return list(checkpoint_pair()), cifar10("train", images)[0], cifar10("test", test)
    train, labels = mnist("train", 20_000)
    models = skilled_pair(0, train, labels, epochs=5)
    x, y = mnist("test")
    return models, unlabelled_images(0, train, images), (x[:test], y[:test])


def cost(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Return a network's parameters, and its operations for an image."""
    traced = trace(model, images[:2], verify=False)
    parameters = sum(one.numel() for one in model.parameters())
    return {"parameters": parameters, "operations": operations_of(traced)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=["cifar", "skill"], default="cifar")
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    given = parser.parse_args()
    models, unlabelled, (images, labels) = networks(given.task, given.images, given.test)

    def accuracy(outputs: Tensor) -> float:
        return float((outputs.argmax(1) == labels).double().mean())

    of_parents = [logits(one, images) for one in models]
    costs = [cost(one, images) for one in models]
    found: dict[str, Any] = {
        "task": given.task,
        "test_images": len(images),
        "calibration_images": len(unlabelled),
        "parents": [accuracy(one) for one in of_parents],
        "side by side, mean logits": accuracy(sum(of_parents)),
        "side by side, mean probabilities": accuracy(sum(one.softmax(1) for one in of_parents)),
        "cost of the parents": costs,
        "cost side by side": {name: sum(one[name] for one in costs) for name in costs[0]},
        "factors": [],
    }
    print({name: one for name, one in found.items() if name != "factors"}, flush=True)
    settings = FusionConfig(calibration="repair", assessment="none")  # which needs statistics, too
    name = f"dial_{given.task}"
    aligned = align(models, unlabelled, settings)
    for factor in given.factors:
        row: dict[str, Any] = {"factor": factor}
        for way in given.ways:
            settings = FusionConfig(target=Wider(factor), calibration=way, assessment="none")
            result = fuse_aligned(aligned, unlabelled, None, settings)
            row[NAMES[way]] = accuracy(logits(result.model.eval(), images))
            row |= cost(result.model, images)
        found["factors"].append(row)
        print(row, flush=True)
        write_results(name, found)
        draw(found, Path(__file__).parent / "results" / f"{name}.png")


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the accuracies, and the costs, over the width."""
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    rows = found["factors"]
    x = [row["factor"] for row in rows]
    for name in NAMES.values():
        if name in rows[0]:
            upper.plot(x, [100 * row[name] for row in rows], marker="o", label=name)
    levels = {"better parent": max(found["parents"])}
    levels |= {name: level for name, level in found.items() if name.startswith("side by side")}
    for style, (name, level) in zip(("-.", "--", ":"), levels.items(), strict=True):
        upper.axhline(100 * level, color="#666666", linewidth=1, linestyle=style, label=name)
    upper.set_ylabel("test accuracy, %")
    upper.legend(frameon=False)
    for name in ("parameters", "operations"):
        whole = found["cost side by side"][name]
        lower.plot(x, [row[name] / whole for row in rows], marker="o", label=name)
    lower.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--")
    lower.set_ylabel("cost, of that side by side")
    lower.set_xlabel("width")
    lower.legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
