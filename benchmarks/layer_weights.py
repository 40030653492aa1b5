"""Fuse with one weight for all layers, and with each matched layer's own by its sensitivity.

    CLAFUSION_DATA=... python -m benchmarks.layer_weights [--seeds 5] [--test 2000] [--images 2000]

The two CIFAR-10 checkpoints (ResNet-20 and ResNet-32) and the MNIST pair, at weight 0.5: zero-shot
test accuracy, and the layer weights.
"""

import argparse
import statistics

from torch import Tensor, nn

from benchmarks.datasets import accuracy, checkpoint_pair, cifar10, mnist
from benchmarks.mnist_mlp import DEEP, SHALLOW, mlp, train
from benchmarks.results import write_results
from clafusion import (
    BatchNorm,
    Calibration,
    FusionResult,
    LeastSquares,
    Merging,
    NoCalibration,
    Repair,
    fuse,
)

LAYER_WEIGHTS = ("uniform", "sensitivity")
WAYS: dict[str, Calibration] = {
    "averaged": NoCalibration(),
    "BatchNorm reset": BatchNorm(),
    "REPAIR": Repair(),
    "least squares, anchor 0": LeastSquares(anchor=0.0),
    "least squares, anchor 0.8": LeastSquares(anchor=0.8),
}
EPOCHS = 5


def accuracies(
    first: nn.Module, second: nn.Module, calibration: Tensor, test: tuple[Tensor, Tensor]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return each way's accuracy with each kind of layer weights, and these weights."""
    result: FusionResult | None = None
    found: dict[str, dict[str, float]] = {}
    for name, how in WAYS.items():
        found[name] = {}
        for kind in LAYER_WEIGHTS:
            merging = Merging(layer_weights=kind)
            result = fuse([first, second], calibration, merging=merging, calibration=how)
            found[name][kind] = accuracy(result.model.eval(), *test)
        print(f"{name:24s}", *(f"{k} {100 * a:.2f}" for k, a in found[name].items()), flush=True)
    assert result is not None
    deep = next(i for i, one in enumerate(result.parents) if one.is_identity)
    rows = zip(result.problem.target.layers, result.layer_weights, strict=True)
    # Of the layers that both networks have.
    return found, {layer.name: row[deep] for layer, row in rows if None not in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="pairs of MNIST networks")
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    arguments = parser.parse_args()

    calibration, _ = cifar10("train", arguments.images)
    cifar, weights = accuracies(*checkpoint_pair(), calibration, cifar10("test", arguments.test))
    print({name: round(weight, 3) for name, weight in weights.items()})

    images, labels = mnist("train")
    test = mnist("test", arguments.test)
    of_mnist, weights_mnist = [], []
    for seed in range(arguments.seeds):
        deep = train(mlp(DEEP, seed), images, labels, EPOCHS, seed)
        shallow = train(mlp(SHALLOW, seed + 1000), images, labels, EPOCHS, seed + 1000)
        found, own = accuracies(deep, shallow, images[: arguments.images], test)
        of_mnist.append(found)
        weights_mnist.append(own)
    table = {
        name: {
            kind: {
                "mean": statistics.mean(values),
                "stdev": statistics.pstdev(values),
                "all": values,
            }
            for kind in LAYER_WEIGHTS
            for values in [[found[name][kind] for found in of_mnist]]
        }
        for name in WAYS
    }
    for name, row in table.items():
        print(f"MNIST, {name:24s}", *(f"{k} {100 * one['mean']:.2f}" for k, one in row.items()))
    write_results(
        "layer_weights",
        {
            "calibration_images": arguments.images,
            "cifar_pair": {"accuracies": cifar, "deep_weights": weights},
            "mnist_pair": {"accuracies": table, "deep_weights": weights_mnist},
        },
    )


if __name__ == "__main__":
    main()
