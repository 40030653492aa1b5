"""ResNets with bottleneck blocks and EfficientNets, with the layer shapes of ImageNet checkpoints.

He et al. (arXiv 1512.03385) with the stride in the 3x3 convolution, and Tan and Le (arXiv
1905.11946). Weights are random. Factories for the command line:
``--arch benchmarks/imagenet_networks.py:resnet50``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and a shortcut, projected where shapes change."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample = None
        if stride > 1 or width_in != wide:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        inner = self.bn3(self.conv3(inner))
        return F.relu(inner + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Four stages with so many blocks each."""

    def __init__(self, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stages, width_in = [], 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            made = []
            for i in range(count):
                made.append(Bottleneck(width_in, width, 2 if stage and not i else 1))
                width_in = 4 * width
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(width_in, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet50() -> ResNet:
    return ResNet((3, 4, 6, 3))


def resnet101() -> ResNet:
    return ResNet((3, 4, 23, 3))


class SqueezeExcitation(nn.Module):
    """Scale each channel by what the means of all channels say."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(scale)


def conv_bn(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(width_in, width, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    )


class InvertedResidual(nn.Module):
    """A convolution to ``expansion`` times the channels, one for each of them, and one back."""

    def __init__(self, width_in: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = expansion * width_in
        self.expand = conv_bn(width_in, inner, 1) if expansion > 1 else None
        self.depthwise = conv_bn(inner, inner, kernel, stride, groups=inner)
        self.excite = SqueezeExcitation(inner, max(width_in // 4, 1))
        self.project = conv_bn(inner, width, 1)
        self.is_residual = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else F.silu(self.expand(x))
        inner = self.project(self.excite(F.silu(self.depthwise(inner))))
        return x + inner if self.is_residual else inner


# Of EfficientNet-B0's stages: expansion, kernel, stride, channels, blocks.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class EfficientNet(nn.Module):
    """EfficientNet-B0, with ``depth`` times as many blocks in each stage, rounded up."""

    def __init__(self, depth: float = 1.0) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32, 3, 2)
        blocks, width_in = [], 32
        for expansion, kernel, stride, width, count in STAGES:
            for i in range(math.ceil(depth * count)):
                step = 1 if i else stride
                blocks.append(InvertedResidual(width_in, width, expansion, kernel, step))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(width_in, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.head(self.blocks(F.silu(self.stem(x)))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def efficientnet_b0() -> EfficientNet:
    return EfficientNet()


def efficientnet_b1() -> EfficientNet:
    return EfficientNet(1.1)
