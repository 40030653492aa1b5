"""Fuse trained PyTorch networks of different depth and width into one, without training."""

from clafusion._native import build_info, num_threads, set_num_threads
from clafusion.checkpoints import ModelFile
from clafusion.depth import Lifting, lift
from clafusion.errors import (
    AlignmentError,
    ClafusionError,
    ConvergenceWarning,
    DivergenceError,
    FusionWarning,
    GraphVerificationError,
    InputError,
    StructureError,
    UnsupportedOpError,
    WidthWarning,
)
from clafusion.graph import ChannelBlocks, ChannelClass, ModelGraph, Slot, Unit, UnitedBlocks
from clafusion.layer_alignment import (
    LayerAlignment,
    LayerAlignmentBatch,
    align_layers,
    align_layers_batch,
)
from clafusion.many import PairResult, fuse_many
from clafusion.pipeline import AlignedPair, FusionConfig, FusionResult, align, fuse, profile
from clafusion.several import ModelsResult, fuse_models
from clafusion.signatures import Signature
from clafusion.trace import trace
from clafusion.training import TrainingResult, distill, finetune
from clafusion.verification import permute_channels, verify_graph

__all__ = [
    "AlignedPair",
    "AlignmentError",
    "ChannelBlocks",
    "ChannelClass",
    "ClafusionError",
    "ConvergenceWarning",
    "DivergenceError",
    "FusionConfig",
    "FusionResult",
    "FusionWarning",
    "GraphVerificationError",
    "InputError",
    "LayerAlignment",
    "LayerAlignmentBatch",
    "Lifting",
    "ModelFile",
    "ModelGraph",
    "ModelsResult",
    "PairResult",
    "Signature",
    "Slot",
    "StructureError",
    "TrainingResult",
    "Unit",
    "UnitedBlocks",
    "UnsupportedOpError",
    "WidthWarning",
    "align",
    "align_layers",
    "align_layers_batch",
    "build_info",
    "distill",
    "finetune",
    "fuse",
    "fuse_many",
    "fuse_models",
    "lift",
    "num_threads",
    "permute_channels",
    "profile",
    "set_num_threads",
    "trace",
    "verify_graph",
]
