"""DenseNets whose dense blocks have any lengths."""

import torch
from torch import nn

from tests.support.networks import randomise


class DenseLayer(nn.Module):
    def __init__(self, width, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, growth, 3, padding=1, bias=False)

    def forward(self, parts):
        x = self.conv1(self.norm1(torch.cat(parts, 1)).relu())
        return self.conv2(self.norm2(x).relu())


class DenseBlock(nn.ModuleDict):
    """As torchvision has it: named children, all of whose outputs are put side by side."""

    def __init__(self, count, width, growth, *, in_front=False):
        super().__init__()
        self.in_front = in_front
        for i in range(count):
            self[f"layer{i + 1}"] = DenseLayer(width + i * growth, growth)

    def forward(self, x):
        parts = [x]
        for layer in self.values():
            parts = [layer(parts), *parts] if self.in_front else [*parts, layer(parts)]
        return torch.cat(parts, 1)


class DenseNet(nn.Module):
    def __init__(self, *lengths, growth=4, **options):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(DenseBlock(n, 8, growth, **options) for n in lengths)
        widths = [8 + n * growth for n in lengths]
        self.between = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 8, 1), nn.AvgPool2d(2))
            for n in widths[:-1]
        )
        self.norm, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(4 * widths[-1], 5)

    def forward(self, x):
        x = self.stem(x)
        for block, between in zip(self.blocks, [*self.between, nn.Identity()], strict=True):
            x = between(block(x))
        return self.head(nn.functional.adaptive_avg_pool2d(self.norm(x).relu(), 2).flatten(1))


def dense(*lengths, seed=0, **options):
    return randomise(DenseNet(*lengths, **options), seed).eval()
