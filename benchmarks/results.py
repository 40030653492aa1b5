"""Where a benchmark's figures go: benchmarks/results/NAME.json, with the versions they hold for."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import clafusion


def write_results(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures of one benchmark, whole or not at all."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": clafusion.num_threads(),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"about": about, **figures}, indent=2) + "\n")
    temporary.replace(path)
    print(f"written to {path}")
    return path
