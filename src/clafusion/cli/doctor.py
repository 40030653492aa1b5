"""``clafusion doctor``: what is installed, and why a GPU is used or not."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from clafusion.cli.parameters import AsJson
from clafusion.cli.show import print_json, print_line

__all__ = ["doctor_command"]


def doctor_command(as_json: AsJson = False) -> None:
    """Show what is installed, and whether and why a GPU is used or not."""
    facts = _installation()
    if as_json:
        print_json(facts)
        return
    cuda = "none in this build"
    if facts["cuda"]:
        cuda = f"for GPUs {facts['cuda_architectures']}, CUDA runtime {facts['cuda_runtime']}"
    print_line("clafusion", f"{facts['clafusion']}, Python {facts['python']}")
    print_line("PyTorch", f"{facts['torch']}, CUDA {facts['torch_cuda'] or 'not built in'}")
    print_line("CPU kernels", f"{facts['compiler']}, {facts['simd']}, threads {facts['threads']}")
    print_line("CUDA kernels", cuda)
    print_line("GPUs", ", ".join(facts["gpus"]) or "none usable")
    print_line("device=cuda", "works" if facts["cuda_usable"] else "; ".join(facts["cuda_reasons"]))


def _installation() -> dict[str, Any]:
    import torch

    from clafusion._native import build_info, cuda_devices

    gpus, reason = cuda_devices()
    reasons = []
    if torch.version.cuda is None:
        reasons.append("PyTorch is built without CUDA: install a build with it")
    elif not torch.cuda.is_available():
        reasons.append("PyTorch finds no GPU: check the driver with nvidia-smi")
    if reason:
        reasons.append(f"clafusion's kernels: {reason}")
    return {
        "clafusion": importlib.metadata.version("clafusion"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        **build_info(),
        "gpus": gpus,
        "cuda_usable": not reasons,
        "cuda_reasons": reasons,
    }
