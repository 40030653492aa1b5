"""Fuse two character models of different depth, and count bits per character.

    CLAFUSION_DATA=... python -m benchmarks.gpts [--seeds 3] [--steps 500] [--layers 6 4]

Causal pre-norm transformers of six and of four layers, trained briefly on tinyshakespeare from
other starts and on other windows, and fused with equal weights on windows without labels. Figures
are bits per character on the last tenth, which nobody was trained on: less is better. Seeds that
are done, with the same settings, are kept.
"""

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.orthogonal import Batch, CharacterModel, text, trained, windows
from benchmarks.results import write_results
from clafusion import LeastSquares, fuse, naive_average

BATCH = 32  # windows of a training step
METHODS = {
    "averaged": {"calibration": "none"},
    "REPAIR": {"calibration": "repair"},
    "least squares": {},
    "least squares, towards any": {"calibration": LeastSquares(toward="any")},
}
RESULTS = Path(__file__).parent / "results" / "gpts.json"


@torch.no_grad()
def log_probabilities(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model.eval()(one).log_softmax(-1) for one in inputs.split(250)])


def measured(pair: list[nn.Module], inputs: Tensor, test: Batch, seed: int) -> dict[str, float]:
    """Return the bits of both parents, of both side by side and of what they are fused to."""
    labels = test[1].flatten()

    def bits(logs: Tensor) -> float:
        return float(F.nll_loss(logs.flatten(0, -2), labels)) / math.log(2)

    logs = [log_probabilities(one, test[0]) for one in pair]
    results = {name: fuse(pair, inputs, seed=seed, **how) for name, how in METHODS.items()}
    made = {"naive average": naive_average(results["averaged"].problem)}
    made |= {name: one.model for name, one in results.items()}
    return {
        "the deep parent": bits(logs[0]),
        "the shallow parent": bits(logs[1]),
        "side by side, mean of logits": bits((sum(logs) / 2).log_softmax(-1)),
        "side by side, mean of probabilities": bits(torch.stack(logs).logsumexp(0) - math.log(2)),
        **{name: bits(log_probabilities(one, test[0])) for name, one in made.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 4])
    parser.add_argument("--inputs", type=int, default=1000, help="windows of a fusion")
    arguments = parser.parse_args()
    settings = {key: value for key, value in vars(arguments).items() if key != "seeds"}
    read, held_out, characters = text()
    test = windows(held_out, 1000, torch.Generator().manual_seed(7))
    done: dict[str, dict[str, float]] = {}
    if RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        done = before["seeds"] if before["settings"] == settings else {}
    for seed in range(arguments.seeds):
        if str(seed) not in done:
            pair = []
            for i, layers in enumerate(arguments.layers):
                torch.manual_seed(2 * seed + i)
                drawn = torch.Generator().manual_seed(100 + 2 * seed + i)
                batches = iter(partial(windows, read, BATCH, drawn), None)
                model = CharacterModel(layers, nn.LayerNorm, characters)
                pair.append(trained(model, batches, arguments.steps))
            inputs, _ = windows(read, arguments.inputs, torch.Generator().manual_seed(50))
            done[str(seed)] = measured(pair, inputs, test, seed)
            write_results("gpts", {"settings": settings, "seeds": done})  # what is done is kept
        print(seed, {name: round(one, 3) for name, one in done[str(seed)].items()}, flush=True)
    for name in done["0"]:
        values = [one[name] for one in done.values()]
        print(f"{name:36s} {statistics.mean(values):.3f} +- {statistics.pstdev(values):.3f} bits")


if __name__ == "__main__":
    main()
