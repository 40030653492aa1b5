"""All 990 pairs of 45 models of mixed kinds: memory, rate, and a run that is killed and resumed.

    python -m benchmarks.zoo           # about twenty minutes on two quiet cores
    python -m benchmarks.zoo --quick   # the same code on nine models; writes nothing

A third of the models are residual networks, a third plain convolutional ones, a third multilayer
perceptrons, of other depths and widths and with random weights, each in a file. Pairs of one kind
are fused by REPAIR, pairs of two kinds are refused. The run goes on in a process of its own, which
tells after every result how much memory it holds. Another one is killed half-way and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clafusion
from benchmarks.cifar_resnet import CifarResNet
from benchmarks.many import images
from benchmarks.results import write_results
from clafusion.batch.run import fuse_pairs
from clafusion.weights.state_files import save_model

INPUTS = 128
PARTS = 5  # of a run, whose rates are compared


def convolutional(depth: int, width: int) -> nn.Module:
    """Return ``depth`` convolutions, of which every second one is pooled, and a linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for i in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        if i % 2 == 1 and i < 6:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def perceptron(depth: int, width: int) -> nn.Module:
    """Return ``depth`` linear layers on the pixels."""
    widths = [3 * 32 * 32, *[width] * (depth - 1)]
    hidden = [
        layer for one, other in pairwise(widths) for layer in (nn.Linear(one, other), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], 10))


KINDS = {
    "resnet": lambda i: (CifarResNet, (1 + i % 5, (16, 32, 64) if i % 2 else (12, 24, 48))),
    "convolutional": lambda i: (convolutional, (6 + i % 3, 32 + 8 * (i % 4))),
    "perceptron": lambda i: (perceptron, (3 + i % 4, 128 + 32 * (i % 5))),
}


def save_models(folder: Path, count: int) -> None:
    """Write ``count`` models of each kind, and what makes them."""
    factories = {}
    for i in range(count):  # kinds take turns, so that no part of a run is of one kind only
        for kind, choose in KINDS.items():
            make, arguments = choose(i)
            torch.manual_seed(i)
            name = f"{kind}-{i}"
            save_model(make(*arguments), folder / f"{name}.safetensors")
            factories[name] = f"{make.__module__}:{make.__name__}{arguments}"
    (folder / "factories.json").write_text(json.dumps(factories))


def run_here(folder: Path) -> None:
    """Fuse all pairs; after each print the memory held in MB, the time, and whether it is fused."""
    torch.set_num_threads(1)
    clafusion.set_num_threads(1)
    factories = json.loads((folder / "factories.json").read_text())
    files = {
        name: clafusion.ModelFile(factory.replace("__main__", "benchmarks.zoo"), path)
        for name, factory in factories.items()
        if (path := folder / f"{name}.safetensors").exists()
    }
    started = time.perf_counter()
    for one in fuse_pairs(files, images(INPUTS), calibration="repair", out_dir=folder / "out"):
        status = Path("/proc/self/status").read_text()
        held = int(status.partition("VmRSS:")[2].split()[0]) / 1024
        print(json.dumps([held, time.perf_counter() - started, one.error is None]), flush=True)


def child(folder: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo", "--child", str(folder)]


def whole_run(folder: Path) -> dict[str, Any]:
    """Run all pairs, and say how memory and rate change."""
    command = child(folder)
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(one) for one in shown.splitlines()]
    held, times, fused = (list(one) for one in zip(*lines, strict=True))
    spent = [now - before for before, now in pairwise([0.0, *times])]
    part = max(len(lines) // PARTS, 1)
    return {
        "pairs": len(lines),
        "fused": sum(fused),
        "seconds": times[-1],
        "memory_mb": [round(max(held[i : i + part])) for i in range(0, len(lines), part)],
        "fused_a_second": _rates(spent, fused),
        "refused_seconds": statistics.median(
            [one for one, is_fused in zip(spent, fused, strict=True) if not is_fused]
        ),
    }


def _rates(spent: list[float], fused: list[bool]) -> list[float]:
    """Return how many pairs are fused in a second, over each part of them."""
    taken = [one for one, is_fused in zip(spent, fused, strict=True) if is_fused]
    part = max(len(taken) // PARTS, 1)
    return [len(taken[i : i + part]) / sum(taken[i : i + part]) for i in range(0, len(taken), part)]


def killed_run(folder: Path, seconds: float) -> dict[str, Any]:
    """Kill a run after so many seconds, start it again, and time what is left."""
    run = subprocess.Popen(child(folder), stdout=subprocess.DEVNULL)
    time.sleep(seconds)
    run.kill()
    run.wait()
    done = len(list((folder / "out").glob("*.safetensors")))
    started = time.perf_counter()
    subprocess.run(child(folder), check=True, stdout=subprocess.DEVNULL)
    return {"fused_before": done, "seconds_after": time.perf_counter() - started}


def measure(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        for folder in (whole, killed):
            folder.mkdir()
            save_models(folder, count)
        figures = whole_run(whole)
        print(json.dumps(figures, indent=2), flush=True)
        figures["killed"] = killed_run(killed, figures["seconds"] / 2)
        assert fused_bytes(killed) == fused_bytes(whole), "a resumed run gives other bytes"
    return figures


def fused_bytes(folder: Path) -> dict[str, bytes]:
    """Return each fused pair's file."""
    return {one.name: one.read_bytes() for one in (folder / "out").glob("*.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_here(given.child)
        return
    figures = measure(3 if given.quick else 15)
    print(json.dumps(figures["killed"], indent=2))
    if not given.quick:
        write_results("zoo", figures)


if __name__ == "__main__":
    main()
