"""Fuse trained PyTorch networks of different depth and width into one, without training."""

from clafusion._native import build_info, num_threads, set_num_threads
from clafusion.alignment.dynamic_program import (
    LayerAlignment,
    LayerAlignmentBatch,
    align_layers,
    align_layers_batch,
)
from clafusion.batch.run import PairResult, fuse_many
from clafusion.correspondence.correspondence import Correspondence, lift
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
from clafusion.fusion import AlignedPair, FusionConfig, FusionResult, align, fuse, profile
from clafusion.profiling.profile import ModelProfile
from clafusion.several import ModelsResult, fuse_models
from clafusion.tracing.model import (
    ChannelGroup,
    GroupAxis,
    HeadPartition,
    Layer,
    TracedModel,
    UnitedHeads,
)
from clafusion.tracing.trace import trace
from clafusion.tracing.verify import permute_channels, verify_graph
from clafusion.training.training import TrainingResult, distill, finetune
from clafusion.weights.files import ModelFile

__all__ = [
    "AlignedPair",
    "AlignmentError",
    "ChannelGroup",
    "ClafusionError",
    "ConvergenceWarning",
    "Correspondence",
    "DivergenceError",
    "FusionConfig",
    "FusionResult",
    "FusionWarning",
    "GraphVerificationError",
    "GroupAxis",
    "HeadPartition",
    "InputError",
    "Layer",
    "LayerAlignment",
    "LayerAlignmentBatch",
    "ModelFile",
    "ModelProfile",
    "ModelsResult",
    "PairResult",
    "StructureError",
    "TracedModel",
    "TrainingResult",
    "UnitedHeads",
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
