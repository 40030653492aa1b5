"""Small networks, one per structure, on which the channel analysis is proved.

Every entry of ``ARCHITECTURES`` is built with random weights and fixed seeds, and records what
the analysis must do with it: ``verified`` or ``refused`` by a named error. Nothing may be
silently wrong. ``python -m tests.support.architectures`` prints the table for the README.
"""

import dataclasses
import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]

BATCH = 3
CLASSES = 5


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One network of the suite and what the channel analysis must do with it.

    ``channels`` are the sizes of the free channel groups, ascending, where they can be argued
    by hand (of a refused model: those that an analysis of it should find); None elsewhere.
    ``tolerance`` bounds the output change, relative to the largest output, of a permuted copy in
    float64; models that compute in float32 inside need a larger one. ``is_single`` says that an
    operation takes no float64: then all is compared in float32.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    outcome: str = "verified"
    channels: tuple[int, ...] | None = None
    tolerance: float = 1e-9
    source: str = "suite"
    is_single: bool = False


ARCHITECTURES: dict[str, Architecture] = {}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic distinct random values, in place.

    Fresh networks have zero biases, unit norms and zero-one statistics: a wrong permutation of
    those would not show.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if "bias" in leaf or (parameter.ndim == 1 and "weight" not in leaf):
                parameter.copy_(uniform(parameter, -0.6, 0.6))
            elif parameter.ndim <= 1 or leaf == "original0":
                parameter.copy_(uniform(parameter, 0.4, 1.6))
            else:
                fan_in = parameter[0].numel()
                bound = math.sqrt(3.0 / fan_in) if fan_in > 1 else 1.0
                parameter.copy_(uniform(parameter, -bound, bound) * 1.4)
        for name, buffer in model.named_buffers():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "running_mean":
                buffer.copy_(uniform(buffer, -0.6, 0.6))
            elif leaf == "running_var":
                buffer.copy_(uniform(buffer, 0.4, 1.6))
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int, vocabulary: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (BATCH, length), generator=generator)


def architecture(
    name: str, inputs: Inputs | Callable[[], Inputs], seed: int = 0, **record: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Enter a model factory in the suite."""

    def enter(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def build() -> tuple[nn.Module, Inputs]:
            torch.manual_seed(0)
            model = randomise(factory(), seed)
            return model, inputs() if callable(inputs) else inputs

        if name in ARCHITECTURES:
            raise ValueError(f"two architectures are called {name!r}")
        if record.get("channels") is not None:
            record["channels"] = tuple(sorted(record["channels"]))
        ARCHITECTURES[name] = Architecture(name, build, **record)
        return factory

    return enter


RGB = images(3, 16, 16)
VECTOR = images(12)
SEQUENCE = images(6, 16)  # (batch, position, feature)
SIGNAL = images(3, 20)  # (batch, channel, time)
TEXT = tokens(6, 23)


class Head(nn.Sequential):
    """Global average pooling and a linear classifier."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Forward(nn.Module):
    """A module whose forward is a given function of itself: keeps one-off structures short."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class ForwardPair(Forward):
    """The same for two inputs."""

    function: Callable[..., Any]

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


class Add(nn.Module):
    """Residual sum of an inner branch and a shortcut."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shortcut(x)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Any:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> Any:
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride, groups), nn.ReLU(inplace=True))


# --- chains -------------------------------------------------------------------------------------


@architecture("MLP", VECTOR, channels=(16, 24))
def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, CLASSES)
    )


@architecture("MLP, LayerNorm and dropout", VECTOR, channels=(16, 24))
def mlp_layernorm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.LayerNorm(16),
        nn.SiLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 24, bias=False),
        nn.LayerNorm(24),
        nn.Tanh(),
        nn.Linear(24, CLASSES),
    )


@architecture("MLP on flattened images", RGB, channels=(16,))
def mlp_images() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.LeakyReLU(), nn.Linear(16, CLASSES))


@architecture("VGG", RGB, channels=(8, 12, 16, 24))
def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(16, 24),
        nn.ReLU(inplace=True),
        nn.Linear(24, CLASSES),
    )


@architecture("VGG, BatchNorm", RGB, channels=(8, 12, 16))
def vgg_batchnorm() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 8),
        nn.MaxPool2d(2),
        conv_bn_relu(8, 12),
        nn.AvgPool2d(2),
        conv_bn_relu(12, 16),
        Head(16),
    )


@architecture("AlexNet: spatial flatten before linear", RGB, channels=(8, 10, 20))
def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 10, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(60, 20),
        nn.ReLU(inplace=True),
        nn.Linear(20, CLASSES),
    )


@architecture("Flatten after channels-last permute", RGB, channels=(8,))
def flatten_channels_last() -> nn.Module:
    return Forward(
        lambda m, x: m.head(F.avg_pool2d(m.conv(x).relu(), 4).permute(0, 2, 3, 1).flatten(1)),
        conv=nn.Conv2d(3, 8, 3, padding=1),
        head=nn.Linear(128, CLASSES),
    )


@architecture("Conv1d net", SIGNAL, channels=(8, 12))
def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2, dilation=1),
        nn.BatchNorm1d(8),
        nn.ELU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 12, 3, dilation=2, padding=2),
        nn.Softplus(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


@architecture("Conv3d net", images(2, 4, 6, 6), channels=(6, 8))
def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 3, padding=1),
        nn.SELU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


@architecture("GroupNorm, one group", RGB, channels=(8, 12))
def groupnorm_one() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.GroupNorm(1, 12), nn.ReLU(), Head(12),
    )  # fmt: skip


# Channels may change places within their group only.
@architecture("GroupNorm, four groups", RGB, channels=(4, 4, 4, 4, 8))
def groupnorm_four() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), Head(8)
    )


@architecture("InstanceNorm", RGB, channels=(8, 12))
def instancenorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.InstanceNorm2d(12), nn.ReLU(), nn.MaxPool2d(3), Head(12),
    )  # fmt: skip


@architecture("LayerNorm over channels and positions", RGB, channels=(8,))
def layernorm_volume() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.LayerNorm([8, 4, 4]), nn.ReLU(), Head(8))


@architecture("LayerNorm over positions only", RGB, channels=(8,))
def layernorm_positions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.LayerNorm([4, 4]), nn.ReLU(), Head(8))


@architecture("PReLU, shared slope", RGB, channels=(8,))
def prelu_shared() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(), Head(8))


@architecture("PReLU, slope per channel", RGB, channels=(8, 10))
def prelu_channels() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 10, 3), nn.PReLU(10), Head(10)
    )


@architecture("Reflection and zero padding of positions", RGB, channels=(8, 10))
def padding() -> nn.Module:
    return nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.ReLU(),
        nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(8, 10, 3), nn.ReLU(),
        nn.ReplicationPad2d(1), nn.MaxPool2d(3), Head(10),
    )  # fmt: skip


@architecture("Spatial pyramid pooling", RGB, channels=(8, 12))
def pyramid() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x).relu()
        levels = [F.adaptive_max_pool2d(x, size).flatten(1) for size in (1, 2, 4)]
        return m.head(m.hidden(torch.cat(levels, 1)).relu())

    return Forward(
        forward,
        conv=nn.Conv2d(3, 8, 3),
        hidden=nn.Linear(8 * 21, 12),
        head=nn.Linear(12, CLASSES),
    )


@architecture("Weight-normalised layers", RGB, channels=(8, 10))
def weight_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(8, 10, 3)), nn.ReLU(), Head(10),
    )  # fmt: skip


class SpectralNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
        self.second = parametrizations.spectral_norm(nn.Linear(8, 12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu().mean((2, 3))).relu())


@architecture("Spectral-normalised layers", RGB, channels=(8, 12))
def spectral_norm() -> nn.Module:
    return SpectralNet()


@architecture("Weight-standardised convolutions", RGB, channels=(8, 10))
def weight_standardised() -> nn.Module:
    def standard(weight: Tensor) -> Tensor:
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True)
        return (weight - mean) * torch.rsqrt(variance + 1e-5)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.conv2d(x, standard(m.first.weight), m.first.bias).relu()
        return m.head(F.conv2d(x, standard(m.second.weight), m.second.bias).relu())

    return Forward(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 10, 3), head=Head(10))


@architecture("Scaled weight standardisation, grouped convolutions (NFNet-like)", RGB)
def scaled_standardisation() -> nn.Module:
    from tests.support import vision

    return vision.norm_free(2, groups=2)


# --- residual networks --------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an identity, 1x1 or zero-padded shortcut."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, shortcut: str = "identity"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.projection = conv_bn(inputs, outputs, 1, stride) if shortcut == "1x1" else None
        self.extra = outputs - inputs if shortcut == "zero" else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.projection is not None:
            x = self.projection(x)
        elif self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.extra - half))
        y += x
        return F.relu(y)


@architecture("ResNet, identity shortcuts", RGB, channels=(8, 8, 8))
def resnet_identity() -> nn.Module:
    return nn.Sequential(conv_bn_relu(3, 8), BasicBlock(8, 8), BasicBlock(8, 8), Head(8))


