"""How time and memory grow with depth, width and samples.

    python -m benchmarks.growth [--threads 1]

Two residual networks with random weights, one half as deep as the other, are fused by REPAIR. One
of depth, width and number of samples grows, the others stay. Each point runs in a process of its
own, after a small fusion has loaded what every fusion needs. Seconds are those of the processor,
and memory is the process's peak above what it held before the networks were made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

import clafusion
from benchmarks.results import write_results
from benchmarks.size import peak

SWEEPS = {
    "depth": (4, 8, 16, 32, 48),
    "width": (256, 512, 1024, 2048, 4096),
    "samples": (100, 300, 1000, 3000, 10_000),
}
USUAL = {"depth": 8, "width": 256, "samples": 400}


class Block(nn.Module):
    """A residual block with a norm before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


def network(depth: int, width: int) -> nn.Module:
    torch.manual_seed(depth)
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.Linear(width, 10)).eval()


def run(depth: int, width: int, samples: int) -> dict[str, float]:
    """Measure one point in this process."""
    small = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    clafusion.fuse(small, torch.randn(60, 4), calibration="repair")
    before = peak()
    models = [network(depth, width), network(depth // 2, width)]
    inputs = torch.randn(samples, 64, generator=torch.Generator().manual_seed(0))
    weights = sum(one.nbytes for model in models for one in model.parameters())
    started = time.process_time()
    clafusion.fuse(models, inputs, calibration="repair")
    seconds = time.process_time() - started
    return {"seconds": seconds, "peak_bytes": peak() - before, "weights_bytes": weights}


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draw time and memory over what grows, with the slope of the last doubling."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(2, len(SWEEPS), figsize=(4 * len(SWEEPS), 6), layout="constrained")
    for column, name in enumerate(SWEEPS):
        sizes = np.array(list(found[name]))
        for row, (key, unit, scale) in enumerate(
            (("seconds", "processor time (s)", 1.0), ("peak_bytes", "peak memory (MB)", 1e-6))
        ):
            axes = rows[row, column]
            values = scale * np.array([one[key] for one in found[name].values()])
            axes.loglog(sizes, values, "o-", base=2)
            slope = np.log(values[-1] / values[-2]) / np.log(sizes[-1] / sizes[-2])
            axes.set_title(f"grows as {name}$^{{{slope:.1f}}}$ at the end", fontsize=10)
            axes.set_xlabel(name)
            axes.set_ylabel(unit)
            axes.set_xticks(sizes, [str(one) for one in sizes])
            axes.minorticks_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="threads (default: all)")
    parser.add_argument("--here", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        clafusion.set_num_threads(arguments.threads)
    if arguments.here is not None:
        print(json.dumps(run(*arguments.here)))
        return
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, sizes in SWEEPS.items():
        for size in sizes:
            point = {**USUAL, name: size}
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--here"]
            command += [str(point[one]) for one in ("depth", "width", "samples")]
            if arguments.threads is not None:
                command += ["--threads", str(arguments.threads)]
            shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(shown.splitlines()[-1])
            found.setdefault(name, {})[size] = measured
            print(
                f"{name:<8} {size:>6} {measured['seconds']:>8.1f} s "
                f"{measured['peak_bytes'] / 1e6:>8.0f} MB ({measured['weights_bytes'] / 1e6:.0f})",
                flush=True,
            )
    write_results("growth", {"points": found})
    draw(found, Path(__file__).parent / "results" / "growth.png")


if __name__ == "__main__":
    main()
