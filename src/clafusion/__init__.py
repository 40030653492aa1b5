"""Fuse trained PyTorch networks of different depth and width into one, without training."""

from clafusion.errors import (
    AlignmentError,
    ClafusionError,
    ConvergenceWarning,
    GraphVerificationError,
    InputError,
    StructureError,
    UnsupportedOpError,
)
from clafusion.layer_alignment import LayerAlignment, align_layers, align_layers_batch

__all__ = [
    "AlignmentError",
    "ClafusionError",
    "ConvergenceWarning",
    "GraphVerificationError",
    "InputError",
    "LayerAlignment",
    "StructureError",
    "UnsupportedOpError",
    "align_layers",
    "align_layers_batch",
]
