"""What a fusion costs: time in forward passes, and memory beside the networks' weights.

    CLAFUSION_DATA=... python -m benchmarks.size [NAME ...] [--threads 1]

Each row runs in a process of its own, after a small fusion has loaded what every fusion needs.
**F** is one forward pass of each parent and one of the fused network over the same inputs, measured
in the same process; a row's time is divided by it. Of a row that traces, it is one forward pass.
With one thread both are seconds of the processor, which other work on the machine disturbs less.
Below each row stands what its stages take, in F: of a trace the export by PyTorch, the analysis on
labels, and the proof. Memory is the process's peak above what it held before the networks were
made. Arguments are parts of row names: only those rows run, and the others keep their figures. Rows
without a public checkpoint have random weights, which cost the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clafusion
from benchmarks import imagenet_networks
from benchmarks.datasets import checkpoint_pair, cifar10
from benchmarks.results import write_results
from clafusion.profiling.proofs import ProofsOnDisk

_CHUNK = 64  # inputs of one forward pass
_LONG = 10.0  # seconds of forward passes, which are run once then, not twice


@dataclass(frozen=True)
class Row:
    """Two networks, their inputs, and how they are fused; or one that is traced and proved."""

    name: str
    make: Callable[[], tuple[list[nn.Module], Tensor]]
    calibration: str | None
    threads: int | None = None  # None: as many as the command line says
    twice: bool = False  # whether another process has proved the graph before


def resnets(count: int) -> tuple[list[nn.Module], Tensor]:
    """The two CIFAR-10 checkpoints, with unlabelled images."""
    return list(checkpoint_pair()), cifar10("train", count)[0]


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(**{self.argument: x}).logits
        return logits


def gpt2s(depths: tuple[int, ...] = (12, 6), count: int = 64) -> tuple[list[nn.Module], Tensor]:
    """GPT-2 of 12 and 6 layers, with ``count`` times 64 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    models = []
    for layers in depths:
        torch.manual_seed(layers)
        config = GPT2Config(n_layer=layers, n_positions=128, use_cache=False)
        models.append(Logits(GPT2LMHeadModel(config), "input_ids").eval())
    return models, torch.randint(0, 50257, (count, 64), generator=torch.Generator().manual_seed(0))


