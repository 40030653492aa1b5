"""What the compiled module is, and with how many threads it computes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from clafusion import _core
from clafusion._native import cuda
from clafusion.errors import InputError

__all__ = ["build_info", "num_threads", "set_num_threads"]

_threads = os.environ.get("CLAFUSION_NUM_THREADS", "1")
if not (_threads.isdecimal() and int(_threads) > 0):
    raise InputError(f"CLAFUSION_NUM_THREADS must be a positive whole number; got {_threads!r}")


def build_info() -> dict[str, Any]:
    """Return what the compiled module is and what it uses on this machine.

    Returns
    -------
    dict
        ``compiler``; ``simd``: the instruction set chosen at run time (``"avx512"``, ``"avx2"``
        or ``"baseline"``); ``threads``: how many a kernel may use now; ``sanitized``: whether
        AddressSanitizer is built in; ``cuda``: whether CUDA kernels are; ``cuda_architectures``:
        the compute capabilities there is machine code for (``"80, 90"``), others get it from the
        driver; ``cuda_runtime``: the version of the CUDA runtime in it (``"13.0"``). Both are
        empty without CUDA kernels.
    """
    info = _core.build_info()
    info.update(cuda=cuda.module is not None, cuda_architectures="", cuda_runtime="")
    if cuda.module is not None:
        built = cuda.module.build_info()
        major, minor = built["runtime"] // 1000, built["runtime"] % 1000 // 10
        info.update(cuda_architectures=built["architectures"], cuda_runtime=f"{major}.{minor}")
    return info


def num_threads() -> int:
    """Return how many threads a kernel may use.

    It is what :func:`set_num_threads` said, else the environment variable
    ``CLAFUSION_NUM_THREADS`` at the first call, else the number of processors allowed to this
    process. Results do not depend on it.
    """
    return _core.num_threads()


def set_num_threads(count: int) -> None:
    """Set how many threads a kernel may use in this process; 0 returns to the default.

    Raises
    ------
    InputError
        ``count`` is not a whole number from 0 to 1024.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise InputError(f"count must be a whole number from 0 to 1024; got {count!r}")
    if not 0 <= count <= 1024:
        raise InputError(f"count must be from 0 (the default) to 1024; got {count}")
    _core.set_num_threads(int(count))
