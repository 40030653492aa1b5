"""The rows of ``layer_rows`` under pytest-benchmark: ``pytest benchmarks --benchmark-enable``."""

import pytest

from benchmarks.layer_rows import MAKERS


@pytest.mark.parametrize("side", ["peer", "ours"])
@pytest.mark.parametrize("make", MAKERS)
def test_layers(benchmark, make, side):
    row = make()
    benchmark.group = row.name
    answer = benchmark(getattr(row, side))
    if side == "ours":
        row.check(row.peer(), answer)
