"""The GPU's inner loops, compiled for the host."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [
    Path(__file__).with_name("sinkhorn_block.cpp"),
    CSRC / "sinkhorn/cuda/launch_plan.cpp",
    CSRC / "sinkhorn/validation.cpp",
]
ADDRESS, SIZE, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    library = tmp_path_factory.mktemp("block") / "block.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    flags += os.environ.get("CXXFLAGS", "").split()
    subprocess.run([compiler, *flags, f"-I{CSRC}", "-o", library, *SOURCES], check=True)
    found = ctypes.CDLL(str(library))
    found.solve.restype = found.plan.restype = ctypes.c_bool
    found.solve.argtypes = [
        *[ctypes.c_bool] * 2,
        *[ctypes.c_int] * 3,
        *[ADDRESS, SIZE, SIZE, ADDRESS, ADDRESS, ADDRESS],
        *[REAL, REAL, SIZE, REAL],
        *[ADDRESS] * 7,
    ]
    found.plan.argtypes = [SIZE, SIZE, SIZE, ctypes.c_int, ADDRESS]
    return found
