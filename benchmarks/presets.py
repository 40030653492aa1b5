"""The presets beside the defaults: accuracy, and processor time as a multiple of the defaults'.

    CLAFUSION_DATA=... python -m benchmarks.presets [--images 2000] [--more 8000] [--test 2000]

The public ResNet-20 and ResNet-32 for CIFAR-10, and the two perceptrons of
:mod:`benchmarks.mnist_mlp`, each fused with equal weights. ``accurate`` is also given more images,
as it takes all that it gets.
"""

import argparse
import time
from typing import Any

from torch import Tensor, nn

from benchmarks.datasets import accuracy, checkpoint_pair, cifar10, logits, mnist
from benchmarks.mnist_mlp import DEEP, SHALLOW, mlp, train
from benchmarks.results import write_results
from clafusion import fuse
from clafusion.presets import PRESETS

EPOCHS = 5  # of the perceptrons


def cifar_pair(count: int) -> tuple[list[nn.Module], Tensor]:
    return list(checkpoint_pair()), cifar10("train", count)[0]


def mnist_pair(count: int) -> tuple[list[nn.Module], Tensor]:
    images, labels = mnist("train")
    pair = [
        train(mlp(widths, seed), images, labels, EPOCHS, seed)
        for seed, widths in ((1000, SHALLOW), (0, DEEP))
    ]
    return pair, images[:count]


def measured(
    models: list[nn.Module], images: Tensor, test: tuple[Tensor, Tensor], **settings: Any
) -> dict[str, float]:
    """Fuse by the settings; return the accuracy, and the seconds of the processor."""
    before = time.process_time()
    fused = fuse(models, images, **settings).model
    seconds = time.process_time() - before
    return {"accuracy": accuracy(fused.eval(), *test), "processor seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    parser.add_argument("--more", type=int, default=8000, help="of them for accurate, once more")
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name, pair, test in (
        ("MNIST", mnist_pair, mnist("test", given.test)),
        ("CIFAR-10", cifar_pair, cifar10("test", given.test)),
    ):
        models, images = pair(given.more)
        few = images[: given.images]
        fuse(models, images[:200])  # so that no row pays for what a process does once
        rows = {"default": measured(models, few, test)}
        rows |= {one: measured(models, few, test, preset=one) for one in PRESETS}
        more = f"accurate, {len(images)} images"
        rows[more] = measured(models, images, test, preset="accurate")
        usual = rows["default"]["processor seconds"]
        for row in rows.values():
            row["times the defaults"] = row["processor seconds"] / usual
        both = sum(logits(one, test[0]) for one in models)
        found[name] = {
            "parents": [accuracy(one, *test) for one in models],
            "ensemble": float((both.argmax(1) == test[1]).double().mean()),
            "presets": rows,
        }
        for one, row in rows.items():
            ratio = row["times the defaults"]
            print(f"{name:9} {one:24} {row['accuracy']:.2%} {ratio:6.2f} x", flush=True)
        write_results("presets", {"images": given.images, "epochs": EPOCHS, "pairs": found})


if __name__ == "__main__":
    main()
