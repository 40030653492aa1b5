"""Two Llama-shaped models in bfloat16 shards, fused within a limit of memory.

    python -m benchmarks.llamas [--layers 19 14] [--width 2048] [--limit 6GB] [--folder FOLDER]

The weights are random, which cost the same. They are written first, to shards of 1 GB; the fusion
then runs in a process of its own, whose peak of resident memory is measured from its start, and
writes the result in shards, which are loaded and compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import clafusion
from benchmarks.results import write_results
from benchmarks.size import Logits, forward_passes, peak
from clafusion.weights.mapped import parameters_on_meta

_VOCABULARY, _SHARD = 32_000, 1 << 30


def llama(layers: int, width: int) -> nn.Module:
    """A Llama with the proportions of one of a billion parameters, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        vocab_size=_VOCABULARY,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Logits(LlamaForCausalLM(config).bfloat16(), "input_ids").eval()


def write_random(folder: Path, layers: int, width: int) -> Path:
    """Write random weights of a Llama in shards; return their index."""
    with parameters_on_meta():
        shapes = {name: one.shape for name, one in llama(layers, width).named_parameters()}
    generator = torch.Generator().manual_seed(layers)
    shards: list[dict[str, Tensor]] = [{}]
    for name, shape in shapes.items():
        norm = len(shape) == 1
        value = torch.empty(shape).normal_(1.0 if norm else 0.0, 0.02, generator=generator)
        if sum(one.nbytes for one in shards[-1].values()) + 2 * value.numel() > _SHARD:
            save_file(shards[-1], folder / f"llama{layers}-{len(shards)}.safetensors")
            shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))
            shards.append({})
        shards[-1][name] = value.bfloat16()
    save_file(shards[-1], folder / f"llama{layers}-{len(shards)}.safetensors")
    places = {
        name: f"llama{layers}-{i}.safetensors" for i, of in enumerate(shards, 1) for name in of
    }
    index = folder / f"llama{layers}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def fuse(folder: Path, layers: list[int], width: int, limit: str, tokens: list[int]) -> None:
    """Fuse and write in this process; print what it cost."""
    factories = [f"benchmarks.llamas:llama({count}, {width})" for count in layers]
    files = [
        clafusion.ModelFile(factory, folder / f"llama{count}.safetensors.index.json")
        for factory, count in zip(factories, layers, strict=True)
    ]
    inputs = torch.randint(0, _VOCABULARY, tokens, generator=torch.Generator().manual_seed(0))
    small = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    clafusion.fuse(small, torch.randn(60, 4))
    before, started = peak(), time.perf_counter()

    def tell(stage: str, count: int) -> None:
        spent = time.perf_counter() - started
        print(f"{spent:7.0f} s {peak() / 1e9:5.2f} GB {stage} {count}", file=sys.stderr, flush=True)

    result = clafusion.fuse(files, inputs, calibration="repair", memory_limit=limit, progress=tell)
    seconds, memory = time.perf_counter() - started, peak()
    written = folder / "fused.safetensors.index.json"
    clafusion.save_model(result.model, written)
    after_writing = peak()
    passes = forward_passes([*(one.load() for one in files), result.model], inputs)
    deepest = factories[layers.index(max(layers))]
    again = clafusion.ModelFile(deepest, written).load()
    with torch.no_grad():
        is_same = torch.equal(again(inputs[:2]), result.model(inputs[:2]))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "forward_passes_seconds_bfloat16": passes,
                "stages": dict(result.timings),
                "before_bytes": before,
                "peak_bytes": memory,
                "peak_with_writing_bytes": after_writing,
                "weights_bytes": sum(file.stat().st_size for file in folder.glob("llama*-*")),
                "shards": len(list(folder.glob("fused-*"))),
                "loaded_again_it_computes_the_same": is_same,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=[19, 14])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs=2, default=[32, 64])
    parser.add_argument("--limit", default="6GB")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        fuse(arguments.folder, arguments.layers, arguments.width, arguments.limit, arguments.tokens)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for count in arguments.layers:
            write_random(folder, count, arguments.width)
        command = [sys.executable, "-m", "benchmarks.llamas", "--here", "--folder", name]
        command += ["--width", str(arguments.width), "--limit", arguments.limit]
        command += [
            "--layers",
            *map(str, arguments.layers),
            "--tokens",
            *map(str, arguments.tokens),
        ]
        shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(shown.splitlines()[-1])
    print(json.dumps(found, indent=2))
    if arguments.width == 2048:
        about = {"layers": arguments.layers, "tokens": arguments.tokens, "limit": arguments.limit}
        write_results("llamas", {**about, **found})


if __name__ == "__main__":
    main()
