"""Pairs of ResNets of different depth on CIFAR-10, for the experiments with training."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar_resnet import CifarResNet
from benchmarks.datasets import cifar10
from benchmarks.experiments.experiment import trained

QUICK = {
    "images": 4000,
    "pooled": 2,  # 16 by 16 pixels instead of 32 by 32
    "test": 4000,
    "deep_blocks": 2,
    "shallow_blocks": 1,
    "widths": [16, 32, 64],
    "epochs": 12,
    "more_epochs": 4,
    "unlabelled": 1000,
}
FULL = {
    "images": 20_000,
    "pooled": 1,
    "test": None,
    "deep_blocks": 5,
    "shallow_blocks": 3,
    "widths": [16, 32, 64],
    "epochs": 100,
    "more_epochs": 30,
    "unlabelled": 2000,
}


def data(settings: dict[str, Any], device: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return training and test images with their labels."""
    return tuple(
        (nn.functional.avg_pool2d(images, settings["pooled"]).to(device), labels.to(device))
        for images, labels in (
            cifar10("train", settings["images"]),
            cifar10("test", settings["test"]),
        )
    )


def fresh(settings: dict[str, Any], depth: str, seed: int) -> nn.Module:
    """Return an untrained network."""
    torch.manual_seed(seed)
    return CifarResNet(settings[f"{depth}_blocks"], tuple(settings["widths"]))


def parents(
    settings: dict[str, Any], train: tuple[Tensor, Tensor], seed: int
) -> tuple[nn.Module, nn.Module]:
    """Return a deep and a shallow network, trained from different starts.

    They see the same images, or with the setting ``halves`` every other one each.
    """
    step = 2 if settings.get("halves") else 1
    deep, shallow = (
        trained(
            fresh(settings, depth, seed + offset).to(train[0].device),
            *(one[start::step] for one in train),
            settings["epochs"],
            seed + offset,
            learning_rate=0.1,
            weight_decay=5e-4,
        )
        for depth, offset, start in (("deep", 0, 0), ("shallow", 1000, step - 1))
    )
    return deep, shallow
