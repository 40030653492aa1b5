"""He et al.'s ResNet for CIFAR-10 (arXiv 1512.03385, section 4.2), shortcuts without parameters.

Factories for the command line: ``--arch benchmarks/cifar_resnet.py:resnet20``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a new stage halves the image and pads the channels."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            more = inner.size(1) - x.size(1)  # not fixed here, so that it can be widened
            padding = (0, 0, 0, 0, more // 2, more - more // 2)
            x = F.pad(x[:, :, :: self.stride, :: self.stride], padding)
        return F.relu(inner + x)


class CifarResNet(nn.Module):
    """Three stages of ``blocks`` blocks each, of the given widths."""

    def __init__(self, blocks: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        width_in = widths[0]
        for stage, width in enumerate(widths):
            stages.append(
                nn.Sequential(
                    *[
                        BasicBlock(width if i else width_in, width, 1 if i or not stage else 2)
                        for i in range(blocks)
                    ]
                )
            )
            width_in = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(width_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet20() -> CifarResNet:
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    return CifarResNet(5)