@architecture("ResNet, 1x1 shortcuts", RGB, channels=(8, 8, 16, 16, 16))
def resnet_projection() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 8),
        BasicBlock(8, 8),
        BasicBlock(8, 16, 2, "1x1"),
        BasicBlock(16, 16),
        Head(16),
    )


# The stem's 8 channels run through all three stages; stage 2 adds 8 of its own and stage 3 adds
# 16; each of the five blocks has its inner width.
@architecture(
    "ResNet, zero-padded shortcuts (option A)", RGB, channels=(8, 8, 16, 8, 16, 16, 32, 32)
)
def resnet_option_a() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 8),
        BasicBlock(8, 8),
        BasicBlock(8, 16, 2, "zero"),
        BasicBlock(16, 16),
        BasicBlock(16, 32, 2, "zero"),
        BasicBlock(32, 32),
        Head(32),
    )


def bottleneck(width: int, inner: int, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        Add(
            nn.Sequential(
                conv_bn_relu(width, inner, 1),
                conv_bn_relu(inner, inner, 3, groups=groups),
                conv_bn(inner, width, 1),
            )
        ),
        nn.ReLU(),
    )


@architecture("ResNet, bottleneck blocks", RGB, channels=(16, 4, 4, 4, 4))
def resnet_bottleneck() -> nn.Module:
    return nn.Sequential(conv_bn_relu(3, 16), bottleneck(16, 4), bottleneck(16, 4), Head(16))


# A grouped convolution has one incoming and one outgoing group of channels for each of its own.
@architecture("ResNeXt, grouped bottleneck", RGB, channels=(4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2, 16))
def resnext() -> nn.Module:
    return nn.Sequential(conv_bn_relu(3, 16), bottleneck(16, 8, 2), bottleneck(16, 8, 4), Head(16))


# The 18 middle channels leave in three groups of six and enter two groups of nine.
@architecture("Grouped convolution chain", RGB, channels=(4, 4, 4, 6, 3, 3, 6, 4, 4))
def grouped_chain() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 12), conv_bn_relu(12, 18, groups=3), conv_bn_relu(18, 8, groups=2), Head(8)
    )


@architecture("Wide ResNet, dropout in blocks", RGB, channels=(8, 12, 24, 24, 24))
def wide_resnet() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        inner = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.Dropout(0.2), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
        )  # fmt: skip
        return Add(inner, nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        conv_bn_relu(8, 12),
        block(12, 24, 2),
        block(24, 24, 1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        Head(24),
    )


@architecture("Pre-activation ResNet", RGB, channels=(8, 8, 16, 16, 16))
def preactivation() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.shortcut = (
                nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn1(x).relu()
            shortcut = x if self.shortcut is None else self.shortcut(y)
            return self.conv2(self.bn2(self.conv1(y)).relu()) + shortcut

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        Block(8, 8, 1),
        Block(8, 16, 2),
        Block(16, 16, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Head(16),
    )


@architecture("ResNet without norm, scalar gates (Fixup, ReZero)", RGB, channels=(8, 8, 8))
def resnet_norm_free() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bias = nn.Parameter(torch.zeros(1))
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.gate * self.conv2(F.relu(self.conv1(x + self.bias))))

    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), Block(), Head(8))


@architecture("Residual MLP", VECTOR, channels=(16, 24, 24))
def residual_mlp() -> nn.Module:
    def block() -> nn.Module:
        return Add(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)))

    return nn.Sequential(nn.Linear(12, 16), block(), block(), nn.Linear(16, CLASSES))


@architecture("Input added to the features", VECTOR, channels=(16,))
def residual_input() -> nn.Module:
    return nn.Sequential(
        Add(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))), nn.Linear(12, CLASSES)
    )


@architecture("Multiplicative residual and highway gate", VECTOR, channels=(16,))
def highway() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.gate(x).sigmoid()
        x = gate * m.value(x).relu() + (1 - gate) * x
        return m.head(x * (1 + m.scale(x).tanh()))

    return Forward(
        forward,
        stem=nn.Linear(12, 16),
        gate=nn.Linear(16, 16),
        value=nn.Linear(16, 16),
        scale=nn.Linear(16, 16),
        head=nn.Linear(16, CLASSES),
    )


@architecture("Layer scale (bare parameter)", RGB, channels=(8, 12))
def layer_scale() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x) + m.shift
        return m.head(x + m.gamma * m.second(m.first(x).relu()))

    return Forward(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        first=nn.Conv2d(8, 12, 1),
        second=nn.Conv2d(12, 8, 1),
        gamma=nn.Parameter(torch.zeros(8, 1, 1)),
        shift=nn.Parameter(torch.zeros(1, 8, 1, 1)),
        head=Head(8),
    )


@architecture("ConvNeXt-like, channels-last LayerNorm", RGB, channels=(8, 16, 32))
def convnext_like() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
            self.norm = nn.LayerNorm(width)
            self.expand = nn.Linear(width, 2 * width)
            self.project = nn.Linear(2 * width, width)
            self.gamma = nn.Parameter(torch.zeros(width))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            y = self.gamma * self.project(F.gelu(self.expand(y)))
            return x + y.permute(0, 3, 1, 2)

    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 2, 2), Block(16), Head(16)
    )


# --- depthwise, squeeze-excite, attention over channels -----------------------------------------


@architecture("MobileNetV1-like, depthwise separable", RGB, channels=(8, 16, 12))
def depthwise_separable() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 8),
        conv_bn_relu(8, 8, groups=8),
        conv_bn_relu(8, 16, 1),
        conv_bn_relu(16, 16, 3, 2, groups=16),
        conv_bn_relu(16, 12, 1),
        Head(12),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(squeezed))))


@architecture(
    "Inverted residual, squeeze-excite (EfficientNet-like)", RGB, channels=(8, 24, 4, 24, 6)
)
def inverted_residual() -> nn.Module:
    def block(expanded: int, squeezed: int) -> nn.Module:
        return Add(
            nn.Sequential(
                conv_bn(8, expanded, 1),
                nn.ReLU6(),
                conv_bn(expanded, expanded, 3, groups=expanded),
                nn.SiLU(),
                SqueezeExcite(expanded, squeezed),
                conv_bn(expanded, 8, 1),
            )
        )

    return nn.Sequential(conv_bn_relu(3, 8), block(24, 4), block(24, 6), Head(8))


@architecture("MobileNetV3-like, hard swish and sigmoid", RGB, channels=(8, 16, 10))
def mobilenet_v3() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8),
        nn.Hardswish(),
        conv_bn(8, 16, 1),
        nn.Hardsigmoid(),
        conv_bn(16, 16, 5, groups=16),
        nn.Hardswish(),
        conv_bn_relu(16, 10, 1),
        Head(10),
    )


@architecture("Squeeze-excite with linear layers and view", RGB, channels=(8, 4))
def squeeze_excite_linear() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        batch, width, _, _ = x.size()
        gate = F.adaptive_avg_pool2d(x, 1).view(batch, width)
        gate = m.expand(m.reduce(gate).relu()).sigmoid().view(batch, width, 1, 1)
        return m.head(x * gate.expand_as(x))

    return Forward(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        reduce=nn.Linear(8, 4, bias=False),
        expand=nn.Linear(4, 8, bias=False),
        head=Head(8),
    )


@architecture("Depthwise multiplier 2", RGB, channels=(8, 6))
def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 8), conv_bn_relu(8, 16, 3, groups=8), nn.Conv2d(16, 6, 1), Head(6)
    )


@architecture("CBAM-like channel and spatial attention", RGB, channels=(8, 4))
def cbam() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        gate = m.shared(x.mean((2, 3))) + m.shared(x.amax((2, 3)))
        x = x * gate.sigmoid()[:, :, None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return m.head(x * m.spatial(pooled).sigmoid())

    return Forward(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        shared=nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8)),
        spatial=nn.Conv2d(2, 1, 3, padding=1),
        head=Head(8),
    )


# The order of the channels matters, so none may move.
@architecture("ECA-like convolution over channels", RGB, channels=())
def eca() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        gate = m.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)
        return m.head(x * gate[:, :, None, None])

    return Forward(
        forward, stem=nn.Conv2d(3, 8, 3), conv=nn.Conv1d(1, 1, 3, padding=1), head=Head(8)
    )


@architecture("Softmax over channels", RGB, channels=(8, 10))
def softmax_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.softmax(m.first(x), dim=1)
        return m.head(F.normalize(m.second(x), dim=1) + F.log_softmax(m.second(x), dim=1))

    return Forward(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 10, 3), head=Head(10))


@architecture("Global response normalisation", RGB, channels=(8,))
def response_norm() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return m.head(m.gamma * x * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + x)

    return Forward(
        forward, stem=nn.Conv2d(3, 8, 3), gamma=nn.Parameter(torch.zeros(1, 8, 1, 1)), head=Head(8)
    )


