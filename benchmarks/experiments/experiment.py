"""What the experiments share: seeds that are kept once done, the table and the plot."""

import argparse
import json
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn

from benchmarks.results import write_results
from clafusion.training import finetune

mpl.use("Agg")

RESULTS = Path(__file__).parents[1] / "results"


def arguments(description: str | None, *, seeds: int, **flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the form for two cores, in minutes")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--fresh", action="store_true", help="compute all seeds, also those that are stored"
    )
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    return parser.parse_args()


def run(
    name: str,
    given: argparse.Namespace,
    settings: dict[str, Any],
    one_seed: Callable[[int], dict[str, float]],
    *,
    title: str,
) -> dict[str, list[float]]:
    """Run every seed that is not done yet, write the results after each, and print the table.

    A seed's results are kept as long as the settings are the same. Which seeds are read from the
    file and which are computed is printed: figures that are read hold for the versions of then.
    """
    name = f"{name}_quick" if given.quick else name
    path = RESULTS / f"{name}.json"
    done: dict[str, dict[str, float]] = {}
    if path.exists() and not given.fresh:
        before = json.loads(path.read_text())
        if before["settings"] == json.loads(json.dumps(settings)):
            done = before["seeds"]
            print(_stored(list(done), path, before["about"]))
    for seed in range(given.seeds):
        if str(seed) not in done:
            print(f"seed {seed}: computing", flush=True)
            done[str(seed)] = one_seed(seed)
            write_results(name, {"settings": settings, "seeds": done, "table": _table(done)})
    table = _table(done)
    print(f"\n{title}, mean and standard deviation of {len(done)} seeds")
    width = max(map(len, table))
    for row, figures in table.items():
        print(f"{row:{width}s} {100 * figures['mean']:6.2f} % +- {100 * figures['stdev']:5.2f}")
    _plot(table, title, RESULTS / f"{name}.png")
    return {row: [one[row] for one in done.values()] for row in table}


def _stored(seeds: list[str], path: Path, about: dict[str, Any]) -> str:
    return (
        f"NOT COMPUTED NOW: seeds {', '.join(seeds)} are read from {path}, as they were computed "
        f"with Python {about['python']} and torch {about['torch']}; --fresh computes them again"
    )


def _table(done: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    rows = next(iter(done.values()))
    values = {row: [one[row] for one in done.values()] for row in rows}
    return {
        row: {"mean": statistics.mean(ones), "stdev": statistics.pstdev(ones)}
        for row, ones in values.items()
    }


def _plot(table: dict[str, dict[str, float]], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(table)), layout="constrained")
    axes.barh(
        list(table),
        [100 * row["mean"] for row in table.values()],
        xerr=[100 * row["stdev"] for row in table.values()],
        color="#4477aa",
    )
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, None)
    figure.supxlabel(textwrap.fill(f"{title} (%)", 90), fontsize="medium")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def trained(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int, **settings: Any
) -> nn.Module:
    """Return a classifier trained from the weights it has."""
    return finetune(
        model,
        (images, labels),
        epochs=epochs,
        seed=seed,
        batch_size=128,
        **{"held_out": 0, "norms": "batch", **settings},
    ).model.eval()
