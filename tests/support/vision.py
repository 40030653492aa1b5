"""Tiny forms of image networks that no package of the tests has, of any depth and width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.architectures import randomise
from tests.support.families import values

IMAGES = (values(3, 16, 16),)
CLASSES = 5


class RowNorm(nn.Module):
    """A linear layer and a BatchNorm of all positions of all inputs as rows."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(into, out, bias=False), nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class KeptBiases(nn.Module):
    """Attention with biases by distance, which it keeps in eval mode until it is to train again.

    With a stride, the queries are of fewer positions than the keys.
    """

    def __init__(self, width: int, heads: int, side: int, stride: int = 1) -> None:
        super().__init__()
        self.heads, self.size, self.side, self.stride = heads, 4, side, stride
        self.queries = RowNorm(width, heads * self.size)
        self.others = RowNorm(width, 3 * heads * self.size)
        self.project = RowNorm(2 * heads * self.size, width)
        self.biases = nn.Parameter(torch.zeros(heads, side))
        places = torch.arange(side)
        table = (places[::stride, None] - places[None]).abs()
        self.register_buffer("distances", table, persistent=False)
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def bias(self, device: torch.device) -> Tensor:
        if self.training:
            return self.biases[:, self.distances]
        if str(device) not in self.kept:
            self.kept[str(device)] = self.biases[:, self.distances]
        return self.kept[str(device)]

    def forward(self, x: Tensor) -> Tensor:
        rows, positions, _ = x.shape
        keys = self.others(x).view(rows, positions, self.heads, -1)
        keys, values = keys.split([self.size, 2 * self.size], 3)
        queries = self.queries(x[:, :: self.stride]).view(rows, -1, self.heads, self.size)
        scores = queries.permute(0, 2, 1, 3) @ keys.permute(0, 2, 3, 1) * self.size**-0.5
        shares = (scores + self.bias(x.device)).softmax(-1)
        y = (shares @ values.transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.project(F.hardswish(y))


class Hybrid(nn.Module):
    """Convolutions, attention, attention of every other position, and attention (LeViT-like)."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()

        def blocks(count: int, side: int) -> nn.ModuleList:
            made = []
            for _ in range(count):
                made.append(KeptBiases(width, width // 4, side))
                hidden = RowNorm(width, 2 * width), nn.Hardswish(), RowNorm(2 * width, width)
                made.append(nn.Sequential(*hidden))
            return nn.ModuleList(made)

        self.stem = nn.Conv2d(3, width, 8, 8)
        self.first, self.second = blocks(depth, 4), blocks(1, 2)
        self.fewer = KeptBiases(width, width // 4, 4, 2)
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.first:
            x = x + block(x)
        x = self.fewer(x)
        for block in self.second:
            x = x + block(x)
        return self.head(self.norm(x.mean(1)))


def hybrid(depth: int, width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Hybrid(depth, width), seed)


class Standardised(nn.Conv2d):
    """A convolution by its weight with mean 0 and variance 1 in each row; with or without gain."""

    def __init__(self, *arguments: int, gain: bool, groups: int = 1) -> None:
        kernel = arguments[2]
        super().__init__(*arguments, padding=kernel // 2, groups=groups, bias=gain)
        self.scale = self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.gain is None else (self.gain * self.scale).view(-1)
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, gain, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class PreActivated(nn.Module):
    """A block that normalises first, of standardised convolutions without gain (BiT-like)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, width) for _ in range(2))
        self.layers = nn.ModuleList(Standardised(width, width, 3, gain=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = layer(norm(y).relu())
        return x + y


class NormFree(nn.Module):
    """A block of standardised convolutions with gains, and no norm (NF-ResNet-like)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.first = Standardised(width, width, 3, gain=True, groups=groups)
        self.second = Standardised(width, width, 1, gain=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.second(F.silu(self.first(F.silu(x) * 0.9)))


def standardised(depth: int, width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    blocks = [PreActivated(width) for _ in range(depth)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)
    return randomise(nn.Sequential(nn.Conv2d(3, width, 3, 2), *blocks, *head), seed)


def norm_free(depth: int, width: int = 8, seed: int = 0, groups: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    blocks = [NormFree(width, groups) for _ in range(depth)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)
    stem = Standardised(3, width, 3, gain=True), nn.AvgPool2d(2)
    return randomise(nn.Sequential(*stem, *blocks, *head), seed)


class Basic(nn.Module):
    """Two convolutions and an identity shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return (x + second(first(x).relu())).relu()


class Exchange(nn.Module):
    """Two resolutions side by side, of any depths, that exchange their values (HRNet-like)."""

    def __init__(self, depths: tuple[int, int], width: int) -> None:
        super().__init__()
        self.fine, self.coarse = (
            nn.Sequential(*[Basic((i + 1) * width) for _ in range(depth)])
            for i, depth in enumerate(depths)
        )
        self.up = nn.Conv2d(2 * width, width, 1)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.fine(x), self.coarse(y)
        up = F.interpolate(self.up(y), scale_factor=2.0)
        return (x + up).relu(), (self.down(x) + y).relu()


class Resolutions(nn.Module):
    def __init__(self, depths: tuple[tuple[int, int], ...], width: int) -> None:
        super().__init__()
        self.stem, self.shrink = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.stages = nn.ModuleList(Exchange(one, width) for one in depths)
        self.join, self.head = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.shrink(x).relu()
        for stage in self.stages:
            x, y = stage(x, y)
        return self.head((self.join(x) + y).mean((2, 3)))


def resolutions(*depths: tuple[int, int], width: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Resolutions(depths, width), seed)


class Pyramid(nn.Module):
    """Two levels of residual blocks, of any depths, and the features of both."""

    def __init__(self, depths: tuple[int, int], width: int) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.levels = nn.ModuleList(
            nn.Sequential(*[Basic((i + 1) * width) for _ in range(depth)])
            for i, depth in enumerate(depths)
        )
        self.sides = nn.ModuleList(nn.Conv2d((i + 1) * width, CLASSES, 1) for i in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.levels[0](self.stem(x).relu())
        coarse = self.sides[1](self.levels[1](self.down(fine).relu()))
        return self.sides[0](fine) + F.interpolate(coarse, scale_factor=2.0), coarse


def pyramid(*depths: int, width: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Pyramid(depths, width), seed)
