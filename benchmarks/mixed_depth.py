"""Fuse networks of which each is the deeper one somewhere, and fuse into a third architecture.

    CLAFUSION_DATA=... python -m benchmarks.mixed_depth [--seeds 2] [--images 10000]

Two VGG networks with BatchNorm, one with its layers in the early stages and one in the late ones,
trained briefly on MNIST: fused into their union, and into a narrower and a wider architecture of
that depth. And the two CIFAR-10 checkpoints, ResNet-20 and ResNet-32, fused into a ResNet-26.
Zero-shot test accuracy; there is no peer that fuses such pairs.
"""

import argparse
import statistics

from benchmarks.cifar_resnet import CifarResNet
from benchmarks.datasets import accuracy, checkpoint_pair, cifar10
from benchmarks.results import write_results
from benchmarks.widths import images, vgg
from clafusion import Deeper, Like, Target, fuse
from clafusion.training import finetune

EARLY = ((1, 1, 1), (2, 2), (4,), (8,))
LATE = ((1,), (2,), (4, 4), (8, 8, 8))
UNION = ((1, 1, 1), (2, 2), (4, 4), (8, 8, 8))
BASE = 16
WAYS = (("averaged", "none"), ("REPAIR", "repair"), ("least squares", "least_squares"))


def mixed(seeds: int, count: int) -> dict[str, list[float]]:
    """Return the accuracies of the VGG pair, one for each seed."""
    train, test = images("train", count), images("test", 4000)
    calibration = train[0][:1000]
    scores: dict[str, list[float]] = {}
    for seed in range(seeds):
        early, late = (
            finetune(model, train, epochs=2, seed=seed, held_out=0).model.eval()
            for model in (vgg(EARLY, BASE, seed), vgg(LATE, BASE, seed + 1000))
        )
        found = {"early layers": accuracy(early, *test), "late layers": accuracy(late, *test)}
        targets: dict[str, Target] = {
            "union": Deeper(),
            "three quarters as wide": Like(vgg(UNION, 0.75 * BASE, 0)),
            "one and a half times as wide": Like(vgg(UNION, 1.5 * BASE, 0)),
        }
        for name, target in targets.items():
            for way, how in WAYS:
                model = fuse([early, late], calibration, target=target, calibration=how).model
                found[f"{name}: {way}"] = accuracy(model, *test)
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
        print(seed, {name: round(value, 4) for name, value in found.items()}, flush=True)
    return scores


def between(test_images: int) -> dict[str, float]:
    """Return the accuracies of the two checkpoints and of what a ResNet-26 takes of both."""
    shallow, deep = checkpoint_pair()
    calibration, _ = cifar10("train", 2000)
    test = cifar10("test", test_images)
    found = {"ResNet-20": accuracy(shallow, *test), "ResNet-32": accuracy(deep, *test)}
    for way, how in WAYS:
        target = Like(CifarResNet(4))
        model = fuse([shallow, deep], calibration, target=target, calibration=how).model
        found[f"ResNet-26: {way}"] = accuracy(model.eval(), *test)
        print(f"ResNet-26: {way}", round(found[f"ResNet-26: {way}"], 4), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--test", type=int, default=4000, help="CIFAR-10 test images")
    arguments = parser.parse_args()
    checkpoints = between(arguments.test)
    scores = mixed(arguments.seeds, arguments.images)
    for name, values in scores.items():
        print(f"{name:48s} {100 * statistics.mean(values):6.2f} %")
    for name, value in checkpoints.items():
        print(f"{name:48s} {100 * value:6.2f} %")
    facts = {"images": arguments.images, "accuracies": scores}
    facts |= {"cifar_test_images": arguments.test, "checkpoints": checkpoints}
    write_results("mixed_depth", facts)


if __name__ == "__main__":
    main()
