"""Print how much faster than their peers the kernels are: ``python -m benchmarks.ratios``.

Each row runs a peer and ours in turns, checks that the answers agree, and compares medians. The
figures go to ``benchmarks/results/ratios.json``. Arguments are parts of row names: only those rows
run, and nothing is written.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict

import torch

import clafusion
from benchmarks import layer_rows, transport_rows
from benchmarks.results import write_results
from benchmarks.row import measure

MAKERS = [*layer_rows.MAKERS, *transport_rows.MAKERS]


def main(wanted: list[str]) -> None:
    results = []
    print(f"{'work and peer':<78} {'peer':>10} {'ours':>10} {'ratio':>8} {'target':>7}")
    for make in MAKERS:
        row = make()
        if not wanted or any(part in row.name for part in wanted):
            found = measure(row)
            results.append(asdict(found))
            print(
                f"{found.name:<78} {1e3 * found.peer_seconds:>7.1f} ms "
                f"{1e3 * found.our_seconds:>7.1f} ms {found.ratio:>7.1f}x {found.target:>6g}x",
                *([f"\n  {found.note}"] if found.note else []),
                flush=True,
            )
        del row
        gc.collect()
    if wanted:
        return
    build = clafusion.build_info()
    write_results(
        "ratios", {"torch_threads": torch.get_num_threads(), "build": build, "rows": results}
    )


if __name__ == "__main__":
    main(sys.argv[1:])