def vits() -> tuple[list[nn.Module], Tensor]:
    """ViT-B/16 of 12 and 8 layers, with 64 images of 224."""
    from transformers import ViTConfig, ViTForImageClassification

    models = []
    for layers in (12, 8):
        torch.manual_seed(layers)
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=1000))
        models.append(Logits(model, "pixel_values").eval())
    return models, torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def imagenet(*names: str, count: int, size: int) -> tuple[list[nn.Module], Tensor]:
    """Networks with the layer shapes of ImageNet checkpoints, with images of ``size``."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    models = []
    for name in names:
        torch.manual_seed(len(models))
        model = getattr(imagenet_networks, name)()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model.train()(images[:16])  # without statistics a random network puts out a constant
        models.append(model.eval())
    return models, images


CALIBRATIONS = {"repair": "REPAIR", "least_squares": "least squares"}
ROWS = [
    Row("GPT-2 of 12 layers, 2 x 64 tokens, trace and proof", lambda: gpt2s((12,), 2), None),
    Row(
        "GPT-2 of 12 layers, 2 x 64 tokens, trace and proof of a known graph",
        lambda: gpt2s((12,), 2),
        None,
        twice=True,
    ),
    *(
        Row(f"ResNet-32 + ResNet-20, {count} images, {name}", lambda n=count: resnets(n), how)
        for count in (450, 2000)
        for how, name in CALIBRATIONS.items()
    ),
    *(
        Row(f"{networks}, {name}", make, how)
        for networks, make in (
            ("GPT-2 of 12 + 6 layers, 64 x 64 tokens", gpt2s),
            ("ViT-B of 12 + 8 layers, 64 images", vits),
        )
        for how, name in CALIBRATIONS.items()
    ),
    Row(
        "ResNet-101 + ResNet-50, 64 images of 224, REPAIR",
        lambda: imagenet("resnet101", "resnet50", count=64, size=224),
        "repair",
    ),
    *(
        Row(
            f"{networks}, 16 images of 64, least squares",
            lambda names=names: imagenet(*names, count=16, size=64),
            "least_squares",
            threads=1,
        )
        for networks, names in (
            ("EfficientNet-B1 + B0", ("efficientnet_b1", "efficientnet_b0")),
            ("ResNet-101 + ResNet-50", ("resnet101", "resnet50")),
        )
    ),
]


def run(row: Row, folder: Path | None) -> dict[str, Any]:
    """Measure one row in this process, with the proofs in a folder."""
    small = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    clafusion.fuse(small, torch.randn(60, 4))
    before = peak()
    models, inputs = row.make()
    weights = sum(one.numel() * one.element_size() for m in models for one in m.parameters())
    timings: dict[str, float]
    started, began = now(), time.perf_counter()
    if row.calibration is None:
        proofs = None if folder is None else ProofsOnDisk(folder)
        timings, networks = {}, models
        with timed_stages(timings):
            clafusion.trace(models[0], inputs, proofs=proofs)
    else:
        result = clafusion.fuse(models, inputs, calibration=row.calibration)
        timings, networks = dict(result.timings), [*models, result.model]
    seconds, on_the_clock = now() - started, time.perf_counter() - began
    memory = peak() - before
    passes = forward_passes(networks, inputs)
    if passes < _LONG:
        passes = min(passes, forward_passes(networks, inputs))
    return {
        "seconds": seconds,
        "forward_passes_seconds": passes,
        "in_forward_passes": seconds / passes,
        "stages": {
            name: value / on_the_clock * seconds / passes for name, value in timings.items()
        },
        "peak_bytes": memory,
        "weights_bytes": weights,
    }


@contextmanager
def timed_stages(timings: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that the stages of a trace take, within the context."""
    trace = importlib.import_module("clafusion.tracing.trace")
    stages = {
        "export_model": "export",
        "find_channels": "analysis",
        "find_layers": "analysis",
        "pinned_channels": "analysis",
        "with_proved_heads": "proof",
    }
    functions = {name: getattr(trace, name) for name in stages}

    def timed(name: str) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            try:
                return functions[name](*arguments, **keywords)
            finally:
                spent = time.perf_counter() - began
                timings[stages[name]] = timings.get(stages[name], 0.0) + spent

        return run

    began = time.perf_counter()
    try:
        for name in functions:
            setattr(trace, name, timed(name))
        yield
    finally:
        for name, function in functions.items():
            setattr(trace, name, function)
        timings["rest"] = time.perf_counter() - began - sum(timings.values())


def forward_passes(models: list[nn.Module], inputs: Tensor) -> float:
    """Return the seconds of one forward pass of each model over the inputs."""
    started = now()
    with torch.no_grad():
        for model in models:
            for part in inputs.split(_CHUNK):
                model(part)
    return now() - started


def now() -> float:
    """Return the time: with one thread that of the processor."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of row names (default: all)")
    parser.add_argument("--threads", type=int, default=None, help="threads (default: all)")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--proofs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        clafusion.set_num_threads(arguments.threads)
    if arguments.here is not None:
        print(json.dumps(run(ROWS[arguments.here], arguments.proofs)))
        return
    print(f"{'work':<68} {'seconds':>8} {'F':>6} {'peak GB':>8} {'weights GB':>11}")
    written = Path(__file__).parent / "results" / "size.json"
    rows = json.loads(written.read_text())["rows"] if written.exists() else {}
    for i, row in enumerate(ROWS):
        if arguments.names and not any(part in row.name for part in arguments.names):
            continue
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.size", "--here", str(i)]
        threads = arguments.threads or row.threads
        if threads is not None:
            command += ["--threads", str(threads)]
        with tempfile.TemporaryDirectory() as folder:
            if row.twice:
                command += ["--proofs", folder]
            for _ in range(1 + row.twice):
                ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        shown = ran.stdout
        found = rows[row.name] = json.loads(shown.splitlines()[-1])
        print(
            f"{row.name:<68} {found['seconds']:>8.1f} {found['in_forward_passes']:>6.1f} "
            f"{found['peak_bytes'] / 1e9:>8.2f} {found['weights_bytes'] / 1e9:>11.2f}",
            flush=True,
        )
        shown_stages = (f"{name} {value:.2f}" for name, value in found["stages"].items())
        print("  " + ", ".join(shown_stages), flush=True)
        found["threads"] = threads or clafusion.num_threads()
        write_results("size", {"rows": rows})


if __name__ == "__main__":
    main()
