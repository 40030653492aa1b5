"""Compress a teacher into a student: distillation from a fused start against other starts.

    CLAFUSION_DATA=... python -m benchmarks.experiments.distillation [--quick]

A deep ResNet (the teacher) and a shallow one (the student) are fused into the student's
architecture; then the student is distilled from the teacher for the same number of steps from a
random start, from the student itself and from the fused network (CLAFusion, arXiv 2110.15538,
section 5.3). Beside it: finetuning from the same starts on labels alone.
"""

from benchmarks.datasets import accuracy
from benchmarks.experiments.cifar_pairs import FULL, QUICK, data, fresh, parents
from benchmarks.experiments.experiment import arguments, run, trained
from clafusion import fuse
from clafusion.training import distill

TEMPERATURE, ALPHA = 4.0, 0.9


def main() -> None:
    given = arguments(__doc__, seeds=3)
    settings = {
        **(QUICK if given.quick else FULL),
        "rate": 0.05,
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
    }
    train, test = data(settings, given.device)
    unlabelled = train[0][: settings["unlabelled"]]

    def one_seed(seed: int) -> dict[str, float]:
        teacher, student = parents(settings, train, seed)
        starts = {
            "random start": fresh(settings, "shallow", seed + 2000).to(given.device).eval(),
            "student": student,
            "fused": fuse(
                [teacher, student],
                unlabelled,
                target="shallower",
                calibration="least_squares",
                seed=seed,
            ).model.eval(),
        }
        found = {"teacher (deep)": accuracy(teacher, *test)}
        for name, start in starts.items():
            found[f"{name}, before"] = accuracy(start, *test)
            distilled = distill(
                start,
                teacher,
                train,
                temperature=TEMPERATURE,
                alpha=ALPHA,
                epochs=settings["more_epochs"],
                learning_rate=settings["rate"],
                weight_decay=5e-4,
                norms="batch",
                held_out=0,
                seed=seed + 3000,
            ).model.eval()
            found[f"{name}, distilled"] = accuracy(distilled, *test)
            model = trained(
                start,
                *train,
                settings["more_epochs"],
                seed + 3000,
                learning_rate=settings["rate"],
                weight_decay=5e-4,
            )
            found[f"{name}, finetuned on labels"] = accuracy(model, *test)
        return found

    run("distillation", given, settings, one_seed, title="CIFAR-10 test accuracy")


if __name__ == "__main__":
    main()
