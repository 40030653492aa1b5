"""Many pairs: throughput beside `fuse` in a loop and the paper's steps, processes, memory, kills.

python -m benchmarks.many            # all, about twenty minutes on two quiet cores
python -m benchmarks.many --quick    # the same code on less, a minute; writes nothing
python -m benchmarks.many --only throughput --fused 4   # a part; the others keep their figures
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import clafusion
from benchmarks.cifar_resnet import CifarResNet
from benchmarks.paper_steps import fuse_by_the_paper
from benchmarks.results import write_results
from clafusion.batch.run import fuse_pairs
from clafusion.weights.state_files import save_model

FACTORY = "benchmarks.cifar_resnet:CifarResNet"
DEPTHS = (8, 14, 20, 26, 32)  # 6 blocks + 2
CONFIG = clafusion.FusionConfig(calibration="repair")  # beside steps that calibrate nothing at all


def resnets(count: int) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {}
    for i in range(count):
        depth = DEPTHS[i * len(DEPTHS) // count]
        torch.manual_seed(i)
        models[f"resnet{depth}-{i}"] = CifarResNet((depth - 2) // 6).eval()
    return models


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def both_seconds(work: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Return seconds on the clock and of the processor, which other work disturbs less."""
    processor = time.process_time()
    spent, found = seconds(work)
    return np.array([spent, time.process_time() - processor]), found


def same(state: Any, other: Any) -> bool:
    return state.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in state.items()
    )


# --- beside fuse, and beside the paper's steps ---------------------------------------------------


def throughput(count: int, inputs: int, fused: int, peers: int) -> dict[str, Any]:
    """Time all pairs at once, one by one, and by the paper's steps, in turns.

    Of the pairs, ``fused`` are fused one by one and ``peers`` taken through the paper's steps;
    their mean stands for all. The pairs are drawn at random.
    """
    models, data = resnets(count), images(inputs)
    pairs = list(combinations(models, 2))
    chosen = random.Random(0).sample(pairs, min(fused, len(pairs)))
    clafusion.fuse(list(models.values())[:2], data, config=CONFIG)  # the first trace takes long
    together, alone, paper, bare = [], [], [], []
    results: dict[tuple[str, str], Any] = {}

    def at_once() -> None:
        spent, found = both_seconds(lambda: list(fuse_pairs(models, data, config=CONFIG)))
        together.append(spent)
        results.update({(one.first, one.second): one for one in found})

    at_once()
    for i, pair in enumerate(chosen):
        first, second = (models[name] for name in pair)
        spent, result = both_seconds(lambda: clafusion.fuse([first, second], data, config=CONFIG))  # noqa: B023
        alone.append(spent)
        assert same(result.model.state_dict(), results[pair].state), pair
        spent, _ = both_seconds(lambda: forward(result.model, data))  # noqa: B023
        bare.append(spent)
        if i < peers:
            spent, (_, costs, layer_maps) = both_seconds(
                lambda: fuse_by_the_paper(first, second, data[:400])  # noqa: B023
            )
            paper.append(spent)
            check_alignment(result.alignment, costs, layer_maps)
        print(f"  {i + 1} of {len(chosen)}", end="\r", file=sys.stderr)
    at_once()
    plain, _ = both_seconds(lambda: list(fuse_pairs(models, data, calibration="none")))
    first = {name.split("-")[0]: model for name, model in models.items()}
    exported, _ = both_seconds(lambda: [export(model, data) for model in first.values()])
    stages: dict[str, float] = {}
    for one in results.values():
        for stage, spent in one.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + spent
    figures: dict[str, Any] = {
        "pairs": len(pairs),
        "images": inputs,
        "threads": torch.get_num_threads(),
        "pairs_fused_one_by_one": len(alone),
        "pairs_by_the_paper": len(paper),
        "stages_of_the_last_run": stages,
    }
    for i, kind in enumerate(("clock", "processor")):
        ours = statistics.mean(one[i] for one in together)
        one_by_one = statistics.mean(one[i] for one in alone) * len(pairs)
        by_paper = statistics.mean(one[i] for one in paper) * len(pairs)
        figures[kind] = {
            "fuse_pairs_seconds": ours,
            "fuse_seconds": one_by_one,
            "paper_seconds": by_paper,
            "fuse_pairs_without_calibration_seconds": float(plain[i]),
            # What no way to fuse them goes without: each architecture exported once, and for a
            # calibration each fused network run once.
            "torch_export_seconds": float(exported[i]),
            "fused_networks_forward_seconds": statistics.mean(one[i] for one in bare) * len(pairs),
            "beside_fuse": one_by_one / ours,
            "beside_paper": by_paper / ours,
            "beside_paper_without_calibration": by_paper / float(plain[i]),
        }
    return figures


