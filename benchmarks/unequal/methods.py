"""What the suite compares: every way to make one network of the parents, by its row."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from clafusion import FusionResult, LeastSquares, Wider, fuse, naive_average

Fused = Callable[[Sequence[nn.Module], Tensor, int], FusionResult]


def _fused(**options: object) -> Fused:
    return lambda parents, unlabelled, seed: fuse(parents, unlabelled, seed=seed, **options)


METHODS: dict[str, Fused] = {
    "matched, averaged": _fused(calibration="none"),
    "matched, REPAIR": _fused(calibration="repair"),
    "least squares, mean of logits": _fused(combine="logits"),
    "least squares": _fused(),
    "least squares, anchor 0.9 at the deepest": _fused(calibration=LeastSquares(anchor=0.9)),
    "least squares, towards any": _fused(calibration=LeastSquares(toward="any")),
}
"""For any number of parents, at the width of the deepest one."""

OF_TWO: dict[str, Fused] = {
    f"least squares, {factor} x as wide": _fused(target=Wider(factor)) for factor in (1.25, 1.5)
}
"""For two parents, wider than these."""


def networks(parents: Sequence[nn.Module], unlabelled: Tensor, seed: int) -> dict[str, nn.Module]:
    """Return what each way makes of the parents, with equal weights."""
    ways = METHODS | (OF_TWO if len(parents) == 2 else {})
    found: dict[str, nn.Module] = {}
    for name, way in ways.items():
        result = way(parents, unlabelled, seed)
        if not found:
            found["naive average"] = naive_average(result.problem)
        found[name] = result.model
    return found
