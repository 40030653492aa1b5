"""The only importer of the compiled modules: checks, allocates the outputs, calls.

A function here takes what Python has (arrays, tensors), makes it what the kernel needs
(dtype, contiguity), allocates every output and returns it. The kernels neither allocate
results nor see torch.
"""

from clafusion._native.activations import channel_moments, gram, hsic_all_pairs, scale_channels
from clafusion._native.alignment import align_equal_layers, align_layers
from clafusion._native.build import build_info, num_threads, set_num_threads
from clafusion._native.cuda import (
    CONVERGED,
    NOT_FINITE,
    DeviceSinkhorn,
    cuda_devices,
    sinkhorn_on_device,
)
from clafusion._native.selection import keep_lower, lose_channels
from clafusion._native.transport import assign, sinkhorn

__all__ = [
    "CONVERGED",
    "NOT_FINITE",
    "DeviceSinkhorn",
    "align_equal_layers",
    "align_layers",
    "assign",
    "build_info",
    "channel_moments",
    "cuda_devices",
    "gram",
    "hsic_all_pairs",
    "keep_lower",
    "lose_channels",
    "num_threads",
    "scale_channels",
    "set_num_threads",
    "sinkhorn",
    "sinkhorn_on_device",
]