@torch.no_grad()
def forward(model: nn.Module, data: torch.Tensor) -> None:
    for part in data.split(32):  # which stays in the cache
        model(part)


def export(model: nn.Module, data: torch.Tensor) -> None:
    torch.export.export(model, (data[:2],), strict=False)


def check_alignment(alignment: Any, costs: list[np.ndarray], layer_maps: list[list[int]]) -> None:
    """Hold the paper's costs and map against ours: a stem before the blocks, a head behind."""
    row = column = 1
    for cost, layer_map in zip(costs, layer_maps, strict=True):
        m, n = cost.shape
        ours = alignment.cost[row : row + m, column : column + n]
        allowed = np.isfinite(cost)
        # The peer sums float32 products, over up to 16,384 features.
        assert np.allclose(ours[allowed], cost[allowed], atol=1e-3), (ours, cost)
        expected = [k + column if k >= 0 else -1 for k in layer_map]
        assert list(alignment.deep_to_shallow[row : row + m]) == expected
        row, column = row + m, column + n


# --- processes -----------------------------------------------------------------------------------


def processes(count: int, inputs: Sequence[int], runs: int) -> dict[str, Any]:
    """Time two processes and one on few and on many images: they start and trace alike for both."""
    return {f"{one}_images": two_beside_one(count, one, runs) for one in inputs}


def limit_threads(count: int) -> None:
    torch.set_num_threads(count)
    clafusion.set_num_threads(count)


def two_beside_one(count: int, inputs: int, runs: int) -> dict[str, Any]:
    """Time two processes and one, each on one core and from its start, in turns."""
    models, data = resnets(count), images(inputs)
    spent: dict[int, list[float]] = {1: [], 2: []}
    states: list[Any] = []
    for _ in range(runs):
        for number, times in spent.items():
            with tempfile.TemporaryDirectory() as folder:

                def work(number: int = number, folder: str = folder) -> list[Any]:
                    with ProcessPoolExecutor(
                        number,
                        mp_context=get_context("spawn"),
                        initializer=limit_threads,
                        initargs=(1,),
                    ) as executor:
                        return list(
                            fuse_pairs(
                                models, data, config=CONFIG, executor=executor, cache_dir=folder
                            )
                        )

                taken, found = seconds(work)
            times.append(taken)
            states.append([one.state for one in found])
    for other in states[1:]:
        assert all(map(same, states[0], other))
    medians = {number: statistics.median(times) for number, times in spent.items()}
    return {
        "one_process_seconds": medians[1],
        "two_processes_seconds": medians[2],
        "runs": spent,
        "speedup": medians[1] / medians[2],
    }


# --- memory --------------------------------------------------------------------------------------


def save_resnets(folder: Path, count: int) -> dict[str, clafusion.ModelFile]:
    files = {}
    for name, model in resnets(count).items():
        save_model(model, folder / f"{name}.safetensors")
        blocks = (int(name.split("-")[0].removeprefix("resnet")) - 2) // 6
        factory = f"{FACTORY}({blocks})"
        files[name] = clafusion.ModelFile(factory, folder / f"{name}.safetensors")
    return files


def run_here(folder: Path, count: int, inputs: int, limit: int | None, base: bool) -> None:
    """Do what a child process does: fuse, and print the largest memory that it held, in MB."""
    torch.set_num_threads(1)
    clafusion.set_num_threads(1)
    files = save_resnets(folder, count) if not (folder / "saved").exists() else saved(folder)
    names = list(files)
    pairs: Any = [(names[-1], name) for name in names[:-1]] if base else "all"
    for one in fuse_pairs(
        files, images(inputs), pairs, config=CONFIG, out_dir=folder / "out", memory_limit=limit
    ):
        assert one.error is None, one.error
    # getrusage would tell the parent's peak, where that was higher.
    status = Path("/proc/self/status").read_text()
    print(json.dumps(int(status.partition("VmHWM:")[2].split()[0]) / 1024))


