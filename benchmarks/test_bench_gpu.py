"""The rows of ``gpu_rows``, small and on the CPU: answers agree and notes are written."""

import pytest
import torch

from benchmarks import gpu_rows
from benchmarks.row import measure

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpu_rows.sinkhorn_row(CPU, 3, 20, "sinkhorn", 1, share=2),
        lambda: gpu_rows.sinkhorn_row(CPU, 3, 20, "sinkhorn_log", 1),
        lambda: gpu_rows.sinkhorn_row(CPU, 3, 20, "batch", 1, bandwidth=1e10),
        lambda: gpu_rows.cka_row(CPU, 8, 1),
        lambda: gpu_rows.assignment_row(CPU, 2, 20, 1),
    ],
)
def test_gpu_rows(make):
    found = measure(make(), seconds=0, least=1)
    assert found.runs == 1
    assert found.ratio > 0


def test_the_row_of_ott():
    pytest.importorskip("ott", reason="ott-jax is not installed")
    assert (
        measure(gpu_rows.sinkhorn_row(CPU, 3, 20, "ott-jax vmap", 1), seconds=0, least=1).ratio > 0
    )


def test_small_problems():
    gpu_rows.run_small(CPU)
