"""Train the fusion of the two CIFAR-10 checkpoints a little, towards both of them side by side.

    CLAFUSION_DATA=... python -m benchmarks.distilled_pair [--images 20000] [--epochs 4]

No labels are used: `distill` brings the fused ResNet-32 nearer to the mean logits of ResNet-20 and
ResNet-32, on shifted and mirrored training images. Beside it stands the same schedule from
ResNet-32, the better parent. Accuracies are of the test images; seconds are the processor's.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.datasets import accuracy, checkpoint_pair, cifar10, logits
from benchmarks.results import write_results
from clafusion import distill, fuse

SHIFT = 4  # pixels to each side, at the most


def shifted_and_mirrored(images: Tensor, seed: int) -> Tensor:
    """Return each image moved by some pixels, and half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    padded = F.pad(torch.where(mirrored, images.flip(3), images), (SHIFT,) * 4)
    offsets = torch.randint(0, 2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    size = images.size(2)
    return torch.stack(
        [one[:, y : y + size, x : x + size] for one, (y, x) in zip(padded, offsets, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000, help="unlabelled training images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-5, help="Adam's, falling to 0")
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    given = parser.parse_args()
    parents = list(checkpoint_pair())
    train = cifar10("train", given.images)[0]
    images, labels = cifar10("test", given.test)
    both = sum(logits(one, images) for one in parents)
    found: dict[str, Any] = {
        "settings": vars(given),
        "side by side": float((both.argmax(1) == labels).double().mean()),
    }
    print(f"side by side {100 * found['side by side']:.2f} %", flush=True)
    starts = {"fused": fuse(parents, train[:2000]).model.eval(), "ResNet-32": parents[1]}
    unlabelled = shifted_and_mirrored(train, seed=0)
    for name, start in starts.items():
        began = time.process_time()
        trained = distill(
            start,
            parents,
            unlabelled,
            alpha=1.0,
            epochs=given.epochs,
            optimizer=lambda parameters: torch.optim.Adam(parameters, given.rate),
        )
        found[name] = row = {
            "before": accuracy(start, images, labels),
            "after": accuracy(trained.model.eval(), images, labels),
            "held_out_losses": list(trained.held_out_losses),
            "kept": trained.kept,
            "processor_seconds": time.process_time() - began,
        }
        print(name, row, flush=True)
        write_results("distilled_pair", found)


if __name__ == "__main__":
    main()