@architecture("Non-local block (attention over positions)", RGB, channels=(8, 4, 6))
def non_local() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        theta = m.theta(x).flatten(2).transpose(1, 2)
        phi = m.phi(x).flatten(2)
        value = m.value(x).flatten(2).transpose(1, 2)
        y = torch.bmm(torch.bmm(theta, phi).softmax(-1), value).transpose(1, 2)
        return m.head(x + m.out(y.reshape(y.shape[0], y.shape[1], x.shape[2], x.shape[3])))

    return Forward(
        forward,
        stem=nn.Conv2d(3, 8, 3, 2),
        theta=nn.Conv2d(8, 4, 1),
        phi=nn.Conv2d(8, 4, 1),
        value=nn.Conv2d(8, 6, 1),
        out=nn.Conv2d(6, 8, 1),
        head=Head(8),
    )


# --- branches, skips and channel rearrangements -------------------------------------------------


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass, the others are convolved, then both interleave."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn_relu(half, half, 1), conv_bn(half, half, 3, groups=half),
            conv_bn_relu(half, half, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept, moved = x.chunk(2, dim=1)
        x = torch.cat((kept, self.branch(moved)), dim=1)
        batch, width, height, length = x.shape
        x = x.view(batch, 2, width // 2, height, length).transpose(1, 2).contiguous()
        return x.view(batch, width, height, length)


# The second unit takes half of what the first one kept and half of what it convolved.
@architecture(
    "ShuffleNetV2-like split, concatenate and shuffle", RGB, channels=(4, 4, 8, 8, 4, 4, 8, 8)
)
def shufflenet_v2() -> nn.Module:
    return nn.Sequential(conv_bn_relu(3, 16), ShuffleUnit(16), ShuffleUnit(16), Head(16))


# After the shuffle, four channels of each producing group meet three consuming groups: 2, 1, 1.
@architecture("ShuffleNet-like grouped 1x1 and shuffle", RGB, channels=(4, 4, 4, 2, 2, 2, 4, 4, 4))
def shufflenet() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 12), conv_bn_relu(12, 12, 1, groups=3), nn.ChannelShuffle(3),
        conv_bn(12, 12, groups=12), conv_bn(12, 12, 1, groups=3), Head(12),
    )  # fmt: skip


# Every layer reads all earlier outputs, so the stem's and each layer's channels stay apart.
@architecture("DenseNet concatenation", RGB, channels=(8, 4, 4, 4, 10, 6))
def densenet() -> nn.Module:
    class Layer(nn.Module):
        def __init__(self, inputs: int, growth: int) -> None:
            super().__init__()
            self.inner = nn.Sequential(
                nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, growth, 3, padding=1)
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.inner(x)], 1)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3), Layer(8, 4), Layer(12, 4), Layer(16, 4),
        nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2),
        Layer(10, 6), Head(16),
    )  # fmt: skip


@architecture("Inception-like branches", RGB, channels=(8, 4, 3, 6, 5, 10))
def inception() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        branches = [m.one(x), m.three(m.reduce(x).relu()), m.pool(F.max_pool2d(x, 3, 1, 1))]
        return m.head(m.merge(torch.cat(branches, 1)).relu())

    return Forward(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        one=nn.Conv2d(8, 4, 1),
        reduce=nn.Conv2d(8, 3, 1),
        three=nn.Conv2d(3, 6, 3, padding=1),
        pool=nn.Conv2d(8, 5, 1),
        merge=nn.Conv2d(15, 10, 1),
        head=Head(10),
    )


@architecture("U-Net skips, transposed convolution", RGB, channels=(8, 12, 16, 10, 8, 6))
def unet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = m.enc1(x).relu()
        second = m.enc2(F.max_pool2d(first, 2)).relu()
        third = m.enc3(F.max_pool2d(second, 2)).relu()
        x = m.dec2(torch.cat([m.up2(third), second], 1)).relu()
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return m.out(m.dec1(torch.cat([first, x], 1)).relu())

    return Forward(
        forward,
        enc1=nn.Conv2d(3, 8, 3, padding=1),
        enc2=nn.Conv2d(8, 12, 3, padding=1),
        enc3=nn.Conv2d(12, 16, 3, padding=1),
        up2=nn.ConvTranspose2d(16, 10, 2, 2),
        dec2=nn.Conv2d(22, 8, 3, padding=1),
        dec1=nn.Conv2d(16, 6, 3, padding=1),
        out=nn.Conv2d(6, 4, 1),
    )


@architecture("Transposed convolutions, grouped and depthwise", RGB, channels=(4, 4, 6, 6, 6))
def transposed_grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 3, 2, 1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(12, 12, 3, 1, 1, groups=12), nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


@architecture(
    "Transposed convolution 1d and 3d", lambda: (SIGNAL, images(2, 3, 4, 4)), channels=(6, 8, 5, 7)
)
def transposed_other() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.out1(m.one(m.in1(x)).relu()).mean(2) + m.out3(m.three(m.in3(y))).mean((2, 3, 4))

    return ForwardPair(
        forward,
        in1=nn.Conv1d(3, 6, 3),
        one=nn.ConvTranspose1d(6, 8, 4, 2),
        out1=nn.Conv1d(8, 4, 1),
        in3=nn.Conv3d(2, 5, 1),
        three=nn.ConvTranspose3d(5, 7, 2, 2),
        out3=nn.Conv3d(7, 4, 1),
    )


# A channel after the shuffle is four channels before it: eight blocks of four move.
@architecture(
    "Two resolutions that exchange values (HRNet-like)", RGB, channels=(6, 6, 6, 12, 12, 12)
)
def two_resolutions() -> nn.Module:
    from tests.support import vision

    return vision.resolutions((1, 1), (1, 1))


@architecture("Pixel shuffle", RGB, channels=(6, 8))
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 32, 3, padding=1), nn.PixelShuffle(2),
        nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1),
    )  # fmt: skip


@architecture("Pixel unshuffle, space to depth", RGB, channels=(6, 8))
def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(24, 8, 1),
        nn.ReLU(), Head(8),
    )  # fmt: skip


@architecture("Upsampling, nearest", RGB, channels=(8, 6))
def upsampling() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 6, 3),
        nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


@architecture("Feature pyramid: upsample and add", RGB, channels=(8, 12, 10))
def feature_pyramid() -> nn.Module:
    def forward(m: Any, x: Tensor) -> list[Tensor]:
        fine = m.fine(x).relu()
        coarse = m.coarse(fine).relu()
        top = m.lateral2(coarse)
        low = m.lateral1(fine) + F.interpolate(top, size=fine.shape[-2:], mode="nearest")
        return [m.out(low), m.out(top)]

    return Forward(
        forward,
        fine=nn.Conv2d(3, 8, 3, 2, 1),
        coarse=nn.Conv2d(8, 12, 3, 2, 1),
        lateral1=nn.Conv2d(8, 10, 1),
        lateral2=nn.Conv2d(12, 10, 1),
        out=nn.Conv2d(10, 4, 3, padding=1),
    )


@architecture("Coordinates concatenated (CoordConv)", RGB, channels=(8, 10))
def coordinates() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        rows = torch.linspace(-1, 1, 16).view(1, 1, 16, 1).expand(x.shape[0], 1, 16, 16)
        return m.head(m.second(torch.cat([x, rows.to(x)], 1)).relu())

    return Forward(
        forward, first=nn.Conv2d(3, 8, 3, padding=1), second=nn.Conv2d(9, 10, 3), head=Head(10)
    )


# Channels i and 7 - i move as one.
@architecture("Channels flipped and added", RGB, channels=(4,))
def flip_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        return m.head(x + x.flip(1))

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("Channels flipped between two layers", RGB, channels=(8, 10))
def flip_between() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.second(m.first(x).relu().flip(1)).relu()),
        first=nn.Conv2d(3, 8, 3),
        second=nn.Conv2d(8, 10, 3),
        head=Head(10),
    )


@architecture("Channels rolled and added", RGB, channels=())
def roll_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        return m.head(x + x.roll(1, dims=1))

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("Channels reordered by an index", RGB, channels=(8, 10))
def index_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x).relu()[:, m.order]).relu())

    model = Forward(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 10, 3), head=Head(10))
    model.register_buffer("order", torch.tensor([3, 1, 7, 0, 2, 6, 5, 4]))
    return model


@architecture("Temporal shift of a part of the channels", SEQUENCE, channels=(4, 4, 8))
def temporal_shift() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        later = F.pad(x[:, :-1, :4], (0, 0, 1, 0))
        earlier = F.pad(x[:, 1:, 4:8], (0, 0, 0, 1))
        return m.head(torch.cat([later, earlier, x[:, :, 8:]], 2).relu()).mean(1)

    return Forward(forward, first=nn.Linear(16, 16), head=nn.Linear(16, CLASSES))


@architecture("Activation on a part of the channels", RGB, channels=(3, 5))
def partial_activation() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(torch.cat([x[:, :3].relu(), x[:, 3:]], 1))

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("Spatial shift of a part of the channels (S2-MLP)", RGB, channels=(2, 2, 4, 8))
def spatial_shift() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        parts = [x[:, :2].roll(1, dims=2), x[:, 2:4].roll(1, dims=3), x[:, 4:]]
        return m.head(m.second(torch.cat(parts, 1)).relu())

    return Forward(
        forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 8, 3, 4, bias=False), head=Head(8)
    )


