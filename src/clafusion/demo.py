"""The main job on data that ships with scikit-learn: train two small networks and fuse them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import AssessmentWarning, InputError
from clafusion.fusion import fuse
from clafusion.merging.naive import naive_average
from clafusion.reports import plot
from clafusion.reports.alignment_tables import alignment_summary
from clafusion.reports.text import fact_lines, plain_table
from clafusion.results import FusionResult
from clafusion.threads import one_thread
from clafusion.weights.state_files import save_model

__all__ = ["DemoOutcome", "run_demo"]

DEEP = (64, 64, 48, 48, 32, 32, 10)
SHALLOW = (64, 80, 40, 10)
_TEST = 500
_SEEN = 0.1  # of the digits that the other network is trained on


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo found: accuracies by name, the fusion, and the files that it wrote."""

    accuracies: dict[str, float]
    result: FusionResult
    picture: Path
    weights: Path
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return what a machine may want to know."""
        return {
            "accuracies": self.accuracies,
            "deep_to_shallow": list(self.result.alignment.deep_to_shallow),
            "picture": str(self.picture),
            "weights": str(self.weights),
            "seconds": self.seconds,
        }

    def summary(self) -> str:
        """Return the table that a person reads."""
        rows = [[name, f"{100 * value:.1f} %"] for name, value in self.accuracies.items()]
        return "\n\n".join(
            [
                "Two networks learnt handwritten digits, the deep one mostly 0 to 4, the shallow "
                "one mostly 5 to 9.\nNone of the fused ones was trained.",
                plain_table(["network", "right of 500 test images, all digits"], rows, [1]),
                alignment_summary(self.result.aligned),
                fact_lines(
                    {
                        "picture": str(self.picture),
                        "weights": str(self.weights),
                        "seconds": f"{self.seconds:.1f}",
                    }
                ),
            ]
        )


def run_demo(
    out_dir: Path, *, seed: int = 0, epochs: int = 40, say: Callable[[str], None] | None = None
) -> DemoOutcome:
    """Train two networks of different depth on scikit-learn's digits, and fuse them.

    Parameters
    ----------
    out_dir
        Where the picture and the fused weights go; made if it does not exist.
    seed
        Seed of the split, the training and the fusion.
    epochs
        How long to train.
    say
        Called with what is going on.

    Raises
    ------
    InputError
        scikit-learn is not installed, or ``out_dir`` cannot be made.
    """
    say = say or (lambda _: None)
    start = time.perf_counter()
    images, labels = _digits()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out-dir {str(out_dir)!r} cannot be made: {error.strerror}") from error
    with one_thread():  # layers this small lose more by waiting for other threads than they gain
        accuracies, result = _train_and_fuse(images, labels, seed, epochs, say)
    picture, weights = out_dir / "alignment.png", out_dir / "fused.safetensors"
    plot(result, picture)
    save_model(result.model, weights)
    return DemoOutcome(accuracies, result, picture, weights, time.perf_counter() - start)


def _train_and_fuse(
    images: Tensor, labels: Tensor, seed: int, epochs: int, say: Callable[[str], None]
) -> tuple[dict[str, float], FusionResult]:
    """Return each network's accuracy, and the best fusion."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    test, train = order[:_TEST], order[_TEST:]
    low = labels[train] < 5
    drawn = torch.rand(len(train), generator=generator)
    to_deep = torch.where(low, drawn >= _SEEN, drawn < _SEEN)
    parents = []
    for i, (widths, chosen) in enumerate(((DEEP, to_deep), (SHALLOW, ~to_deep))):
        say(f"training a network of {len(widths) - 1} layers on {int(chosen.sum())} images")
        own = train[chosen]
        parents.append(_trained(widths, images[own], labels[own], seed + i, epochs))
    deep, shallow = parents
    say("fusing")
    unlabelled, both = images[train], {"deep": deep, "shallow": shallow}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssessmentWarning)  # the table shows what is bad
        fused = {
            name: fuse(both, unlabelled, calibration=name, seed=seed)
            for name in ("none", "repair", "least_squares")
        }
    models: dict[str, nn.Module] = {
        f"deep parent ({len(DEEP) - 1} layers)": deep,
        f"shallow parent ({len(SHALLOW) - 1} layers)": shallow,
        "fused: averaged without matching": naive_average(fused["none"].problem),
        "fused: matched": fused["none"].model,
        "fused: matched, REPAIR": fused["repair"].model,
        "fused: matched, least squares": fused["least_squares"].model,
    }
    with torch.no_grad():
        outputs = {name: model(images[test]) for name, model in models.items()}
        mean = torch.stack([parent(images[test]).softmax(1) for parent in parents]).mean(0)
    outputs["both parents run side by side"] = mean
    accuracies = {
        name: float((output.argmax(1) == labels[test]).double().mean())
        for name, output in outputs.items()
    }
    return accuracies, fused["least_squares"]


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the demo needs scikit-learn's digits: pip install 'clafusion[demo]'"
        ) from error
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def _trained(
    widths: tuple[int, ...], images: Tensor, labels: Tensor, seed: int, epochs: int
) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        linear = nn.Linear(into, out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
