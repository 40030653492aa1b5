"""Fuse the two real CIFAR-10 checkpoints, ResNet-20 and ResNet-32, and print what came of it.

    CLAFUSION_DATA=... python -m benchmarks.cifar_pair [--test 2000] [--images 2000]

Shows that lifting is exact, then the test accuracy of every way to average them.
"""

import argparse

from benchmarks.datasets import accuracy, checkpoint_pair, cifar10, logits
from benchmarks.results import write_results
from clafusion import fuse, lift
from clafusion.baselines import naive_average
from clafusion.blending import aligned_state
from clafusion.calibration import reset_batchnorm
from clafusion.depth import with_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    arguments = parser.parse_args()
    shallow, deep = checkpoint_pair()
    calibration, _ = cifar10("train", arguments.images)
    images, labels = cifar10("test", arguments.test)

    fused = {
        name: fuse(shallow, deep, calibration, calibration=name)
        for name in ("none", "batchnorm", "repair", "least_squares")
    }
    result = fused["none"]
    lifted = lift(deep, result.lifting).eval()
    # The shallow network alone, moved into the deep one's frame.
    aligned = {**result.lifting.deep.state(), **aligned_state(result.lifting, result.plans)}
    moved = with_state(deep, aligned, result.lifting.deep).eval()
    exact = {
        "lifted ResNet-20 against ResNet-20": lifted,
        "lifted and permuted ResNet-20 against ResNet-20": moved,
    }
    wanted = logits(shallow, images)
    differences = {
        name: float((logits(model, images) - wanted).abs().max()) for name, model in exact.items()
    }
    kept = fuse(shallow, deep, calibration, weight=1.0).model
    differences["weight 1 against ResNet-32"] = float(
        (logits(kept, images) - logits(deep, images)).abs().max()
    )
    naive, naive_reset = naive_average(result), naive_average(result)
    reset_batchnorm(naive_reset, calibration, (calibration[:2],))
    rows = {
        "ResNet-20": shallow,
        "ResNet-32": deep,
        "naive average": naive,
        "naive average, BatchNorm reset": naive_reset,
        "matched": fused["none"].model,
        "matched, BatchNorm reset": fused["batchnorm"].model,
        "matched, REPAIR": fused["repair"].model,
        "matched, least squares": fused["least_squares"].model,
    }
    accuracies = {name: accuracy(model.eval(), images, labels) for name, model in rows.items()}
    for weight in (0.25, 0.75):
        for name, calibration_name in (("REPAIR", "repair"), ("least squares", "least_squares")):
            model = fuse(
                shallow, deep, calibration, weight=weight, calibration=calibration_name
            ).model
            accuracies[f"matched, {name}, weight {weight}"] = accuracy(model, images, labels)

    print(result.alignment.deep_to_shallow, "forced" if result.alignment.forced else "chosen")
    for name, difference in differences.items():
        print(f"{name:50s} max difference {difference:.1e}")
    for name, value in accuracies.items():
        print(f"{name:50s} {100 * value:6.2f} %")
    write_results(
        "cifar_pair",
        {
            "test_images": len(images),
            "calibration_images": len(calibration),
            "alignment": result.alignment.deep_to_shallow,
            "differences": differences,
            "accuracies": accuracies,
            "seconds": {name: dict(one.timings) for name, one in fused.items()},
        },
    )


if __name__ == "__main__":
    main()
