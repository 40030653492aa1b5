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
from clafusion.graph import ChannelClass, ModelGraph, Slot, Unit
from clafusion.layer_alignment import LayerAlignment, align_layers, align_layers_batch
from clafusion.trace import trace
from clafusion.verification import permute_channels, verify_graph

__all__ = [
    "AlignmentError",
    "ChannelClass",
    "ClafusionError",
    "ConvergenceWarning",
    "GraphVerificationError",
    "InputError",
    "LayerAlignment",
    "ModelGraph",
    "Slot",
    "StructureError",
    "Unit",
    "UnsupportedOpError",
    "align_layers",
    "align_layers_batch",
    "permute_channels",
    "trace",
    "verify_graph",
]