@architecture("Concatenated ReLU of both signs", RGB, channels=(8, 10))
def crelu() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(m.second(torch.cat([x.relu(), (-x).relu()], 1)).relu())

    return Forward(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(16, 10, 3), head=Head(10))


# Channels i and 7 - i move as one, but the outer pair reaches the head in the opposite order.
@architecture("Mirrored differences, one pair swapped", RGB, channels=(3,))
def twisted_pairs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = (x - x.flip(1)).relu()
        return m.head(x[:, torch.tensor([7, 1, 2, 3, 4, 5, 6, 0])])

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("Every other channel subtracted", RGB)
def even_minus_odd() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head((x[:, ::2] - x[:, 1::2]).relu())

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(4))


@architecture("Dropout that stays on", VECTOR, outcome="refused")
def live_dropout() -> nn.Module:
    return Forward(
        lambda m, x: m.head(F.dropout(m.first(x), 0.5, training=True)),
        first=nn.Linear(12, 16),
        head=nn.Linear(16, CLASSES),
    )


@architecture("Branch on a value", VECTOR, outcome="refused")
def branch_on_value() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(x.relu() if x.sum() > 0 else x.tanh())

    return Forward(forward, first=nn.Linear(12, 16), head=nn.Linear(16, CLASSES))


# A wrong class seldom changes which class wins: the output alone would not show it.
@architecture("Only the predicted class is returned", SEQUENCE, channels=(3, 13))
def predicted_class() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = torch.cat([x[..., :3].sigmoid(), x[..., 3:].tanh()], -1)
        return (m.head(x).mean(1) + 9 * torch.eye(CLASSES)[0]).argmax(-1)

    return Forward(forward, first=nn.Linear(16, 16), head=nn.Linear(16, CLASSES))


@architecture("Cumulative sum over channels", RGB, channels=())
def cumsum_channels() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.first(x).cumsum(1)), first=nn.Conv2d(3, 8, 3), head=Head(8)
    )


@architecture("Channels sorted", RGB, channels=())
def sort_channels() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.first(x).sort(dim=1).values), first=nn.Conv2d(3, 8, 3), head=Head(8)
    )


@architecture("Fourier transform over channels (FNet-like)", SEQUENCE, channels=())
def fourier() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real).mean(1)

    return Forward(forward, first=nn.Linear(16, 8), head=nn.Linear(8, CLASSES))


@architecture("Local response norm", RGB, channels=(6,))
def local_response() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.Conv2d(8, 6, 3), Head(6)
    )


@architecture("Pooling across channels", RGB, channels=())
def pool_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool3d(m.first(x).unsqueeze(1), (3, 1, 1), (1, 1, 1), (1, 0, 0)).squeeze(1)
        return m.head(x)

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("Maxout over neighbouring channels", RGB, channels=(2, 2, 2, 2, 2, 2))
def maxout() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.first(x).unflatten(1, (6, 2)).amax(2))

    return Forward(forward, first=nn.Conv2d(3, 12, 3), head=Head(6))


@architecture("Constant buffer along channels", RGB, channels=())
def constant_buffer() -> nn.Module:
    model = Forward(
        lambda m, x: m.head(m.first(x).relu() * m.scale), first=nn.Conv2d(3, 8, 3), head=Head(8)
    )
    model.register_buffer("scale", torch.linspace(0.5, 2.0, 8).view(1, 8, 1, 1))
    return model


@architecture("Constant made in forward along channels", RGB, channels=())
def constant_forward() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        return m.head(x * torch.arange(1, 9, dtype=x.dtype).view(1, 8, 1, 1))

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("Sinusoidal positions added along channels", SEQUENCE, channels=(12,))
def sinusoidal() -> nn.Module:
    position, frequency = torch.arange(6.0)[:, None], 10.0 ** -torch.linspace(0, 2, 8)
    angle = position * frequency
    model = Forward(
        lambda m, x: m.head(m.hidden(m.first(x) + m.table).relu()).mean(1),
        first=nn.Linear(16, 16),
        hidden=nn.Linear(16, 12),
        head=nn.Linear(12, CLASSES),
    )
    model.register_buffer("table", torch.cat([angle.sin(), angle.cos()], 1))
    return model


@architecture("Channels of one tensor masked by index", RGB, channels=(2, 6))
def masked_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        keep = torch.tensor([True, True, False, True, True, True, False, True])
        return m.head(torch.where(keep.view(1, 8, 1, 1), x, x.mean((2, 3), keepdim=True)))

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("In-place write to a slice of channels", RGB, channels=(3, 5))
def slice_write() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x[:, :3] = x[:, :3].relu()
        return m.head(x)

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


# --- gating, mixing, products -------------------------------------------------------------------


@architecture("GLU over a chunk of channels", RGB, channels=(8, 10))
def glu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GLU(dim=1), nn.Conv2d(8, 20, 3), nn.GLU(dim=1), Head(10)
    )


@architecture("SwiGLU MLP", SEQUENCE, channels=(16, 12))
def swiglu() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.down(F.silu(m.gate(x)) * m.up(x))
        return m.head(x)

    return Forward(
        forward,
        stem=nn.Linear(16, 16),
        gate=nn.Linear(16, 12, bias=False),
        up=nn.Linear(16, 12, bias=False),
        down=nn.Linear(12, 16, bias=False),
        head=nn.Linear(16, CLASSES),
    )


# Positions are fixed, and with them the width that mixes them.
@architecture("MLP-Mixer, transposed axes", RGB, channels=(8, 10, 12))
def mixer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x).flatten(2).transpose(1, 2)
        x = x + m.token2(F.gelu(m.token1(m.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + m.channel2(F.gelu(m.channel1(m.norm2(x))))
        return m.head(x.mean(1))

    return Forward(
        forward,
        embed=nn.Conv2d(3, 8, 4, 4),
        norm1=nn.LayerNorm(8),
        token1=nn.Linear(16, 10),
        token2=nn.Linear(10, 16),
        norm2=nn.LayerNorm(8),
        channel1=nn.Linear(8, 12),
        channel2=nn.Linear(12, 8),
        head=nn.Linear(8, CLASSES),
    )


@architecture("gMLP-like spatial gating", SEQUENCE, channels=(12, 10))
def gmlp() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        u, v = F.gelu(m.expand(x)).chunk(2, dim=-1)
        v = m.spatial(m.norm(v))
        return m.head(m.project(u * v)).mean(1)

    return Forward(
        forward,
        expand=nn.Linear(16, 24),
        norm=nn.LayerNorm(12),
        spatial=nn.Conv1d(6, 6, 1),
        project=nn.Linear(12, 10),
        head=nn.Linear(10, CLASSES),
    )


@architecture("Einsum layers", SEQUENCE, channels=(8, 10))
def einsum() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.einsum("bti,oi->bto", x, m.first).relu()
        x = torch.einsum("bti,io->bto", x, m.second).relu()
        return torch.einsum("bti,ic->bc", x, m.head)

    return Forward(
        forward,
        first=nn.Parameter(torch.zeros(8, 16)),
        second=nn.Parameter(torch.zeros(8, 10)),
        head=nn.Parameter(torch.zeros(10, CLASSES)),
    )


@architecture("Matrix products with bare parameters", VECTOR, channels=(8, 10))
def bare_matmul() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.addmm(m.bias, x, m.first).relu()
        x = (x @ m.second.T + m.shift).relu()
        return x.matmul(m.head)

    return Forward(
        forward,
        first=nn.Parameter(torch.zeros(12, 8)),
        bias=nn.Parameter(torch.zeros(8)),
        second=nn.Parameter(torch.zeros(10, 8)),
        shift=nn.Parameter(torch.zeros(10)),
        head=nn.Parameter(torch.zeros(10, CLASSES)),
    )


@architecture("Bilinear pooling (outer product)", RGB, channels=())
def bilinear_pooling() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu().flatten(2)
        return m.head(torch.bmm(x, x.transpose(1, 2)).flatten(1) / x.shape[2])

    return Forward(forward, stem=nn.Conv2d(3, 8, 3), head=nn.Linear(64, CLASSES))


@architecture("Bilinear layer", VECTOR, channels=(6, 8, 10))
def bilinear() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.mix(m.left(x), m.right(x)).relu()),
        left=nn.Linear(12, 6),
        right=nn.Linear(12, 8),
        mix=nn.Bilinear(6, 8, 10),
        head=nn.Linear(10, CLASSES),
    )


@architecture("Cosine classifier", RGB, channels=(8,))
def cosine() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu().mean((2, 3))
        return F.linear(F.normalize(x, dim=1), F.normalize(m.prototypes, dim=1)) * m.temperature

    return Forward(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        prototypes=nn.Parameter(torch.zeros(CLASSES, 8)),
        temperature=nn.Parameter(torch.ones(())),
    )


@architecture("Distances to prototypes", VECTOR, channels=(8,))
def prototypes() -> nn.Module:
    return Forward(
        lambda m, x: -torch.cdist(m.hidden(x).relu(), m.centres),
        hidden=nn.Linear(12, 8),
        centres=nn.Parameter(torch.zeros(CLASSES, 8)),
    )


@architecture("Soft mixture of experts", VECTOR)
def mixture() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        gate = m.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in m.experts], dim=1)
        return m.head((gate.unsqueeze(-1) * outputs).sum(1))

    return Forward(
        forward,
        stem=nn.Linear(12, 16),
        router=nn.Linear(16, 3),
        experts=nn.ModuleList(
            nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))
            for width in (6, 7, 8)
        ),
        head=nn.Linear(10, CLASSES),
    )


