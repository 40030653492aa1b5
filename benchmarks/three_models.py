"""Fuse three CIFAR-10 networks of three depths in one call.

    CLAFUSION_DATA=... python -m benchmarks.three_models [--images 8000] [--epochs 4]

ResNet-20 and ResNet-32 by others, and a ResNet-14 that is distilled from both here, briefly, so
that it is the weakest. Zero-shot test accuracy of each way to fuse them, with 2,000 unlabelled
images.
"""

import argparse

from benchmarks.cifar_resnet import CifarResNet
from benchmarks.datasets import accuracy, checkpoint_pair, cifar10, logits
from benchmarks.results import write_results
from clafusion import Merging, fuse
from clafusion.training import distill

METHODS = ("iterative", "many_to_one", "barycentre")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8000, help="training images of the third")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    arguments = parser.parse_args()
    shallow, deep = checkpoint_pair()
    images, labels = cifar10("train", arguments.images)
    test = cifar10("test", arguments.test)
    third = distill(
        CifarResNet(2),
        [shallow, deep],
        (images, labels),
        epochs=arguments.epochs,
        learning_rate=0.1,
        held_out=0,
        seed=0,
    ).model.eval()
    models = [deep, shallow, third]
    calibration = images[:2000]
    both = sum(logits(model, test[0]) for model in models)
    scores = {
        "ResNet-32": accuracy(deep, *test),
        "ResNet-20": accuracy(shallow, *test),
        "ResNet-14": accuracy(third, *test),
        "ensemble of the three": float((both.argmax(1) == test[1]).double().mean()),
    }
    for weights in ((1, 1, 1), (2, 2, 1)):
        for method in METHODS:
            for way in ("repair", "least_squares"):
                result = fuse(
                    models, calibration, weights, merging=Merging(method), calibration=way
                )
                steps = result.steps or (result,)
                anchors = [step.anchor for step in steps if step.anchor is not None]
                name = f"{method}, {way}, weights {weights}"
                scores[name] = accuracy(result.model.eval(), *test)
                print(f"{name:48s} {100 * scores[name]:6.2f} %  anchors {anchors}", flush=True)
                write_results(
                    "three_models",
                    {
                        "images": arguments.images,
                        "epochs": arguments.epochs,
                        "accuracies": scores,
                    },
                )
    for name, value in scores.items():
        print(f"{name:48s} {100 * value:6.2f} %")


if __name__ == "__main__":
    main()
