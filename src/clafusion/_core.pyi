from typing import Any

from numpy import bool_, float32, float64, int64
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def simd_level() -> str: ...
def assign(
    costs: list[NDArray[float64]],
    targets: NDArray[int64],
    source_potentials: NDArray[float64],
    target_potentials: NDArray[float64],
    totals: NDArray[float64],
) -> None: ...
def channel_moments(
    x: NDArray[float32], mean: NDArray[float64], variance: NDArray[float64]
) -> None: ...
def scale_channels(
    x: NDArray[float32],
    scale: NDArray[float32],
    shift: NDArray[float32],
    other: NDArray[float32] | None,
    low: float,
    high: float,
    out: NDArray[float32],
) -> None: ...
def add_gram(x: NDArray[float32], result: NDArray[float64], level: int = 0) -> None: ...
def keep_lower(matrix: NDArray[float64], kept: NDArray[int64]) -> None: ...
def lose_channels(
    inverse: NDArray[float64],
    products: NDArray[float64],
    blocks: NDArray[float64],
    read: NDArray[float64],
    settled: NDArray[float64],
    logs: NDArray[float64],
    left: NDArray[bool_],
    lost: NDArray[int64],
    count: int,
    cancelled: float,
) -> None: ...
def hsic_all_pairs(
    grams_a: list[NDArray[float64]],
    grams_b: list[NDArray[float64]],
    unbiased: bool,
    products: NDArray[float64],
    norms_a: NDArray[float64],
    norms_b: NDArray[float64],
) -> None: ...
def align_layers(
    costs: NDArray[float64],
    skips: NDArray[float64],
    skips_shallow: NDArray[float64],
    shapes: NDArray[int64],
    mode: int,
    pin_first: bool,
    pin_last: bool,
    deep_to_shallow: NDArray[int64],
    total_costs: NDArray[float64],
    reached: NDArray[int64],
) -> None: ...
def sinkhorn(
    costs: list[NDArray[float32]],
    source_weights: NDArray[float64],
    target_weights: NDArray[float64],
    initial_potential: NDArray[float64] | None,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
    marginal_relaxation: float,
    plans: list[NDArray[float32]],
    source_potentials: NDArray[float64],
    target_potentials: NDArray[float64],
    totals: NDArray[float64],
    errors: NDArray[float64],
    iterations: NDArray[int64],
    converged: NDArray[int64],
) -> None: ...