@architecture("Experts in a list, weighed and added up", VECTOR, channels=(1, 1, 1, 6, 6, 6, 16))
def listed_experts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        shares = m.router(x).softmax(-1)
        found = torch.zeros_like(x)
        for i, expert in enumerate(m.experts):
            found += shares[:, i : i + 1] * expert(x)
        return m.head(x + found)

    return Forward(
        forward,
        stem=nn.Linear(12, 16),
        router=nn.Linear(16, 3),
        experts=nn.ModuleList(
            nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16)) for _ in range(3)
        ),
        head=nn.Linear(16, CLASSES),
    )


@architecture("Weights made by a network (hypernetwork)", VECTOR, channels=())
def hypernetwork() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.stem(x).relu()
        weight = m.generator(hidden).view(-1, 4, 8)
        return m.head(torch.einsum("boi,bi->bo", weight, hidden).relu())

    return Forward(
        forward, stem=nn.Linear(12, 8), generator=nn.Linear(8, 32), head=nn.Linear(4, CLASSES)
    )


@architecture("FiLM conditioning", lambda: (RGB, VECTOR), channels=(8, 10))
def film() -> nn.Module:
    def forward(m: Any, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = m.condition(m.embed(condition).relu()).chunk(2, 1)
        x = m.stem(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return m.head(x.relu())

    return ForwardPair(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        embed=nn.Linear(12, 10),
        condition=nn.Linear(10, 16),
        head=Head(8),
    )


# --- operations that people use: indices, sums over letters, normalised weights -----------------


@architecture("Position ids that depend on the input (RoBERTa-like)", TEXT, channels=(10, 20))
def position_ids() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        is_word = (x != 0).long()
        types = torch.gather(m.types.expand(x.size(0), -1), 1, is_word.cumsum(1) * is_word)
        x = m.words(x) + m.positions(is_word.cumsum(1) * is_word) + m.kinds(types)
        return m.head(m.hidden(x).relu().mean(1))

    net = Forward(
        forward,
        words=nn.Embedding(23, 20),
        positions=nn.Embedding(12, 20),
        kinds=nn.Embedding(2, 20),
        hidden=nn.Linear(20, 10),
        head=nn.Linear(10, CLASSES),
    )
    net.register_buffer("types", torch.arange(12).remainder(2)[None])
    return net


@architecture("Position that the input chooses (CLIP-like end of text)", TEXT, channels=(10, 20))
def end_of_text() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.hidden(m.words(x)).relu()
        return m.head(hidden[torch.arange(x.size(0)), x.argmax(-1)])

    return Forward(
        forward,
        words=nn.Embedding(23, 20),
        hidden=nn.Linear(20, 10),
        head=nn.Linear(10, CLASSES),
    )


@architecture("A bare table read by the input", TEXT, channels=(20,))
def bare_table() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.table[x].relu().mean(1)),
        table=nn.Parameter(torch.zeros(23, 20)),
        head=nn.Linear(20, CLASSES),
    )


@architecture("Channels chosen by the input", lambda: (VECTOR, tokens(3, 8)), channels=())
def chosen_channels() -> nn.Module:
    return ForwardPair(
        lambda m, x, y: m.head(m.first(x).relu().gather(1, y)),
        first=nn.Linear(12, 8),
        head=nn.Linear(3, CLASSES),
    )


@architecture("Masked positions replaced by a token", SEQUENCE, channels=(10,))
def mask_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.first(x).clone()
        hidden[x[..., 0] > 0] = m.token
        return m.head(hidden.relu().mean(1))

    return Forward(
        forward,
        first=nn.Linear(16, 10),
        token=nn.Parameter(torch.zeros(10)),
        head=nn.Linear(10, CLASSES),
    )


@architecture("Rows added up by index", SEQUENCE, channels=(10,))
def rows_added() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.first(x).relu()
        places = (x[..., :1] > 0).long().expand(-1, -1, 10)
        return m.head(hidden.new_zeros(x.size(0), 2, 10).scatter_add(1, places, hidden).flatten(1))

    return Forward(forward, first=nn.Linear(16, 10), head=nn.Linear(20, CLASSES))


@architecture("Writes to parts of a new tensor", RGB, channels=(2, 6))
def partial_writes() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        y = torch.zeros_like(x)
        y[:, 2:4] = x[:, :2].tanh()
        y[:, 4].zero_()
        y[:, 5] = 1.0
        x[x < 0] = 0.0
        return m.head(torch.cat([x[:, 2:], y[:, 2:]], 1))

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(12))


@architecture("Views of features written in place", RGB, channels=(3, 5))
def view_writes() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        last = x.permute(0, 2, 3, 1)
        last[..., :3].mul_(2.0)
        return m.head(x.relu())

    return Forward(forward, first=nn.Conv2d(3, 8, 3), head=Head(8))


@architecture("Patches taken apart and folded", RGB, channels=(4, 4))
def folded() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.unfold(m.first(x), 3, padding=1)
        x = F.fold(m.hidden(x).relu(), (14, 14), 3, padding=1)
        return m.head(x)

    return Forward(forward, first=nn.Conv2d(3, 4, 3), hidden=nn.Conv1d(36, 36, 1), head=Head(4))


@architecture("Features sampled on a grid", RGB, channels=(8,))
def grid_sample() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        grid = m.offsets(x.mean((2, 3))).view(-1, 3, 3, 2).tanh()
        return m.head(F.grid_sample(m.first(x), grid, align_corners=False).relu())

    return Forward(forward, first=nn.Conv2d(3, 8, 3), offsets=nn.Linear(3, 18), head=Head(8))


@architecture("Fourier transform over positions (GFNet-like)", RGB, channels=(8,))
def fourier_positions() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(m.first(x)) * m.filter
        return m.head(torch.fft.irfft2(spectrum, s=(14, 14)).relu())

    return Forward(
        forward,
        first=nn.Conv2d(3, 8, 3),
        filter=nn.Parameter(torch.zeros(8, 14, 8)),
        head=Head(8),
    )


@architecture("Cumulative sum over positions", SEQUENCE, channels=(10,))
def cumsum_positions() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.first(x).cumsum(1).relu().floor_divide(0.3).mean(1)),
        first=nn.Linear(16, 10),
        head=nn.Linear(10, CLASSES),
    )


@architecture("Einsum attention with a weight for each head", SEQUENCE)
def einsum_heads() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        query, key, value = (
            torch.einsum("btc,hcd->bhtd", x, one) for one in (m.query, m.key, m.value)
        )
        scores = torch.einsum("bhtd,bhsd->bhts", query, key).softmax(-1)
        mixed = torch.einsum("bhts,bhsd->bthd", scores, value)
        return m.head(torch.einsum("bthd,hdc->btc", mixed, m.out).relu().mean(1))

    return Forward(
        forward,
        **{name: nn.Parameter(torch.zeros(2, 16, 4)) for name in ("query", "key", "value")},
        out=nn.Parameter(torch.zeros(2, 4, 12)),
        head=nn.Linear(12, CLASSES),
    )


@architecture("Bias joined from two parts and zeros", SEQUENCE)
def joined_bias() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        bias = torch.cat([m.of_query, torch.zeros(8), m.of_value])
        query, key, value = F.linear(x, m.weight, bias).view(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return m.head(m.out(mixed.transpose(1, 2).flatten(2)).relu().mean(1))

    return Forward(
        forward,
        weight=nn.Parameter(torch.zeros(24, 16)),
        of_query=nn.Parameter(torch.zeros(8)),
        of_value=nn.Parameter(torch.zeros(8)),
        out=nn.Linear(8, 12),
        head=nn.Linear(12, CLASSES),
    )


@architecture("Low-rank change of a weight (LoRA)", VECTOR, channels=(3, 10))
def low_rank() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.linear(x, m.weight + m.up @ m.down).relu())

    return Forward(
        forward,
        weight=nn.Parameter(torch.zeros(10, 12)),
        up=nn.Parameter(torch.zeros(10, 3)),
        down=nn.Parameter(torch.zeros(3, 12)),
        head=nn.Linear(10, CLASSES),
    )


@architecture("Cosine similarity with prototypes", VECTOR, channels=(8,))
def similarity() -> nn.Module:
    return Forward(
        lambda m, x: F.cosine_similarity(m.hidden(x).relu()[:, None], m.centres[None], -1),
        hidden=nn.Linear(12, 8),
        centres=nn.Parameter(torch.zeros(CLASSES, 8)),
    )


@architecture("Weight read as a layer and as a table", VECTOR, channels=())
def read_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.second(m.first(x).relu()).relu()
        return m.head(x) + m.second.weight.sin()[:CLASSES, 0]

    return Forward(
        forward,
        first=nn.Linear(12, 9),
        second=nn.Linear(9, 7),
        head=nn.Linear(7, CLASSES),
    )


