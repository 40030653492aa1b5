"""The machine's multiply-add peak, measured by a small compiled loop."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clafusion

# 16 independent sums of the widest vectors stay in registers: nothing but multiply-adds.
SOURCE = """
#if defined(__AVX512F__)
typedef float Vector __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef float Vector __attribute__((vector_size(32)));
#else
typedef float Vector __attribute__((vector_size(16)));
#endif
extern "C" double multiply_adds(long steps, float factor, float* result) {
  constexpr int kSums = 16 - 4 * (sizeof(Vector) < 64);
  Vector sums[kSums];
  const Vector f = Vector{} + factor;
  for (auto& one : sums) one = f;
  for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sums[j] = sums[j] * f + f;
  }
  for (const auto& one : sums) *result += one[0];
  return 2.0 * kSums * (sizeof(Vector) / 4) * steps;
}
"""


def multiply_add_peak() -> float:
    """Return the best of some runs on all of clafusion's threads, in operations a second."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(SOURCE)
        subprocess.run(
            ["c++", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True
        )
        spin = ctypes.CDLL(str(library)).multiply_adds
    spin.restype = ctypes.c_double
    spin.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.POINTER(ctypes.c_float)]
    count = clafusion.num_threads()

    def run(_: int) -> float:
        return float(spin(3_000_000, 0.5, ctypes.byref(ctypes.c_float())))

    rates = []
    with ThreadPoolExecutor(count) as threads:
        for _ in range(7):
            started = time.perf_counter()
            done = sum(threads.map(run, range(count)))
            rates.append(done / (time.perf_counter() - started))
    return max(rates)