def saved(folder: Path) -> dict[str, clafusion.ModelFile]:
    files = {}
    for path in sorted(folder.glob("resnet*.safetensors")):
        blocks = (int(path.name.split("-")[0].removeprefix("resnet")) - 2) // 6
        files[path.stem] = clafusion.ModelFile(f"{FACTORY}({blocks})", path)
    return files


def child(folder: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.many", "--child", str(folder), *map(str, arguments)]


def memory(counts: tuple[int, int], inputs: int, limit: int) -> dict[str, Any]:
    """Fuse the deepest of few and of many models with all others, on one budget."""
    peaks = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            command = child(Path(folder), count, inputs, limit, 1)
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks[count] = json.loads(run.stdout)
    few, lots = (peaks[count] for count in counts)
    return {"budget_mb": limit / 1e6, "peak_mb": peaks, "more": lots / few - 1}


# --- interruption --------------------------------------------------------------------------------


def kills(count: int, inputs: int, times: int) -> dict[str, Any]:
    """Kill a run at random moments, go on, and compare with a run that was left alone."""
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        whole = root / "whole"
        whole.mkdir()
        save_resnets(whole, count)
        (whole / "saved").touch()
        command = child(whole, count, inputs, 0, 0)
        length, _ = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        expected = contents(whole)
        survived = 0
        for i in range(times):
            folder = root / f"killed{i}"
            folder.mkdir()
            for file in whole.glob("*.safetensors"):
                (folder / file.name).hardlink_to(file)
            (folder / "saved").touch()
            command = child(folder, count, inputs, 0, 0)
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            time.sleep(chance.uniform(0.3, 1.0) * length)
            run.kill()
            survived += run.wait() == 0
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            assert contents(folder) == expected, folder
            print(f"  killed {i + 1} of {times}", end="\r", file=sys.stderr)
    return {"kills": times, "ended_before": survived, "pairs": len(expected), "bytes_equal": True}


def contents(folder: Path) -> dict[str, bytes]:
    """Return each pair's file; every pair has one line."""
    lines = [json.loads(one) for one in (folder / "out" / "results.jsonl").open()]
    found = {one["file"]: (folder / "out" / one["file"]).read_bytes() for one in lines}
    assert len(found) == len(lines), "a pair is there twice"
    assert found.keys() == {one.name for one in (folder / "out").glob("*.safetensors")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="one of throughput, processes, memory, kills")
    parser.add_argument("--out", type=Path, help="write the figures there, too")
    parser.add_argument("--fused", type=int, default=45, help="pairs fused one by one")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        folder, *numbers = given.child
        count, inputs, limit, base = map(int, numbers)
        run_here(Path(folder), count, inputs, limit or None, bool(base))
        return
    work: dict[str, Callable[[], dict[str, Any]]] = (
        {
            "throughput": lambda: throughput(4, 128, 3, 1),
            "processes": lambda: processes(4, (128,), 1),
            "memory": lambda: memory((4, 8), 64, 60_000_000),
            "kills": lambda: kills(3, 64, 2),
        }
        if given.quick
        else {
            "throughput": lambda: throughput(10, 400, given.fused, 12),
            "processes": lambda: processes(10, (512, 2000), 2),
            "memory": lambda: memory((10, 40), 64, 100_000_000),
            "kills": lambda: kills(4, 64, 20),
        }
    )
    figures = {}
    for name, measure in work.items():
        if given.only in (None, name):
            figures[name] = measure()
            print(name, json.dumps(figures[name], indent=2), flush=True)
    if not given.quick:
        written = Path(__file__).parent / "results" / "many.json"
        known = json.loads(written.read_text()) if written.exists() else {}
        known.pop("about", None)
        write_results("many", {**known, **figures})
    if given.out:
        given.out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
