"""Fuse trained networks of several streams, or of post-norm blocks, of different depth.

    CLAFUSION_DATA=... python -m benchmarks.streams [--seeds 3] [--kinds BERT T5 U-Net]

Three kinds of pairs, each trained briefly on real data and fused with equal weights:

- BERT of four and of two layers: sentiment of SST-2's sentences, over the most frequent words.
- T5 of three and two layers (encoder, decoder) and of two and three: write out tinyshakespeare's
  characters of which some are hidden.
- U-Nets of four and of three residual blocks on every level: take the noise from CIFAR-10's images.

The fused networks see inputs without labels. Weights 1 and 0 must give the parents back.
"""

import argparse
import lzma
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.datasets import cifar10, folder
from benchmarks.orthogonal import text
from benchmarks.results import write_results
from clafusion import LeastSquares, fuse, naive_average

WORDS, SENTENCE = 3000, 32  # BERT: words that have a vector, length of a sentence
LENGTH, HIDDEN = 24, 0.2  # T5: characters of a line, the share that is hidden
PIXELS, NOISE = 16, 0.5  # U-Net: size of a crop, standard deviation of the noise
BATCH = 32  # examples of a training step

Batch = dict[str, Tensor]
Outputs = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Task:
    """What a kind of pair is trained and tested on.

    ``draw(count, generator)`` returns a training batch with its ``"labels"``; ``test`` are batches;
    ``loss`` and ``score`` take outputs and labels. ``build`` are the two networks' makers.
    """

    build: Sequence[Callable[[], nn.Module]]
    names: Sequence[str]
    outputs: Outputs
    draw: Callable[[int, torch.Generator], Batch]
    test: Sequence[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    steps: int
    rate: float


# --- BERT on SST-2 -------------------------------------------------------------------------------


def sentences(split: str) -> list[tuple[list[str], int]]:
    """Return the words and the label of every sentence."""
    path = folder() / f"sst2_{split}.tsv.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    return [(words.split(), int(label)) for words, label in rows]


def numbered(rows: Sequence[tuple[list[str], int]], numbers: dict[str, int]) -> Batch:
    """Return sentences as numbers: 0 where there is no word, 1 for a rare one, 2 at the start."""
    ids = torch.zeros(len(rows), SENTENCE, dtype=torch.long)
    for row, (words, _) in zip(ids, rows, strict=True):
        found = [2, *(numbers.get(word, 1) for word in words)][:SENTENCE]
        row[: len(found)] = torch.tensor(found)
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def bert(layers: int, words: int = WORDS, width: int = 64) -> nn.Module:
    import transformers

    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=words + 3,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=SENTENCE,
            type_vocab_size=1,
            hidden_dropout_prob=0.2,
            num_labels=2,
        )
    )


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return what a network of transformers puts out for a batch."""
    return model(**{name: one for name, one in batch.items() if name != "labels"}).logits


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(-1) == labels).double().mean())


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def sst2() -> Task:
    train = sentences("train")
    frequent = Counter(word for words, _ in train for word in words).most_common(WORDS)
    numbers = {word: i + 3 for i, (word, _) in enumerate(frequent)}
    rows, test = numbered(train, numbers), numbered(sentences("test"), numbers)

    def draw(count: int, generator: torch.Generator) -> Batch:
        chosen = torch.randint(0, len(train), (count,), generator=generator)
        return {name: one[chosen] for name, one in rows.items()}

    return Task(
        [lambda: bert(4), lambda: bert(2)],
        ["four layers", "two layers"],
        logits,
        draw,
        in_batches(test),
        cross_entropy,
        accuracy,
        steps=1000,
        rate=1e-3,
    )


# --- T5 on characters ----------------------------------------------------------------------------


def t5(encoder: int, decoder: int, characters: int, width: int = 64) -> nn.Module:
    import transformers

    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=characters,
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_heads=4,
            num_layers=encoder,
            num_decoder_layers=decoder,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def hidden(read: Tensor, count: int, generator: torch.Generator) -> Batch:
    """Return lines with characters hidden (1), and what a decoder reads and must write."""
    starts = torch.randint(0, len(read) - LENGTH, (count, 1), generator=generator)
    lines = read[starts + torch.arange(LENGTH)] + 2
    is_hidden = torch.rand(lines.shape, generator=generator) < HIDDEN
    return {
        "input_ids": lines.masked_fill(is_hidden, 1),
        "decoder_input_ids": F.pad(lines[:, :-1], (1, 0)),
        "labels": lines,
    }


def characters() -> Task:
    read, held_out, kinds = text()
    test = hidden(held_out, 1000, torch.Generator().manual_seed(7))
    return Task(
        [lambda: t5(3, 2, kinds + 2), lambda: t5(2, 3, kinds + 2)],
        ["three and two layers", "two and three layers"],
        logits,
        lambda count, generator: hidden(read, count, generator),
        in_batches(test),
        cross_entropy,
        accuracy,
        steps=2000,
        rate=2e-3,
    )


# --- U-Nets on noise -----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.norm2(self.first(F.relu(self.norm1(x))))))


class UNet(nn.Module):
    """Take images ``(batch, 3, size, size)``; three levels of ``blocks`` on the way down and up."""

    def __init__(self, blocks: int, widths: Sequence[int] = (8, 12, 16)) -> None:
        super().__init__()

        def level(width: int) -> nn.Sequential:
            return nn.Sequential(*(Block(width) for _ in range(blocks)))

        pairs = list(pairwise(widths))
        self.first, self.last = nn.Conv2d(3, widths[0], 3, padding=1), nn.Conv2d(widths[0], 3, 1)
        self.down = nn.ModuleList(level(width) for width in widths)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairs)
        self.widen = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs)
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 1) for a, _ in pairs)
        self.up = nn.ModuleList(level(a) for a, _ in pairs)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = self.first(images), []
        for level, narrow in zip(self.down, self.narrow, strict=False):
            skips.append(level(x))
            x = narrow(skips[-1])
        x = self.down[-1](x)
        for widen, join, level in zip(
            self.widen[::-1], self.join[::-1], self.up[::-1], strict=True
        ):
            x = level(join(torch.cat([widen(x), skips.pop()], 1)))
        return images + self.last(x)


def noisy(images: Tensor, count: int, generator: torch.Generator) -> Batch:
    """Return crops with noise, and what they are without."""
    chosen = torch.randint(0, len(images), (count,), generator=generator)
    y, x = torch.randint(0, 32 - PIXELS, (2,), generator=generator).tolist()
    crops = images[chosen, :, y : y + PIXELS, x : x + PIXELS]
    noise = NOISE * torch.randn(crops.shape, generator=generator)
    return {"images": crops + noise, "labels": crops}


def restored(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["images"])


def denoising() -> Task:
    train, test = cifar10("train", 10_000)[0], cifar10("test", 2000)[0]
    generator = torch.Generator().manual_seed(7)
    return Task(
        [lambda: UNet(4), lambda: UNet(3)],
        ["four blocks", "three blocks"],
        restored,
        lambda count, generator: noisy(train, count, generator),
        [noisy(part, len(part), generator) for part in test.split(100)],
        F.mse_loss,
        lambda outputs, labels: float(F.mse_loss(outputs, labels)),
        steps=800,
        rate=3e-3,
    )


# --- training, fusing, measuring -----------------------------------------------------------------

KINDS = {"BERT": sst2, "T5": characters, "U-Net": denoising}


def in_batches(rows: Batch, size: int = 250) -> list[Batch]:
    parts = zip(*(one.split(size) for one in rows.values()), strict=True)
    return [dict(zip(rows, part, strict=True)) for part in parts]


def trained(task: Task, build: Callable[[], nn.Module], steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, generator = build().train(), torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), task.rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, steps)
    for _ in range(steps):
        batch = task.draw(BATCH, generator)
        loss = task.loss(task.outputs(model, batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def unlabelled(batches: Sequence[Batch]) -> list[Any]:
    """Return batches as a fusion reads them: mappings for transformers, else a model's input."""
    found = [{name: one for name, one in batch.items() if name != "labels"} for batch in batches]
    return [(one["images"],) if "images" in one else one for one in found]