@architecture("An operation that nobody knows", VECTOR, channels=(10,))
def unknown_operation() -> nn.Module:
    return Forward(
        lambda m, x: m.head(torch.linalg.matrix_exp(m.first(m.enter(x).relu()).view(-1, 2, 2))),
        enter=nn.Linear(12, 10),
        first=nn.Linear(10, 4),
        head=nn.Linear(2, CLASSES),
    )


# --- sharing, several inputs and outputs --------------------------------------------------------


@architecture("Embedding, mean and MLP", TEXT, channels=(8, 12))
def embedding_mean() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.hidden(m.embed(x).mean(1)).relu()),
        embed=nn.Embedding(23, 8, padding_idx=0),
        hidden=nn.Linear(8, 12),
        head=nn.Linear(12, CLASSES),
    )


@architecture("EmbeddingBag", TEXT, channels=(8,))
def embedding_bag() -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.embed(x).relu()),
        embed=nn.EmbeddingBag(23, 8, mode="mean"),
        head=nn.Linear(8, CLASSES),
    )


@architecture("Output head tied to the embedding", TEXT, channels=(8, 12))
def tied_embedding() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(23, 8)
            self.first = nn.Linear(8, 12)
            self.second = nn.Linear(12, 8)
            self.head = nn.Linear(8, 23, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.second(self.first(x).relu()))

    return Tied()


# Its output is its own next input, so one group covers both of its sides.
@architecture("One layer applied three times", VECTOR, channels=(16,))
def repeated_layer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        for _ in range(3):
            x = m.shared(x).relu()
        return m.head(x)

    return Forward(
        forward, stem=nn.Linear(12, 16), shared=nn.Linear(16, 16), head=nn.Linear(16, CLASSES)
    )


@architecture("One layer under two names", VECTOR, channels=(16,))
def two_names() -> nn.Module:
    shared = nn.Linear(16, 16)
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(16, CLASSES)
    )


@architecture("Encoder and decoder with transposed weight", VECTOR, channels=(8,))
def tied_autoencoder() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        code = F.linear(x, m.weight, m.code_bias).relu()
        return F.linear(code, m.weight.t(), m.out_bias)

    return Forward(
        forward,
        weight=nn.Parameter(torch.zeros(8, 12)),
        code_bias=nn.Parameter(torch.zeros(8)),
        out_bias=nn.Parameter(torch.zeros(12)),
    )


@architecture("Two heads, tuple output", RGB, channels=(8, 6))
def two_heads() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = m.stem(x).relu()
        return m.label(x), m.box(m.neck(x).relu())

    return Forward(
        forward, stem=nn.Conv2d(3, 8, 3), label=Head(8), neck=nn.Conv2d(8, 6, 3), box=Head(6)
    )


@architecture("Dict output with nested list", RGB, channels=(8,))
def dict_output() -> nn.Module:
    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        x = m.stem(x).relu()
        return {"logits": m.head(x), "maps": [m.mask(x), m.mask(x.relu())]}

    return Forward(forward, stem=nn.Conv2d(3, 8, 3), head=Head(8), mask=nn.Conv2d(8, 2, 1))


@dataclasses.dataclass
class Prediction:
    logits: Tensor
    score: Tensor


torch.export.register_dataclass(Prediction)


@architecture("Dataclass output", RGB, channels=(8,))
def dataclass_output() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Prediction:
        x = m.stem(x).relu()
        logits = m.head(x)
        return Prediction(logits=logits, score=logits.softmax(-1).amax(-1))

    return Forward(forward, stem=nn.Conv2d(3, 8, 3), head=Head(8))


# The features are an output, so they must not move; only the inner layer may.
@architecture("Features returned beside the logits", RGB, channels=(10,))
def features_output() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.second(m.first(x).relu())
        return m.head(features), features

    return Forward(forward, first=nn.Conv2d(3, 10, 3), second=nn.Conv2d(10, 8, 3), head=Head(8))


@architecture("Feature norm returned beside the logits", RGB, channels=(8,))
def norm_output() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.stem(x).relu().mean((2, 3))
        return m.head(features), features.norm(dim=1)

    return Forward(forward, stem=nn.Conv2d(3, 8, 3), head=nn.Linear(8, CLASSES))


@architecture("Largest channel's index returned", RGB, channels=())
def argmax_output() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.stem(x).relu().mean((2, 3))
        return m.head(features), features.argmax(1)

    return Forward(forward, stem=nn.Conv2d(3, 8, 3), head=nn.Linear(8, CLASSES))


@architecture("Two inputs", lambda: (RGB, VECTOR), channels=(8, 10, 12))
def two_inputs() -> nn.Module:
    def forward(m: Any, image: Tensor, vector: Tensor) -> Tensor:
        seen = m.conv(image).relu().mean((2, 3))
        return m.head(m.merge(torch.cat([seen, m.linear(vector).relu()], 1)).relu())

    return ForwardPair(
        forward,
        conv=nn.Conv2d(3, 8, 3),
        linear=nn.Linear(12, 10),
        merge=nn.Linear(18, 12),
        head=nn.Linear(12, CLASSES),
    )


@architecture("Keyword inputs", lambda: {"image": RGB, "vector": VECTOR}, channels=(8,))
def keyword_inputs() -> nn.Module:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.linear = nn.Linear(12, 8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, image: Tensor, vector: Tensor) -> Tensor:
            return self.head(self.conv(image).relu().mean((2, 3)) + self.linear(vector))

    return Keywords()


class AnyArguments(nn.Module):
    """Takes its inputs as ``*arguments``, as wrappers around a model do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.inner(*arguments, **keywords)


@architecture("Wrapper that takes *arguments", VECTOR, channels=(16, 24))
def any_arguments() -> nn.Module:
    return AnyArguments(mlp())


@architecture(
    "Wrapper that takes keywords of any name",
    lambda: {"image": RGB, "vector": VECTOR},
    channels=(8,),
)
def any_keywords() -> nn.Module:
    class AnyKeywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = keyword_inputs()

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.inner(**inputs)

    return AnyKeywords()


@architecture("Siamese encoder", lambda: (RGB, images(3, 16, 16, seed=5)), channels=(8, 10))
def siamese() -> nn.Module:
    def forward(m: Any, left: Tensor, right: Tensor) -> Tensor:
        distance = (m.encoder(left) - m.encoder(right)).abs()
        return m.head(distance)

    return ForwardPair(
        forward,
        encoder=nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        ),
        head=nn.Linear(10, CLASSES),
    )


# --- attention ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with separate or fused projections, fused kernel or plain products."""

    def __init__(
        self,
        width: int,
        heads: int,
        fused_projection: bool = False,
        kernel: str = "sdpa",
        rotary: bool = False,
        relative: int = 0,
        key_heads: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.size = heads, key_heads or heads, width // heads
        self.kernel, self.rotary = kernel, rotary
        if fused_projection:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, self.key_heads * self.size)
            self.value = nn.Linear(width, self.key_heads * self.size)
        self.out = nn.Linear(width, width)
        self.fused_projection = fused_projection
        self.relative = None
        if relative:
            self.relative = nn.Parameter(torch.zeros(2 * relative - 1, heads))
            offsets = torch.arange(relative)
            self.register_buffer("offsets", offsets[:, None] - offsets[None, :] + relative - 1)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)

    def rotate(self, x: Tensor) -> Tensor:
        half = self.size // 2
        position = torch.arange(x.shape[2], dtype=x.dtype)
        frequency = 10.0 ** -torch.arange(half, dtype=x.dtype)
        angle = torch.outer(position, frequency).repeat(1, 2)
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angle.cos() + turned * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if self.fused_projection:
            qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.size)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
        else:
            query = self.split(self.query(x), self.heads)
            key = self.split(self.key(x), self.key_heads)
            value = self.split(self.value(x), self.key_heads)
        if self.rotary:
            query, key = self.rotate(query), self.rotate(key)
        if self.key_heads != self.heads:
            key = key.repeat_interleave(self.heads // self.key_heads, dim=1)
            value = value.repeat_interleave(self.heads // self.key_heads, dim=1)
        if self.kernel == "sdpa":
            y = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.transpose(-2, -1) / math.sqrt(self.size)
            if self.relative is not None:
                bias = self.relative[self.offsets.flatten()].view(length, length, self.heads)
                scores = scores + bias.permute(2, 0, 1)
            y = scores.softmax(-1) @ value
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Transformer(nn.Module):
    """A pre-norm transformer layer on a linear embedding, mean-pooled."""

    def __init__(self, attention: nn.Module, norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.norm1, self.attention = norm(16), attention
        self.norm2, self.up, self.down = norm(16), nn.Linear(16, 20), nn.Linear(20, 16)
        self.norm, self.head = norm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x).mean(1))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@architecture("Attention, one head", SEQUENCE, channels=(16, 16, 16, 20))
def attention_one_head() -> nn.Module:
    return Transformer(Attention(16, 1))


# Each head has one group for its queries and keys and one for its values.
@architecture("Attention, fused kernel", SEQUENCE, channels=(16, 20, 4, 4, 4, 4, 4, 4, 4, 4))
def attention_sdpa() -> nn.Module:
    return Transformer(Attention(16, 4))


@architecture("Attention, matmul and softmax", SEQUENCE, channels=(16, 20, 4, 4, 4, 4, 4, 4, 4, 4))
def attention_matmul() -> nn.Module:
    return Transformer(Attention(16, 4, kernel="matmul"))


@architecture("Attention, fused projection", SEQUENCE, channels=(16, 20, 8, 8, 8, 8))
def attention_fused() -> nn.Module:
    return Transformer(Attention(16, 2, fused_projection=True))


@architecture("Attention, relative position bias", SEQUENCE)
def attention_relative() -> nn.Module:
    return Transformer(Attention(16, 4, kernel="matmul", relative=6))


# Rotary angles tell the query and key channels apart: they move with their whole head only.
@architecture(
    "Attention, rotary and grouped-query, RMSNorm", SEQUENCE, channels=(16, 20, 4, 4, 1, 1, 1, 1)
)
def attention_rotary() -> nn.Module:
    return Transformer(Attention(16, 4, rotary=True, key_heads=2), RMSNorm)


@architecture("RMSNorm module", SEQUENCE, channels=(16, 10))
def rmsnorm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 16), nn.RMSNorm(16), nn.GELU(), nn.Linear(16, 10), RMSNorm(10),
        nn.Linear(10, CLASSES),
    )  # fmt: skip


