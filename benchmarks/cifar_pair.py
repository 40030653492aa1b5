"""Fuse the two real CIFAR-10 checkpoints, ResNet-20 and ResNet-32, and print what came of it.

    CLAFUSION_DATA=... python -m benchmarks.cifar_pair [--test 2000] [--images 2000]

Shows that inserted layers change nothing, then the test accuracy of every way to average them, over
the weight of ResNet-32. How much depends on which images are taken show five random draws.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.datasets import accuracy, checkpoint_pair, cifar10, logits
from benchmarks.results import write_results
from clafusion import Calibration, LeastSquares, fuse, inserted_model, naive_average
from clafusion.calibration.batchnorm import reset_batchnorm
from clafusion.weights.build import with_state

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAWS = 5  # of unlabelled images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    arguments = parser.parse_args()
    shallow, deep = checkpoint_pair()
    calibration, _ = cifar10("train", arguments.images)
    images, labels = cifar10("test", arguments.test)

    result = fuse([shallow, deep], calibration, calibration="none")
    parent, target = result.parents[0], result.problem.target
    deepened = inserted_model(deep, parent.correspondence).eval()
    # The shallow network alone, in the deep one's structure and order of channels.
    moved = with_state(deep, {**target.state(), **parent.state()}, target.aliases).eval()
    exact = {
        "deepened ResNet-20 against ResNet-20": deepened,
        "deepened and permuted ResNet-20 against ResNet-20": moved,
    }
    wanted = logits(shallow, images)
    differences = {
        name: float((logits(model, images) - wanted).abs().max()) for name, model in exact.items()
    }
    kept = fuse([shallow, deep], calibration, [0.0, 1.0]).model
    differences["weight 1 against ResNet-32"] = float(
        (logits(kept, images) - logits(deep, images)).abs().max()
    )
    both = logits(shallow, images) + logits(deep, images)
    parents = {
        "ResNet-20": accuracy(shallow, images, labels),
        "ResNet-32": accuracy(deep, images, labels),
        "ensemble": float((both.argmax(1) == labels).double().mean()),
    }

    def naive(weight: float) -> nn.Module:
        return naive_average(result.problem, [1.0 - weight, weight])

    def naive_reset(weight: float) -> nn.Module:
        model = naive(weight)
        reset_batchnorm(model, calibration, (calibration[:2],))
        return model

    def fused(how: str | Calibration) -> Callable[[float], nn.Module]:
        return lambda weight: (
            fuse([shallow, deep], calibration, [1.0 - weight, weight], calibration=how).model
        )

    ways = {
        "naive average": naive,
        "naive average, BatchNorm reset": naive_reset,
        "matched": fused("none"),
        "matched, BatchNorm reset": fused("batchnorm"),
        "matched, REPAIR": fused("repair"),
        "matched, least squares, anchor 0": fused(LeastSquares(anchor=0.0)),
        "matched, least squares": fused("least_squares"),
    }
    curves = {}
    for name, way in ways.items():
        curves[name] = [accuracy(way(weight).eval(), images, labels) for weight in WEIGHTS]
        print(f"{name:32s}", *(f"{100 * one:6.2f}" for one in curves[name]), flush=True)

    every, _ = cifar10("train")
    draws = []
    for seed in range(DRAWS):
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        drawn = every[order[: arguments.images]]
        draws.append(accuracy(fuse([shallow, deep], drawn).model.eval(), images, labels))
    print(
        f"{'least squares, other images':32s} {100 * statistics.mean(draws):6.2f} +- "
        f"{100 * statistics.pstdev(draws):.2f}",
        *(f"{100 * one:6.2f}" for one in draws),
    )

    print(result.alignment.deep_to_shallow, "forced" if result.alignment.forced else "chosen")
    for name, difference in differences.items():
        print(f"{name:50s} max difference {difference:.1e}")
    for name, value in parents.items():
        print(f"{name:50s} {100 * value:6.2f} %")
    write_results(
        "cifar_pair",
        {
            "test_images": len(images),
            "calibration_images": len(calibration),
            "alignment": result.alignment.deep_to_shallow,
            "differences": differences,
            "parents": parents,
            "weights": WEIGHTS,
            "curves": curves,
            "least squares at equal weights, other images": draws,
        },
    )


if __name__ == "__main__":
    main()
