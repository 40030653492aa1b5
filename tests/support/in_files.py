"""Networks whose weights lie in files."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clafusion import ModelFile
from tests.support.networks import mlp, randomise, resnet

TOKENS = torch.randint(0, 60, (40, 9), generator=torch.Generator().manual_seed(5))
VECTORS = torch.randn(80, 12, generator=torch.Generator().manual_seed(6))
IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(7))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Language(nn.Module):
    """Tied embeddings, residual blocks, and a table that is in no file."""

    def __init__(self, layers: int, hidden: int = 24, half: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.register_buffer("angles", torch.linspace(0, 1, 9)[:, None], persistent=False)
        self.blocks = nn.ModuleList([Block(16, hidden) for _ in range(layers)])
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 60, bias=False)
        self.head.weight = self.embed.weight
        if half:
            self.bfloat16()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.angles.to(self.embed.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ReadsItsWeights(nn.Sequential):
    """A network that cannot be built without memory for its parameters."""

    def __init__(self, hidden: int) -> None:
        super().__init__(nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        self.largest = float(self[0].weight.abs().max().item() * 0)


def perceptron(*hidden: int) -> nn.Module:
    return mlp(12, *hidden, 4)


def residual(*blocks: int) -> nn.Module:
    return resnet(*blocks, widths=(8, 12))


PAIRS = {
    "perceptrons": (("perceptron(20, 16)", "perceptron(16, 12, 10)"), VECTORS),
    "residual networks": (("residual(1, 1)", "residual(2, 1)"), IMAGES),
    "language models": (("Language(2)", "Language(3, 32)"), TOKENS),
}


def made(call: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(eval(call).eval(), seed)


def in_file(call: str, path: Path, seed: int = 0) -> ModelFile:
    """Write a network's weights; return the file."""
    state = made(call, seed).state_dict()
    if path.name.endswith(".index.json"):
        names = list(state)
        halves = [names[::2], names[1::2]]
        places = {}
        for i, of_half in enumerate(halves):
            shard = path.with_name(f"{path.name.partition('.')[0]}-{i}.safetensors")
            save_file({name: state[name].clone().contiguous() for name in of_half}, shard)
            places |= dict.fromkeys(of_half, shard.name)
        path.write_text(json.dumps({"weight_map": places}))
    elif path.suffix == ".safetensors":
        save_file({name: one.clone().contiguous() for name, one in state.items()}, path)
    else:
        torch.save(state, path)
    return ModelFile(f"tests.support.in_files:{call}", path)
