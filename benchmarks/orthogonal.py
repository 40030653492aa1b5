"""Permute or rotate: barriers between independently trained transformers.

    CLAFUSION_DATA=... python -m benchmarks.orthogonal [--pairs 2] [--steps 1500] [--layers 2]

Vision transformers on MNIST and character models on tinyshakespeare, pre-norm with LayerNorm or
RMSNorm, of one shape and from other starts. Two of them are fused with equal weights, once with
every channel matched by a permutation and once with the residual stream rotated. The barrier is the
fused network's loss on held out data minus the mean of its parents' losses, before and after least
squares.
"""

import argparse
import lzma
import math
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.datasets import folder, mnist
from benchmarks.results import write_results
from clafusion import fuse

WIDTH, HEADS, PATCH, LENGTH = 32, 4, 7, 32


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module], *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (HEADS, -1)).transpose(1, 2) for one in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Take flattened images ``(batch, 784)``."""

    def __init__(self, layers: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // PATCH) ** 2, WIDTH))
        self.layers = nn.Sequential(*(Block(norm, is_causal=False) for _ in range(layers)))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.unflatten(1, (1, 28, 28))).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(tokens + self.positions)).mean(1))


class CharacterModel(nn.Module):
    """Take characters ``(batch, LENGTH)``; predict each one's successor."""

    def __init__(self, layers: int, norm: type[nn.Module], characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Block(norm, is_causal=True) for _ in range(layers)))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.characters(x) + self.positions(torch.arange(x.size(1), device=x.device))
        return self.head(self.norm(self.layers(x)))


Batch = tuple[Tensor, Tensor]


def text() -> tuple[Tensor, Tensor, int]:
    """Return tinyshakespeare's characters as numbers, the last tenth apart, and how many kinds."""
    with lzma.open(folder() / "tinyshakespeare.txt.xz", "rt", encoding="utf-8") as packed:
        written = packed.read()
    kinds = {one: i for i, one in enumerate(sorted(set(written)))}
    numbers = torch.tensor([kinds[one] for one in written])
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(kinds)


def windows(numbers: Tensor, count: int, generator: torch.Generator) -> Batch:
    starts = torch.randint(0, len(numbers) - LENGTH - 1, (count, 1), generator=generator)
    found = numbers[starts + torch.arange(LENGTH + 1)]
    return found[:, :-1], found[:, 1:]


def examples(data: Batch, count: int, generator: torch.Generator) -> Batch:
    chosen = torch.randint(0, len(data[0]), (count,), generator=generator)
    return data[0][chosen], data[1][chosen]


def trained(model: nn.Module, batches: Iterator[Batch], steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _, (inputs, labels) in zip(range(steps), batches, strict=False):
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def scores(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    logits = torch.cat([model(one) for one in data[0].split(500)]).flatten(0, -2)
    labels = data[1].flatten()
    return (
        float(F.cross_entropy(logits, labels)),
        float((logits.argmax(1) == labels).double().mean()),
    )


def measured(pair: list[nn.Module], inputs: Tensor, test: Batch) -> dict[str, dict[str, float]]:
    """Return the losses and barriers of a pair's fusions."""
    of_parents = [scores(one, test) for one in pair]
    loss, accuracy = (sum(values) / 2 for values in zip(*of_parents, strict=True))
    found = {"parents": {"loss": loss, "accuracy": accuracy, "barrier": 0.0}}
    for calibration in ("none", "least_squares"):
        for solver in ("auto", "orthogonal"):
            start = time.perf_counter()
            result = fuse(pair, inputs, matching={"solver": solver}, calibration=calibration)
            seconds = time.perf_counter() - start
            assert bool(result.parents[1].rotations) == (solver == "orthogonal")
            of_fused = scores(result.model, test)
            found[f"{solver}, {calibration}"] = {
                "loss": of_fused[0],
                "accuracy": of_fused[1],
                "barrier": of_fused[0] - loss,
                "seconds": seconds,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2, help="of each kind")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--calibration", type=int, default=1000, help="inputs of a fusion")
    arguments = parser.parse_args()
    train, test = mnist("train", 20_000), mnist("test", 4000)
    read, held_out, characters = text()
    kinds = {
        "ViT": (VisionTransformer, partial(examples, train), test),
        "characters": (
            partial(CharacterModel, characters=characters),
            partial(windows, read),
            windows(held_out, 1000, torch.Generator().manual_seed(7)),
        ),
    }
    figures: dict[str, list[dict[str, dict[str, float]]]] = {}
    for norm in (nn.LayerNorm, nn.RMSNorm):
        for kind, (build, draw, unseen) in kinds.items():
            name = f"{kind}, {norm.__name__}"
            for number in range(arguments.pairs):
                pair = []
                for seed in (2 * number, 2 * number + 1):
                    torch.manual_seed(seed)
                    generator = torch.Generator().manual_seed(100 + seed)
                    batches = iter(partial(draw, 64, generator), None)
                    model = build(arguments.layers, norm)
                    pair.append(trained(model, batches, arguments.steps))
                inputs, _ = draw(arguments.calibration, torch.Generator().manual_seed(50))
                figures.setdefault(name, []).append(measured(pair, inputs, unseen))
                for how, values in figures[name][-1].items():
                    shown = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
                    print(f"{name} {number}: {how:26s} {shown}", flush=True)
    chance = {"ViT": math.log(10), "characters": math.log(characters)}
    write_results("orthogonal", {**vars(arguments), "loss of chance": chance, "figures": figures})


if __name__ == "__main__":
    main()
