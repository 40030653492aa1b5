"""Does a fused network finetune better than what it was made of? ResNets on CIFAR-10.

    CLAFUSION_DATA=... python -m benchmarks.experiments.finetune_cnn [--quick] [--more | --halves]

Two ResNets of different depth, fused, then finetuned; beside them either parent and a network from
scratch, for the same number of steps with the same settings (CLAFusion, arXiv 2110.15538, section
5.2). The quick form takes images of half the size and a few of them. With ``--halves`` each parent
has seen a half of the images of its own, and all is finetuned on both.
"""

from collections.abc import Callable

from torch import nn

from benchmarks.datasets import accuracy
from benchmarks.experiments.cifar_pairs import FULL, QUICK, data, fresh, parents
from benchmarks.experiments.experiment import arguments, run, trained
from clafusion import LeastSquares, fuse

RATES = (0.1, 0.02)
# Few images seen often are learnt by heart, and then there is nothing left to finetune.
MORE_IMAGES = {**QUICK, "images": 10_000, "epochs": 5, "more_epochs": 2}
HALVES = {**QUICK, "images": 8000, "more_epochs": 2, "halves": True}


def main() -> None:
    given = arguments(
        __doc__,
        seeds=3,
        more="the quick form with 10,000 images, of fewer epochs",
        halves="the quick form with 8,000 images, of which each parent has seen a half of its own",
    )
    given.quick |= given.more or given.halves
    name, chosen = "finetune_cnn", QUICK if given.quick else FULL
    if given.more:
        name, chosen = "finetune_cnn_more", MORE_IMAGES
    elif given.halves:
        name, chosen = "finetune_cnn_halves", HALVES
    settings = {**chosen, "rates": list(RATES)}
    train, test = data(settings, given.device)
    unlabelled = train[0][: settings["unlabelled"]]

    def one_seed(seed: int) -> dict[str, float]:
        deep, shallow = parents(settings, train, seed)

        def by_least_squares(anchor: float | str) -> nn.Module:
            calibration = LeastSquares(anchor=anchor)
            return fuse([deep, shallow], unlabelled, calibration=calibration, seed=seed).model

        starts: dict[str, Callable[[], nn.Module]] = {
            "deep parent": lambda: deep,
            "shallow parent": lambda: shallow,
            "from scratch (deep)": lambda: fresh(settings, "deep", seed + 2000).to(given.device),
            "fused, REPAIR": lambda: (
                fuse([deep, shallow], unlabelled, calibration="repair", seed=seed).model
            ),
            "fused, least squares": lambda: by_least_squares("auto"),
            "fused, least squares, anchor 0": lambda: by_least_squares(0.0),
        }
        found = {}
        for name, make in starts.items():
            start = make().eval()
            found[f"{name}, before"] = accuracy(start, *test)
            for rate in RATES:
                model = trained(
                    start,
                    *train,
                    settings["more_epochs"],
                    seed + 3000,
                    learning_rate=rate,
                    weight_decay=5e-4,
                )
                found[f"{name}, finetuned at {rate}"] = accuracy(model, *test)
        return found

    scores = run(name, given, settings, one_seed, title="CIFAR-10 test accuracy")
    means = {row: sum(values) / len(values) for row, values in scores.items()}
    after = {row: value for row, value in means.items() if "finetuned" in row}
    best = max(after, key=after.__getitem__)
    print(f"\nbest after finetuning: {best}, {100 * after[best]:.2f} %")
    for rate in RATES:
        rows = {row: value for row, value in after.items() if row.endswith(f"at {rate}")}
        winner = max(rows, key=rows.__getitem__)
        print(f"best at learning rate {rate}: {winner}, {100 * rows[winner]:.2f} %")


if __name__ == "__main__":
    main()