@architecture(
    "Vision transformer: class token, learned positions",
    RGB,
    channels=(16, 20, 4, 4, 4, 4, 4, 4, 4, 4),
)
def vision_transformer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.positions
        x = x + m.attention(m.norm1(x))
        x = x + m.mlp(m.norm2(x))
        return m.head(m.norm(x)[:, 0])

    return Forward(
        forward,
        embed=nn.Conv2d(3, 16, 4, 4),
        token=nn.Parameter(torch.zeros(1, 1, 16)),
        positions=nn.Parameter(torch.zeros(1, 17, 16)),
        norm1=nn.LayerNorm(16),
        attention=Attention(16, 4),
        norm2=nn.LayerNorm(16),
        mlp=nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)),
        norm=nn.LayerNorm(16),
        head=nn.Linear(16, CLASSES),
    )


@architecture("nn.MultiheadAttention", SEQUENCE, channels=(16, 20, 4, 4, 4, 4, 4, 4, 4, 4))
def multihead_attention() -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    return Transformer(Wrapped())


@architecture("nn.TransformerEncoderLayer", SEQUENCE, channels=(16, 20, 4, 4, 4, 4, 4, 4, 4, 4))
def encoder_layer() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 16),
        nn.TransformerEncoderLayer(16, 4, 20, batch_first=True, norm_first=True),
        nn.Linear(16, CLASSES),
    )


@architecture("Attention that keeps its biases in eval mode, rows normalised (LeViT-like)", RGB)
def kept_biases() -> nn.Module:
    from tests.support import vision

    return vision.hybrid(1)


@architecture("Cross-attention", lambda: (SEQUENCE, images(5, 10)), channels=(8, 12, 6))
def cross_attention() -> nn.Module:
    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        query, key, value = m.query(x), m.key(memory), m.value(memory)
        y = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
        return m.head(m.out(y[:, 0])).mean(1)

    return ForwardPair(
        forward,
        query=nn.Linear(16, 8),
        key=nn.Linear(10, 8),
        value=nn.Linear(10, 12),
        out=nn.Linear(12, 6),
        head=nn.Linear(6, CLASSES),
    )


@architecture("Channel attention (scores between channels)", SEQUENCE)
def channel_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        query, key, value = m.query(x), m.key(x), m.value(x)
        scores = (query.transpose(1, 2) @ key).softmax(-1)
        return m.head((scores @ value.transpose(1, 2)).transpose(1, 2)).mean(1)

    return Forward(
        forward,
        query=nn.Linear(16, 8),
        key=nn.Linear(16, 10),
        value=nn.Linear(16, 10),
        head=nn.Linear(8, CLASSES),
    )


@architecture(
    "Windowed attention with shifted windows", SEQUENCE, channels=(16, 20, 4, 4, 4, 4, 4, 4, 4, 4)
)
def shifted_windows() -> nn.Module:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, width = x.shape
            x = x.roll(-1, 1).reshape(-1, 3, width)
            return self.inner(x).reshape(batch, length, width).roll(1, 1)

    return Transformer(Windows())


# --- recurrence ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inner = kind(16, 8, batch_first=True, **options)
        self.head = nn.Linear(8 * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


@architecture("RNN", SEQUENCE, channels=(8,))
def rnn() -> nn.Module:
    return Recurrent(nn.RNN)


@architecture("LSTM, two layers", SEQUENCE, channels=(8, 8))
def lstm() -> nn.Module:
    return Recurrent(nn.LSTM, num_layers=2)


@architecture("GRU, bidirectional", SEQUENCE, channels=(8, 8))
def gru() -> nn.Module:
    return Recurrent(nn.GRU, bidirectional=True)


# The state feeds itself, so the cell's width is one group.
@architecture("Hand-written recurrent cell, unrolled", SEQUENCE, channels=(8,))
def recurrent_cell() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            gate = torch.sigmoid(m.gate_input(step) + m.gate_state(state))
            state = gate * state + (1 - gate) * torch.tanh(m.input(step) + m.state(state))
        return m.head(state)

    return Forward(
        forward,
        gate_input=nn.Linear(16, 8),
        gate_state=nn.Linear(8, 8, bias=False),
        input=nn.Linear(16, 8),
        state=nn.Linear(8, 8, bias=False),
        head=nn.Linear(8, CLASSES),
    )


@architecture("nn.LSTMCell, unrolled", SEQUENCE, channels=(8,))
def lstm_cell() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = (x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 8))
        for step in x.unbind(1):
            state = m.cell(step, state)
        return m.head(state[0])

    return Forward(forward, cell=nn.LSTMCell(16, 8), head=nn.Linear(8, CLASSES))


@architecture("Recurrent cell with fused gates", SEQUENCE, channels=(8,))
def fused_gates() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = memory = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            gates = m.input(step) + m.state(state)
            write, keep, show, value = gates.chunk(4, 1)
            memory = keep.sigmoid() * memory + write.sigmoid() * value.tanh()
            state = show.sigmoid() * memory.tanh()
        return m.head(state)

    return Forward(
        forward,
        input=nn.Linear(16, 32),
        state=nn.Linear(8, 32, bias=False),
        head=nn.Linear(8, CLASSES),
    )


# --- models nobody here wrote -------------------------------------------------------------------


def transformers_architecture(
    name: str, model: str, config: str, inputs: Inputs, options: Mapping[str, Any], **record: Any
) -> None:
    """Enter a class of the transformers package, with a small random-weight configuration."""

    def factory() -> nn.Module:
        package = importlib.import_module("transformers")
        return getattr(package, model)(getattr(package, config)(**options))

    architecture(name, inputs, source="transformers", **record)(factory)


PIXELS = images(3, 32, 32)

transformers_architecture(
    "transformers ResNet, basic blocks",
    "ResNetForImageClassification",
    "ResNetConfig",
    PIXELS,
    {
        "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic",
        "num_labels": CLASSES,
    },
    channels=(8, 8, 8, 12, 12),
)  # fmt: skip
transformers_architecture(
    "transformers ResNet, bottleneck blocks",
    "ResNetModel",
    "ResNetConfig",
    PIXELS,
    {
        "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1],
        "layer_type": "bottleneck",
    },
    channels=(8, 16, 4, 4, 4, 4, 6, 6),
)  # fmt: skip
transformers_architecture(
    "transformers MobileNetV1",
    "MobileNetV1ForImageClassification",
    "MobileNetV1Config",
    PIXELS,
    {"depth_multiplier": 0.25, "image_size": 32, "num_labels": CLASSES},
    channels=(8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256),
)
transformers_architecture(
    "transformers MobileNetV2",
    "MobileNetV2ForImageClassification",
    "MobileNetV2Config",
    PIXELS,
    {
        "depth_multiplier": 0.25,
        "image_size": 32,
        "num_labels": CLASSES,
        "finegrained_output": False,
    },
)
transformers_architecture(
    "transformers ConvNeXt",
    "ConvNextForImageClassification",
    "ConvNextConfig",
    PIXELS,
    {"hidden_sizes": [8, 12], "depths": [2, 1], "num_stages": 2, "num_labels": CLASSES},
    channels=(8, 32, 32, 12, 48),
)
transformers_architecture(
    "transformers ConvNeXtV2",
    "ConvNextV2ForImageClassification",
    "ConvNextV2Config",
    PIXELS,
    {"hidden_sizes": [8, 12], "depths": [2, 1], "num_stages": 2, "num_labels": CLASSES},
    channels=(8, 32, 32, 12, 48),
)
transformers_architecture(
    "transformers RegNet Y",
    "RegNetForImageClassification",
    "RegNetConfig",
    PIXELS,
    {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4,
        "layer_type": "y", "num_labels": CLASSES,
    },
    seed=2,
)  # fmt: skip
transformers_architecture(
    "transformers EfficientNet",
    "EfficientNetForImageClassification",
    "EfficientNetConfig",
    PIXELS,
    {
        "width_coefficient": 0.25, "depth_coefficient": 1.0, "image_size": 32, "hidden_dim": 320,
        "kernel_sizes": [3, 5], "in_channels": [32, 32], "out_channels": [32, 64],
        "depthwise_padding": [1], "strides": [1, 2], "num_block_repeats": [1, 2],
        "expand_ratios": [1, 2], "depth_divisor": 8, "num_labels": CLASSES,
    },
    channels=(8, 2, 8, 16, 2, 16, 32, 4, 320),
)  # fmt: skip
transformers_architecture(
    "transformers PoolFormer",
    "PoolFormerForImageClassification",
    "PoolFormerConfig",
    PIXELS,
    {
        "hidden_sizes": [8, 12], "depths": [1, 1], "num_encoder_blocks": 2, "mlp_ratio": 2.0,
        "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1], "num_labels": CLASSES,
    },
    channels=(8, 16, 12, 24),
)  # fmt: skip

VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "image_size": 32, "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
transformers_architecture(
    "transformers ViT",
    "ViTForImageClassification",
    "ViTConfig",
    PIXELS,
    VISION,
    channels=(16, 20, 20, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
)
transformers_architecture(
    "transformers DeiT",
    "DeiTForImageClassificationWithTeacher",
    "DeiTConfig",
    PIXELS,
    VISION,
    channels=(16, 20, 20, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
)
transformers_architecture(
    "transformers Swin",
    "SwinForImageClassification",
    "SwinConfig",
    PIXELS,
    {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
        "window_size": 4, "num_labels": CLASSES,
    },
)  # fmt: skip
transformers_architecture(
    "transformers SegFormer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    PIXELS,
    {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2], "decoder_hidden_size": 12, "num_labels": CLASSES,
    },
)  # fmt: skip

LANGUAGE = {
    "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 20, "max_position_embeddings": 12, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MASKED_TEXT = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT)}
transformers_architecture(
    "transformers BERT",
    "BertForSequenceClassification",
    "BertConfig",
    MASKED_TEXT,
    LANGUAGE | {"num_labels": CLASSES},
    channels=(16, 16, 20, 20, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
)
transformers_architecture(
    "transformers BERT, tied masked-language head",
    "BertForMaskedLM",
    "BertConfig",
    TEXT,
    LANGUAGE,
)
transformers_architecture(
    "transformers GPT-2, fused projection, tied head",
    "GPT2LMHeadModel",
    "GPT2Config",
    {"input_ids": TEXT},
    {
        "vocab_size": 23, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 4,
        "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
    },
    channels=(16, 64, 64, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
)  # fmt: skip
transformers_architecture(
    "transformers Llama, grouped-query",
    "LlamaForCausalLM",
    "LlamaConfig",
    {"input_ids": TEXT},
    LANGUAGE | {"num_key_value_heads": 2},
    tolerance=1e-5,
    channels=(16, 20, 20, 4, 4, 4, 4, *(1,) * 8),
)
transformers_architecture(
    "transformers Mistral, sliding window",
    "MistralForCausalLM",
    "MistralConfig",
    {"input_ids": TEXT},
    LANGUAGE | {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4},
    tolerance=1e-5,
    channels=(16, 20, 20, 4, 4, 4, 4, *(1,) * 8),
)
transformers_architecture(
    "transformers Qwen3, query and key norms",
    "Qwen3ForCausalLM",
    "Qwen3Config",
    {"input_ids": TEXT},
    LANGUAGE | {"num_key_value_heads": 2, "head_dim": 4},
    tolerance=1e-5,
    channels=(16, 20, 20, 4, 4, 4, 4, *(1,) * 8),
)
transformers_architecture(
    "transformers GPT-NeoX, parallel residual",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    {"input_ids": TEXT},
    LANGUAGE | {"rotary_pct": 0.5},
    channels=(16, 20, 20, 2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4, *(1,) * 8),
)
transformers_architecture(
    "transformers T5 encoder",
    "T5EncoderModel",
    "T5Config",
    {"input_ids": TEXT},
    {
        "vocab_size": 23, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 4,
        "use_cache": False, "pad_token_id": 0, "eos_token_id": 1,
    },
    channels=(20, 20, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, *(1,) * 4),
)  # fmt: skip
transformers_architecture(
    "transformers DistilBERT",
    "DistilBertForSequenceClassification",
    "DistilBertConfig",
    MASKED_TEXT,
    {
        "vocab_size": 23, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 20,
        "max_position_embeddings": 12, "num_labels": CLASSES, "pad_token_id": 0,
    }, channels=(16, 16, 20, 20, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4)
)  # fmt: skip

transformers_architecture(
    "transformers RoBERTa",
    "RobertaForSequenceClassification",
    "RobertaConfig",
    MASKED_TEXT,
    LANGUAGE | {"num_labels": CLASSES},
    channels=(16, 16, 20, 20, *(4,) * 16),
)
transformers_architecture(
    "transformers CLIP text",
    "CLIPTextModelWithProjection",
    "CLIPTextConfig",
    {"input_ids": TEXT},
    LANGUAGE | {"projection_dim": 8},
)
transformers_architecture(
    "transformers FNet",
    "FNetForSequenceClassification",
    "FNetConfig",
    {"input_ids": TEXT},
    LANGUAGE | {"num_labels": CLASSES},
)
transformers_architecture(
    "transformers XLNet",
    "XLNetForSequenceClassification",
    "XLNetConfig",
    {"input_ids": TEXT},
    {
        "vocab_size": 23, "d_model": 16, "n_layer": 1, "n_head": 4, "d_inner": 20,
        "use_mems_eval": False, "num_labels": CLASSES,
    },
)  # fmt: skip
transformers_architecture(
    "transformers Mixtral, mixture of experts",
    "MixtralForCausalLM",
    "MixtralConfig",
    {"input_ids": tokens(12, 23)},
    LANGUAGE
    | {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 3}
    | {"num_experts_per_tok": 2},
    tolerance=1e-5,
    is_single=True,
)
transformers_architecture(
    "transformers wav2vec2",
    "Wav2Vec2ForSequenceClassification",
    "Wav2Vec2Config",
    {"input_values": torch.randn(BATCH, 400, generator=torch.Generator().manual_seed(3))},
    {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 20, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8, "vocab_size": 23,
    },
)  # fmt: skip
transformers_architecture(
    "transformers Swin-V2",
    "Swinv2ForImageClassification",
    "Swinv2Config",
    PIXELS,
    {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2], "num_heads": [2],
        "window_size": 4, "num_labels": CLASSES,
    },
)  # fmt: skip
transformers_architecture(
    "transformers BiT, standardised weights",
    "BitForImageClassification",
    "BitConfig",
    PIXELS,
    {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1],
        "layer_type": "preactivation", "num_labels": CLASSES, "num_groups": 4,
    },
)  # fmt: skip


def zero_gate() -> tuple[nn.Module, Inputs]:
    """A fresh ReZero block: its gate is zero, so that nothing inside it reaches the output."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        y = torch.cat([y[:, :3].sigmoid(), y[:, 3:].tanh()], 1)
        return m.head(x + m.gate * m.second(y))

    torch.manual_seed(0)
    model = Forward(
        forward,
        first=nn.Linear(12, 16),
        second=nn.Linear(16, 12),
        gate=nn.Parameter(torch.ones(())),
        head=nn.Linear(12, CLASSES),
    )
    randomise(model)
    model.gate.data.zero_()
    return model, VECTOR


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in tensors(value)]
    if dataclasses.is_dataclass(output):
        fields = dataclasses.fields(output)
        return [tensor for field in fields for tensor in tensors(getattr(output, field.name))]
    return []


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Outputs of a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    with torch.no_grad():
        if isinstance(inputs, Tensor):
            return tensors(model(inputs))
        if isinstance(inputs, tuple):
            return tensors(model(*inputs))
        return tensors(model(**inputs))


def row(name: str, groups: Sequence[Any]) -> str:
    """Return an architecture's row of the table on the page docs/architectures.md.

    ``groups`` are its channel groups.
    """
    outcome = "verified" if groups else "verified, no channel may move"
    return f"| {name} | {outcome} | {len(groups)} | {sum(one.size for one in groups)} |"


def table() -> str:
    """Return the suite as a Markdown table, with what the analysis really does."""
    from clafusion.errors import ClafusionError
    from clafusion.tracing.trace import trace

    lines = [
        "| Architecture | Outcome | Groups | Free channels |",
        "|---|---|---|---|",
    ]
    for entry in ARCHITECTURES.values():
        model, inputs = entry.build()
        try:
            lines.append(row(entry.name, trace(model, inputs).groups))
        except ClafusionError as error:
            lines.append(f"| {entry.name} | refused ({type(error).__name__}) | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    from tests.support import architectures, graph_architectures

    assert graph_architectures.SOURCE  # whose import enters its networks
    logging.getLogger("torch").setLevel(logging.ERROR)
    print(architectures.table())
