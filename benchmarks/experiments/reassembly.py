"""Stitch blocks of four networks of different kinds into one, without training.

    CLAFUSION_DATA=... python -m benchmarks.experiments.reassembly [--quick] [--federated]

A perceptron, a VGG, a ResNet and a network without poolings on MNIST, and on CIFAR-10 the same with
a mixer for the perceptron, each trained from a start of its own. Beside the stitched network
stand its parents, and those of them that can be fused, fused. With ``--federated`` the networks are
those of clients on unequal shares: see :mod:`benchmarks.experiments.federated`.
"""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets import accuracy, logits, mnist
from benchmarks.experiments import federated
from benchmarks.experiments.cifar_pairs import data
from benchmarks.experiments.experiment import arguments, run, trained
from clafusion import ClafusionError, fuse, reassemble

BLOCKS = (2, 3, None)  # None: of 2, 3 and 4 the one that comes nearest to all parents together
QUICK: dict[str, Any] = {
    "mnist_images": 3000,
    "mnist_epochs": 8,
    "mnist_pooled": 2,
    "images": 3000,
    "pooled": 2,
    "test": 2000,
    "epochs": 10,
    "width": 12,
    "unlabelled": 1200,
    "candidates": 24,
}
FULL: dict[str, Any] = {
    "mnist_images": 60_000,
    "mnist_epochs": 10,
    "mnist_pooled": 1,
    "images": 50_000,
    "pooled": 1,
    "test": None,
    "epochs": 60,
    "width": 32,
    "unlabelled": 2000,
    "candidates": 64,
}


class Residual(nn.Module):
    """A block whose sum of two paths a ReLU follows."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.past: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.past = nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.past(x)).relu()


class Mixing(nn.Module):
    """A layer over the positions and one over the channels, each added to what it reads."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.over_positions = nn.Sequential(
            nn.Linear(positions, positions), nn.GELU(), nn.Linear(positions, positions)
        )
        self.over_channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_positions(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norms[1](x))


class Mixer(nn.Module):
    """Patches, mixing layers, and the mean over the positions."""

    def __init__(self, colours: int, side: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(colours, width, patch, patch)
        positions = (side // patch) ** 2
        self.layers = nn.Sequential(*(Mixing(width, positions) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


def perceptron(pixels: int) -> nn.Module:
    widths = (pixels, 200, 100, 50)
    layers: list[nn.Module] = [nn.Flatten()]
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def vgg(colours: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    into = colours
    for out, pools in ((width, True), (2 * width, False), (2 * width, True), (4 * width, False)):
        layers += [nn.Conv2d(into, out, 3, 1, 1), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
        into = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10))


def resnet(colours: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(colours, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def without_poolings(colours: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    into = colours
    for out, size, stride in (
        (width, 5, 1),
        (2 * width, 3, 2),
        (3 * width, 3, 2),
        (3 * width, 1, 1),
    ):
        layers += [nn.Conv2d(into, out, size, stride, size // 2), nn.BatchNorm2d(out), nn.ReLU()]
        into = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10))


def families(colours: int, side: int, width: int) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each network, by its name."""
    mixes = colours > 1
    return {
        "mixer" if mixes else "perceptron": (
            (lambda: Mixer(colours, side, 4, 2 * width, 3))
            if mixes
            else (lambda: perceptron(colours * side * side))
        ),
        "VGG": lambda: vgg(colours, width),
        "ResNet": lambda: resnet(colours, width),
        "no poolings": lambda: without_poolings(colours, width),
    }


def scores(
    name: str,
    models: dict[str, nn.Module],
    images: Tensor,
    test: tuple[Tensor, Tensor],
    settings: dict[str, Any],
    seed: int,
) -> dict[str, float]:
    """Return the accuracy of all models alone, side by side, stitched, and fused."""
    found = {f"{name}: {kind}": accuracy(one, *test) for kind, one in models.items()}
    alone = list(found.values())
    found[f"{name}: parents' mean"] = sum(alone) / len(alone)
    together = torch.stack([logits(one, test[0]).softmax(1) for one in models.values()]).sum(0)
    found[f"{name}: side by side"] = float((together.argmax(1) == test[1]).double().mean())
    for blocks in BLOCKS:
        result = reassemble(
            models, images, blocks=blocks, candidates=settings["candidates"], seed=seed
        )
        row = f"{name}: stitched of {blocks or 'a chosen number of'} blocks"
        found[row] = accuracy(result.model, *test)
        print(f"{row:45s} {100 * found[row]:6.2f} %  {result.tried[0].text}", flush=True)
    fused = fusions(list(models.values()), images, test, seed)
    print(f"{name}: pairs that can be fused {len(fused)}", flush=True)
    if fused:
        found[f"{name}: best of all fused pairs"] = max(fused)
    return found


def fusions(
    models: Sequence[nn.Module], images: Tensor, test: tuple[Tensor, Tensor], seed: int
) -> list[float]:
    """Return the accuracies of all pairs that can be fused, fused by least squares."""
    found = []
    for pair in combinations(models, 2):
        try:
            fused = fuse(pair, images, seed=seed)
        except ClafusionError:
            continue
        found.append(accuracy(fused.model.eval(), *test))
    return found


def main() -> None:
    text = "clients on unequal shares train, and a server reassembles their networks"
    given = arguments(__doc__, seeds=3, federated=text)
    settings = QUICK if given.quick else FULL
    if given.federated:
        of_clients = federated.QUICK if given.quick else federated.FULL
        settings = {**settings, **of_clients}

    def digits(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        images, labels = mnist(split, count)
        images = nn.functional.avg_pool2d(images.view(-1, 1, 28, 28), settings["mnist_pooled"])
        return images.to(given.device), labels.to(given.device)

    of_mnist = digits("train", settings["mnist_images"]), digits("test", settings["test"])
    of_cifar = data(settings, given.device)

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, 2e-3)

    def one_seed(seed: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, (train, test), epochs, colours in (
            ("MNIST", of_mnist, settings["mnist_epochs"], 1),
            ("CIFAR-10", of_cifar, settings["epochs"], 3),
        ):
            models = {}
            makers = families(colours, train[0].size(-1), settings["width"])
            if given.federated:
                found |= federated.federated(name, makers, train, test, settings, adam, seed)
                continue
            for i, (kind, make) in enumerate(makers.items()):
                torch.manual_seed(seed + 1000 * i)
                start = make().to(given.device)
                models[kind] = trained(start, *train, epochs, seed + 1000 * i, optimizer=adam)
                print(f"{name}, {kind}: {100 * accuracy(models[kind], *test):.2f} %", flush=True)
            images = train[0][: settings["unlabelled"]]
            found |= scores(name, models, images, test, settings, seed)
        return found

    name = "reassembly_federated" if given.federated else "reassembly"
    run(name, given, settings, one_seed, title="Test accuracy")


if __name__ == "__main__":
    main()
