"""The rows of ``transport_rows``: ``pytest benchmarks --benchmark-enable``."""

import pytest

from benchmarks.transport_rows import MAKERS


@pytest.mark.parametrize("side", ["peer", "ours"])
@pytest.mark.parametrize("make", MAKERS)
def test_transport(benchmark, make, side):
    row = make()
    benchmark.group = row.name
    answer = benchmark(getattr(row, side))
    if side == "ours":
        row.check(row.peer(), answer)
