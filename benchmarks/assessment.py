"""Does the assessment without labels rank fused networks as their test accuracy does?

    CLAFUSION_DATA=... python -m benchmarks.assessment [--test 1000] [--images 500]

Fuses the two real CIFAR-10 checkpoints with equal weights, from badly to well. Prints each way's
agreement with, and divergence from, what the two checkpoints put out together, first on every tenth
unlabelled image, which the fusion did not see but the checkpoints were trained on, then on as many
images as were given that nobody saw; beside it the accuracy on test images with labels.
"""

import argparse

from torch import Tensor, nn

from benchmarks.datasets import accuracy, checkpoint_pair, cifar10, logits
from benchmarks.results import write_results
from clafusion import FusionAssessment, FusionResult, fuse, naive_average
from clafusion.assessment.assess import assess
from clafusion.assessment.parts import parts_of
from clafusion.config import Assessment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--images", type=int, default=500, help="unlabelled training images")
    arguments = parser.parse_args()
    parents = dict(zip(("ResNet-20", "ResNet-32"), checkpoint_pair(), strict=True))
    unlabelled, _ = cifar10("train", arguments.images)
    images, labels = cifar10("test", arguments.test + arguments.images)
    unseen, images, labels = (
        images[arguments.test :],
        images[: arguments.test],
        labels[: arguments.test],
    )

    def matched(calibration: str) -> FusionResult:
        return fuse(parents, unlabelled, calibration=calibration)

    plain = matched("none")
    naive = naive_average(plain.problem, [0.5, 0.5]).eval()
    results = {
        "matched": plain,
        "matched, BatchNorm reset": matched("batchnorm"),
        "matched, REPAIR": matched("repair"),
        "matched, least squares": matched("least_squares"),
    }
    models = {"naive average": naive, **{name: one.model for name, one in results.items()}}
    kept_out = {
        "naive average": _assessed(naive, plain, unlabelled, Assessment()),
        **{name: one.assessment for name, one in results.items()},
    }
    on_unseen = {
        name: _assessed(model, plain, unseen, Assessment(held_out=0.0))
        for name, model in models.items()
    }
    rows = {name: (kept_out[name].result, on_unseen[name].result) for name in models}
    for name in parents:
        both = (one["matched"].parents[name] for one in (kept_out, on_unseen))
        rows[f"{name} alone"] = tuple(both)
        models[f"{name} alone"] = parents[name]
    figures = {}
    for name, (near, elsewhere) in rows.items():
        figures[name] = {
            "agreement": near.agreement,
            "divergence": near.distance,
            "agreement_unseen": elsewhere.agreement,
            "divergence_unseen": elsewhere.distance,
            "accuracy": accuracy(models[name].eval(), images, labels),
        }
        print(_row(name, figures[name]), flush=True)
    both = sum(logits(model, images).softmax(1) for model in parents.values())
    ensemble = float((both.argmax(1) == labels).double().mean())
    print(f"{'both side by side':28s} {100 * ensemble:52.2f} %")

    fused = [figures[name] for name in kept_out]
    correlations = {
        name: _rank_correlation(
            [(-1 if "divergence" in name else 1) * one[name] for one in fused],
            [one["accuracy"] for one in fused],
        )
        for name in ("agreement", "divergence", "agreement_unseen", "divergence_unseen")
    }
    for name, value in correlations.items():
        print(f"rank correlation of {name} with accuracy over the fused networks: {value:.2f}")
    write_results(
        "assessment",
        {
            "test_images": len(images),
            "unlabelled_images": len(unlabelled),
            "assessed_images": plain.assessment.num_inputs,
            "networks": figures,
            "nearer_alone": {name: list(one.nearer) for name, one in kept_out.items()},
            "nearer_alone_unseen": {name: list(one.nearer) for name, one in on_unseen.items()},
            "both_side_by_side": ensemble,
            "rank_correlations": correlations,
            "seconds_assess": plain.timings["assess"],
            "seconds_all": {name: sum(one.timings.values()) for name, one in results.items()},
        },
    )


def _assessed(
    model: nn.Module, plain: FusionResult, data: Tensor, settings: Assessment
) -> FusionAssessment:
    """Assess a network that no fusion made, or on other images."""
    parents = {one.name: one.traced for one in plain.parents}
    parts = parts_of(data, tuple(parents.values()), settings)
    return assess(model, plain.problem, parents, plain.weights, parts, settings)


def _row(name: str, figures: dict[str, float]) -> str:
    shown = "".join(
        f" {100 * figures[f'agreement{where}']:8.1f} % {figures[f'divergence{where}']:9.3f}"
        for where in ("", "_unseen")
    )
    return f"{name:28s}{shown} {100 * figures['accuracy']:8.2f} %"


def _rank_correlation(first: list[float], second: list[float]) -> float:
    """Return Goodman and Kruskal's gamma: 1 where both order all pairs alike, -1 for opposite."""
    signs = [
        (one > other) - (one < other)
        for values in (first, second)
        for i, one in enumerate(values)
        for other in values[:i]
    ]
    half = len(signs) // 2
    products = [one * other for one, other in zip(signs[:half], signs[half:], strict=True)]
    return sum(products) / max(1, sum(map(abs, products)))


if __name__ == "__main__":
    main()
