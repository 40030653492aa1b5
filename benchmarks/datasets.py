"""The real data and checkpoints in the folder that CLAFUSION_DATA names."""

import lzma
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar_resnet import resnet20, resnet32

# Of the images / 255, as the two checkpoints were trained.
CIFAR_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
CIFAR_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def folder() -> Path:
    """Return the data folder, or end with a clear line where there is none."""
    place = os.environ.get("CLAFUSION_DATA")
    if not place or not Path(place).is_dir():
        sys.exit("set CLAFUSION_DATA to the folder with mnist.npz, cifar10.npz.xz and checkpoints/")
    return Path(place)


def cifar10(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return normalised images ``(count, 3, 32, 32)`` and their labels."""
    with lzma.open(folder() / "cifar10.npz.xz") as packed, np.load(packed) as arrays:
        images = torch.from_numpy(arrays[f"x_{split}"][:count])
        labels = torch.from_numpy(arrays[f"y_{split}"][:count]).long()
    return (images.float() / 255 - CIFAR_MEAN) / CIFAR_STD, labels


def mnist(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return normalised, flattened images ``(count, 784)`` and their labels."""
    with np.load(folder() / "mnist.npz") as arrays:
        images = torch.from_numpy(arrays[f"x_{split}"][:count])
        labels = torch.from_numpy(arrays[f"y_{split}"][:count]).long()
    return (images.float().flatten(1) / 255 - 0.1307) / 0.3081, labels


def checkpoint_pair() -> tuple[nn.Module, nn.Module]:
    """Return the trained ResNet-20 and ResNet-32, in eval mode."""
    models = []
    for model, name in (
        (resnet20(), "resnet20-12fca82f.th"),
        (resnet32(), "resnet32-d509ac18.th"),
    ):
        path = folder() / "checkpoints" / name
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({key.removeprefix("module."): v for key, v in state.items()})
        models.append(model.eval())
    return models[0], models[1]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return a model's outputs, computed in batches."""
    return torch.cat([model(batch) for batch in images.split(500)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images for which the largest output is the label."""
    return float((logits(model, images).argmax(1) == labels).double().mean())
