"""Fuse two vision transformers of different depth, with heads in whatever order.

    CLAFUSION_DATA=... python -m benchmarks.vits [--seeds 3] [--images 20000] [--epochs 3]

Pre-norm encoders of three and two layers with four heads, trained briefly on MNIST images cut into
sixteen patches. Zero-shot test accuracy of the fused networks.
"""

import argparse
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.datasets import accuracy, mnist
from benchmarks.results import write_results
from clafusion import finetune, fuse
from clafusion.baselines import naive_average

WIDTH, HEADS, PATCH = 32, 4, 7


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (HEADS, -1)).transpose(1, 2) for one in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Take flattened images ``(batch, 784)``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // PATCH) ** 2, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.unflatten(1, (1, 28, 28))).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(tokens + self.positions)).mean(1))


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    train, test = mnist("train", arguments.images), mnist("test", 4000)
    calibration = train[0][:2000]
    scores: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        models = []
        for depth in (3, 2):
            torch.manual_seed(10 * seed + depth)
            trained = finetune(
                VisionTransformer(depth),
                train,
                epochs=arguments.epochs,
                optimizer=adamw,
                batch_size=100,
                seed=seed,
            )
            models.append(trained.model.eval())
        averaged = fuse(*models, calibration, calibration="none")
        found = {
            "three layers": accuracy(models[0], *test),
            "two layers": accuracy(models[1], *test),
            "naive average": accuracy(naive_average(averaged), *test),
            "averaged": accuracy(averaged.model, *test),
            "REPAIR": accuracy(fuse(*models, calibration).model, *test),
            "least squares": accuracy(
                fuse(*models, calibration, calibration="least_squares").model, *test
            ),
        }
        moved = sum(len(order) for order in averaged.block_orders.values())
        print(
            seed, {name: round(value, 4) for name, value in found.items()}, f"{moved} heads moved"
        )
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
    for name, values in scores.items():
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        print(f"{name:20s} {100 * mean:6.2f} % +- {100 * deviation:.2f}")
    write_results("vits", {**vars(arguments), "accuracies": scores})


if __name__ == "__main__":
    main()
