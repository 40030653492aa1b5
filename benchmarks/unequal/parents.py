"""The parents of the suite: networks of unlike structure that learnt unlike things."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar_resnet import CifarResNet
from benchmarks.experiments.cnn_pairs import vgg
from benchmarks.experiments.experiment import trained
from benchmarks.mnist_mlp import DEEP, SHALLOW, mlp

MLPS = (
    DEEP,
    SHALLOW,
    (784, 300, 150, 100, 10),
    (784, 256, 128, 10),
    (784, 500, 200, 80, 40, 10),
    (784, 200, 200, 10),
    (784, 400, 100, 10),
    (784, 350, 150, 75, 30, 10),
)
"""Multilayer perceptrons of two to six layers; as many of them as there are shares."""

SPECIAL = 4  # the specialist's class


def dirichlet_shares(labels: Tensor, count: int, alpha: float, seed: int) -> list[Tensor]:
    """Part a data set: of each class each share gets a part drawn from a Dirichlet distribution.

    As in OTFusion (arXiv 1910.05653) and federated learning (arXiv 1909.06335). The smaller
    ``alpha`` is, the less alike the shares are.
    """
    generator = np.random.default_rng(seed)
    found: list[list[Tensor]] = [[] for _ in range(count)]
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).squeeze(1)
        rows = rows[torch.from_numpy(generator.permutation(len(rows)))]
        parts = np.cumsum(generator.dirichlet([alpha] * count))[:-1] * len(rows)
        for share, part in zip(found, rows.tensor_split(parts.astype(int).tolist()), strict=True):
            share.append(part)
    return [torch.cat(share) for share in found]


def specialist_and_generalist(labels: Tensor, seed: int) -> list[Tensor]:
    """Part a data set as OTFusion's skill transfer (section 5.1) does."""
    drawn = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    special = (labels == SPECIAL) | (drawn < 0.1)
    return [torch.nonzero(one).squeeze(1) for one in (special, ~special)]


def untrained(kind: str, settings: dict[str, Any], index: int, seed: int) -> nn.Module:
    """Return the network at a position of a task's parents."""
    start = seed + 1000 * index
    if kind == "mlp":
        return mlp(MLPS[index], start)
    torch.manual_seed(start)
    if kind == "vgg":
        stages = ([1, 1, 2, 2, 2], [2, 2, 2, 2, 2])[index]
        return vgg(stages, settings["widths"], norm=True, bias=True)
    return CifarResNet((3, 5)[index], tuple(settings["widths"]))


def parents_of(
    kind: str,
    settings: dict[str, Any],
    data: tuple[Tensor, Tensor],
    shares: Sequence[Tensor],
    seed: int,
    device: str,
) -> list[nn.Module]:
    """Train one network on each share."""
    images, labels = data
    rate, decay = (2e-3, 0.01) if kind == "mlp" else (2e-3, 0.05)
    return [
        trained(
            untrained(kind, settings, i, seed).to(device),
            images[share],
            labels[share],
            settings["epochs"],
            seed + 1000 * i,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay),
        )
        for i, share in enumerate(shares)
    ]