@torch.no_grad()
def outputs_of(task: Task, model: nn.Module) -> Tensor:
    return torch.cat([task.outputs(model.eval(), batch) for batch in task.test])


def measured(task: Task, pair: list[nn.Module], inputs: list[Batch]) -> dict[str, float]:
    """Return the scores of both parents and of everything that is made of them."""
    labels = torch.cat([batch["labels"] for batch in task.test])
    of_parents = [outputs_of(task, one) for one in pair]
    found = dict(zip(task.names, (task.score(one, labels) for one in of_parents), strict=True))
    found["both side by side"] = task.score(sum(of_parents) / 2, labels)

    fused = partial(fuse, pair, unlabelled(inputs), assessment="none")
    averaged = fused(calibration="none")
    made = {
        "naive average": naive_average(averaged.problem),
        "matched": averaged.model,
        "matched, REPAIR": fused(calibration="repair").model,
        "matched, least squares": fused(calibration="least_squares").model,
        "matched, least squares, towards any": fused(calibration=LeastSquares(toward="any")).model,
    }
    found |= {name: task.score(outputs_of(task, one), labels) for name, one in made.items()}
    for i, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        gap = outputs_of(task, fused(weights=weights, calibration="none").model) - of_parents[i]
        largest = of_parents[i].abs().max()
        found[f"weight 1: {task.names[i]}"] = float(gap.abs().max() / largest)
    return found


def name_of(kinds: Iterable[str]) -> str:
    """Return the name of the results: those of some kinds do not take the place of all."""
    return "streams" if set(kinds) == set(KINDS) else "_".join(["streams", *kinds]).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=float, default=1.0, help="times the usual training")
    parser.add_argument("--inputs", type=int, default=1000, help="inputs of a fusion")
    arguments = parser.parse_args()
    tasks = {kind: KINDS[kind]() for kind in arguments.kinds}
    figures: dict[str, dict[str, list[float]]] = {kind: {} for kind in tasks}
    for seed, (kind, task) in product(range(arguments.seeds), tasks.items()):
        steps = max(1, round(arguments.steps * task.steps))
        pair = [trained(task, one, steps, 2 * seed + i) for i, one in enumerate(task.build)]
        inputs = in_batches(task.draw(arguments.inputs, torch.Generator().manual_seed(50)))
        found = measured(task, pair, inputs)
        for name, value in found.items():
            figures[kind].setdefault(name, []).append(value)
        print(kind, seed, {name: round(one, 6) for name, one in found.items()}, flush=True)
        # What is done is kept.
        write_results(name_of(tasks), {**vars(arguments), "scores": figures})
    for kind, scores in figures.items():
        for name, values in scores.items():
            print(f"{kind:6s} {name:32s} {statistics.mean(values):.6f}")


if __name__ == "__main__":
    main()
