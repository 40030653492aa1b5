"""Fuse two vision transformers of different depth, with heads in whatever order.

    CLAFUSION_DATA=... python -m benchmarks.vits [--seeds 3] [--images 20000] [--epochs 3]

Pre-norm encoders of three and two layers, trained briefly on MNIST images cut into sixteen patches;
the first with four heads, the second with four or with two of the same size. Zero-shot test
accuracy of the fused networks.
"""

import argparse
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.datasets import accuracy, logits, mnist
from benchmarks.results import write_results
from clafusion import LeastSquares, fuse, naive_average
from clafusion.training import finetune

WIDTH, HEAD, PATCH = 32, 8, 7  # channels of the stream and of a head, pixels


class Layer(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * heads * HEAD), nn.Linear(heads * HEAD, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (self.heads, HEAD)).transpose(1, 2) for one in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Take flattened images ``(batch, 784)``."""

    def __init__(self, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // PATCH) ** 2, WIDTH))
        self.layers = nn.Sequential(*(Layer(heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.unflatten(1, (1, 28, 28))).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(tokens + self.positions)).mean(1))


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 2e-3)


def trained(
    depth: int,
    heads: int,
    train: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
) -> nn.Module:
    torch.manual_seed(seed)
    result = finetune(
        VisionTransformer(depth, heads),
        train,
        epochs=epochs,
        optimizer=adamw,
        batch_size=100,
        held_out=0,
        seed=seed // 10,
    )
    return result.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    train, test = mnist("train", arguments.images), mnist("test", 4000)
    calibration = train[0][:2000]
    scores: dict[str, dict[str, list[float]]] = {"four and four": {}, "four and two": {}}
    for seed in range(arguments.seeds):
        deep, *shallows = (
            trained(depth, heads, train, arguments.epochs, 10 * seed + depth)
            for depth, heads in ((3, 4), (2, 4), (2, 2))
        )
        for (heads, found), shallow in zip(scores.items(), shallows, strict=True):
            pair = [deep, shallow]
            averaged = fuse(pair, calibration, calibration="none")
            measured = {
                "three layers": deep,
                "two layers": shallow,
                "naive average": naive_average(averaged.problem),
                "averaged": averaged.model,
                "REPAIR": fuse(pair, calibration, calibration="repair").model,
                "least squares": fuse(pair, calibration, calibration="least_squares").model,
                "least squares, towards any": fuse(
                    pair, calibration, calibration=LeastSquares(toward="any")
                ).model,
            }
            both = sum(logits(one, test[0]) for one in pair)
            found.setdefault("side by side", []).append(
                float((both.argmax(1) == test[1]).double().mean())
            )
            for name, model in measured.items():
                found.setdefault(name, []).append(accuracy(model, *test))
            print(seed, heads, {name: round(values[-1], 4) for name, values in found.items()})
    for heads, found in scores.items():
        for name, values in found.items():
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            print(f"{heads:14s} {name:20s} {100 * mean:6.2f} % +- {100 * deviation:.2f}")
    write_results("vits", {**vars(arguments), "accuracies": scores})


if __name__ == "__main__":
    main()
