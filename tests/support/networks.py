"""Families of networks of any depth and width, for the tests of fusion."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion import TracedModel, permute_channels, trace
from clafusion.weights.build import with_state


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms non-trivial statistics, so that a mistake in moving them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1:
                bound = math.sqrt(6 / weight[0].numel())
                weight.uniform_(-bound, bound, generator=generator)
            elif isinstance(weight, Tensor):
                weight.uniform_(0.5, 1.5, generator=generator)
            if isinstance(getattr(module, "bias", None), Tensor):
                module.bias.uniform_(-0.3, 0.3, generator=generator)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.3, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def mlp(*widths: int, seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (into, out) in enumerate(pairwise(widths)):
        layers += [nn.Linear(into, out)] + ([activation()] if i < len(widths) - 2 else [])
    return randomise(nn.Sequential(*layers), seed)


@torch.no_grad()
def confident(model: nn.Sequential, inputs: Tensor, scale: float = 4.0) -> nn.Sequential:
    """Return a classifier with its last layer scaled: surer of its answers, which stay."""
    found = copy.deepcopy(model)
    found[-1].load_state_dict(
        {k: v * scale / found(inputs).std() for k, v in found[-1].state_dict().items()}
    )
    return found


def vgg(*stages: int, widths=(8, 12), norm: bool = True, seed: int = 0) -> nn.Sequential:
    """``stages``: how many convolutions before each pooling."""
    layers: list[nn.Module] = []
    into = 3
    for count, width in zip(stages, widths, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(into, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers.append(nn.ReLU())
            into = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * into, 5)]
    return randomise(nn.Sequential(*layers, *head), seed)


class Matrices(nn.Module):
    """Residual blocks of products with ``(inputs, outputs)`` matrices, as in Hugging Face's GPT-2.

    The first product of a block folds its rows and adds a bias (``addmm``); the others do if they
    are to be ``biased``.
    """

    def __init__(
        self, blocks: int, hidden: int, width: int = 8, seed: int = 0, biased: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(size, generator=generator) / size[0] ** 0.5)

        self.stem = drawn(12, width)
        self.stem_bias = drawn(width) if biased else None
        self.up = nn.ParameterList(drawn(width, hidden) for _ in range(blocks))
        self.up_bias = nn.ParameterList(drawn(hidden) for _ in range(blocks))
        self.down = nn.ParameterList(drawn(hidden, width) for _ in range(blocks))
        self.down_bias = nn.ParameterList(drawn(width) for _ in range(blocks if biased else 0))
        self.head = nn.Linear(width, 5)
        self.head.weight, self.head.bias = nn.Parameter(drawn(width, 5).detach().T), drawn(5)
        self.eval()

    @staticmethod
    def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return x @ weight
        folded = torch.addmm(bias, x.reshape(-1, x.size(-1)), weight)
        return folded.view(*x.shape[:-1], weight.size(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self._product(x, self.stem, self.stem_bias))
        for i, (up, bias) in enumerate(zip(self.up, self.up_bias, strict=True)):
            inner = torch.relu(self._product(x, up, bias))
            down_bias = self.down_bias[i] if len(self.down_bias) else None
            x = x + self._product(inner, self.down[i], down_bias)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.pad = (out - into) // 2 if stride > 1 and shortcut == "pad" else None
        if stride > 1 and shortcut == "conv":
            self.shortcut = nn.Sequential(
                nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad is not None:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, stages, widths, shortcut: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks = []
        into = widths[0]
        for stage, (count, width) in enumerate(zip(stages, widths, strict=True)):
            for i in range(count):
                blocks.append(Block(into, width, 2 if stage and not i else 1, shortcut))
                into = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(into, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet(*stages: int, widths=(8, 16), shortcut: str = "pad", seed: int = 0) -> nn.Module:
    return randomise(ResNet(stages, widths, shortcut), seed)


class Labels(nn.Module):
    """Its only output has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(12, 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).argmax(1)


def with_identity_layers(model: nn.Sequential, position: int, count: int = 1) -> nn.Sequential:
    """Insert ``count`` linear layers with identity weights, each with a ReLU, after a ReLU."""
    layers = list(copy.deepcopy(model))
    width = next(m for m in reversed(layers[:position]) if isinstance(m, nn.Linear)).out_features
    for _ in range(count):
        linear = nn.Linear(width, width)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers[position:position] = [linear, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def widened(model: nn.Sequential, factor: int) -> nn.Sequential:
    """Copy every hidden channel of a chain ``factor`` times and divide what leaves it."""
    wide = copy.deepcopy(model)
    layers = [m for m in wide if isinstance(m, (nn.Linear, nn.Conv2d, nn.BatchNorm2d))]
    weighted = [m for m in layers if not isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for layer in layers:
            last = layer is weighted[-1]
            if layer is not weighted[0] and layer in weighted:
                weight = layer.weight
                positions = 1
                if isinstance(layer, nn.Linear) and isinstance(weighted[-2], nn.Conv2d):
                    positions = layer.in_features // (weighted[-2].out_channels // factor)
                blocks = weight.unflatten(1, (-1, positions))
                weight = blocks.repeat_interleave(factor, 1).flatten(1, 2) / factor
                layer.weight = nn.Parameter(weight.clone())
            if not last:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    if not hasattr(layer, name):
                        continue
                    tensor = getattr(layer, name).data.repeat_interleave(factor, 0)
                    if name.startswith("running"):
                        setattr(layer, name, tensor)
                    else:
                        setattr(layer, name, nn.Parameter(tensor))
            if isinstance(layer, nn.Conv2d):
                layer.out_channels, layer.in_channels = layer.weight.shape[:2]
            elif isinstance(layer, nn.Linear):
                layer.out_features, layer.in_features = layer.weight.shape
            else:
                layer.num_features = layer.weight.size(0)
    return wide.eval()


def orders_of(graph: TracedModel, seed: int = 3) -> list[Tensor]:
    """Return a random order of the channels of each group."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randperm(one.size, generator=draw) for one in graph.groups]


def permuted(model: nn.Module, graph: TracedModel, orders: Sequence[Tensor]) -> nn.Module:
    """Return a copy of a traced model with the channels of each group in another order."""
    copied = copy.deepcopy(model)
    state = permute_channels(model.state_dict(), graph.groups, orders)
    copied.load_state_dict(state | {name: state[one] for name, one in graph.aliases.items()})
    return copied


def permuted_copy(model: nn.Module, inputs: Tensor, seed: int = 3) -> nn.Module:
    """Trace a model and return a copy with the channels of each group in a random order."""
    graph = trace(model, inputs)
    return permuted(model, graph, orders_of(graph, seed))


def module_of(traced: TracedModel) -> nn.Module:
    """Return a module with a traced model's weights, which may not be its own module's."""
    return with_state(traced.model, traced.state(), traced.aliases)


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in model.parameters()]
