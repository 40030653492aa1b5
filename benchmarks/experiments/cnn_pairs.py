"""Fuse pairs of convolutional networks of different depth on CIFAR-10, without training.

    CLAFUSION_DATA=... python -m benchmarks.experiments.cnn_pairs [--quick]

ResNet-34 with ResNet-18 (arXiv 1512.03385, with a stem for small images) and VGG-16 with VGG-11
(arXiv 1409.1556), with and without BatchNorm, with and without biases: pairs like those of
CLAFusion (arXiv 2110.15538, section 5.2). The blocks of a ResNet without norms start by writing
zero, or it could not be trained. The quick form takes fewer channels and layers, and images of half
the size and a few of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets import accuracy, logits
from benchmarks.experiments.cifar_pairs import data
from benchmarks.experiments.experiment import arguments, run, trained
from clafusion import fuse, naive_average

QUICK: dict[str, Any] = {
    "images": 4000,
    "pooled": 2,
    "test": 4000,
    "resnet": [[2, 2, 2, 2], [1, 1, 1, 1]],
    "vgg": [[1, 1, 2, 2], [1, 1, 1, 1]],
    "widths": [8, 16, 32, 32],
    "epochs": 8,
    "unlabelled": 500,
}
FULL: dict[str, Any] = {
    "images": 50_000,
    "pooled": 1,
    "test": None,
    "resnet": [[3, 4, 6, 3], [2, 2, 2, 2]],
    "vgg": [[2, 2, 3, 3, 3], [1, 1, 2, 2, 2]],
    "widths": [64, 128, 256, 512, 512],
    "epochs": 100,
    "unlabelled": 2000,
}
VARIANTS = {
    "BatchNorm, no bias": (True, False),
    "BatchNorm, bias": (True, True),
    "no norm, bias": (False, True),
    "no norm, no bias": (False, False),
}


def convolution(
    into: int, out: int, kernel: int, stride: int, *, norm: bool, bias: bool
) -> list[nn.Module]:
    layer = nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return [layer, nn.BatchNorm2d(out)] if norm else [layer]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int, *, norm: bool, bias: bool) -> None:
        super().__init__()
        first = convolution(into, out, 3, stride, norm=norm, bias=bias)
        second = convolution(out, out, 3, 1, norm=norm, bias=bias)
        if not norm:
            nn.init.zeros_(second[0].weight)
        self.inner = nn.Sequential(*first, nn.ReLU(), *second)
        changed = stride > 1 or into != out
        self.shortcut = nn.Sequential(
            *(convolution(into, out, 1, stride, norm=norm, bias=bias) if changed else [])
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


def resnet(stages: Sequence[int], widths: Sequence[int], *, norm: bool, bias: bool) -> nn.Module:
    layers = [*convolution(3, widths[0], 3, 1, norm=norm, bias=bias), nn.ReLU()]
    into = widths[0]
    for stage, (count, width) in enumerate(zip(stages, widths, strict=False)):
        for i in range(count):
            layers.append(Block(into, width, 2 if stage and not i else 1, norm=norm, bias=bias))
            into = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10, bias=bias)
    )


def vgg(stages: Sequence[int], widths: Sequence[int], *, norm: bool, bias: bool) -> nn.Module:
    layers: list[nn.Module] = []
    into = 3
    for count, width in zip(stages, widths, strict=False):
        for _ in range(count):
            layers += [*convolution(into, width, 3, 1, norm=norm, bias=bias), nn.ReLU()]
            into = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(into, 10, bias=bias))


def main() -> None:
    given = arguments(__doc__, seeds=3)
    settings = QUICK if given.quick else FULL
    train, test = data(settings, given.device)
    unlabelled = train[0][: settings["unlabelled"]]

    def one_seed(seed: int) -> dict[str, float]:
        found = {}
        for family, build in (("resnet", resnet), ("vgg", vgg)):
            for variant, (norm, bias) in VARIANTS.items():
                models = []
                for stages, start in zip(settings[family], (seed, seed + 1000), strict=True):
                    torch.manual_seed(start)
                    model = build(stages, settings["widths"], norm=norm, bias=bias)
                    models.append(
                        trained(
                            model.to(given.device),
                            *train,
                            settings["epochs"],
                            start,
                            optimizer=lambda parameters: torch.optim.AdamW(
                                parameters, 2e-3, weight_decay=0.05
                            ),
                        )
                    )
                name = f"{family}, {variant}"
                for which, model in zip(("deep", "shallow"), models, strict=True):
                    found[f"{name}: {which} parent"] = accuracy(model, *test)
                both = sum(logits(model, test[0]).softmax(1) for model in models)
                found[f"{name}: side by side"] = float((both.argmax(1) == test[1]).double().mean())
                results = {
                    calibration: fuse(models, unlabelled, calibration=calibration, seed=seed)
                    for calibration in ("none", "repair", "least_squares")
                }
                found[f"{name}: naive average"] = accuracy(
                    naive_average(results["none"].problem), *test
                )
                for calibration, result in results.items():
                    row = f"{name}: matched, {calibration}"
                    found[row] = accuracy(result.model.eval(), *test)
                    print(f"{row:50s} {100 * found[row]:6.2f} %", flush=True)
        return found

    run("cnn_pairs", given, settings, one_seed, title="CIFAR-10 test accuracy")


if __name__ == "__main__":
    main()
