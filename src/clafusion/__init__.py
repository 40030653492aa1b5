"""Fuse trained PyTorch networks of different depth and width into one, without training.

Start with :func:`fuse`. Options are in :class:`FusionConfig`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clafusion._native import build_info, gram, num_threads, set_num_threads
    from clafusion.alignment.dynamic_program import (
        LayerAlignment,
        LayerAlignmentBatch,
        align_layers,
        align_layers_batch,
    )
    from clafusion.alignment.layer_costs import cka, layer_costs, linear_cka
    from clafusion.alignment.models import AlignedModels
    from clafusion.assessment.evaluation import Evaluation, Score
    from clafusion.assessment.nearness import FusionAssessment, Nearness
    from clafusion.batch.results import PairResult
    from clafusion.batch.run import fuse_pairs
    from clafusion.batch.sweep import SweepPoint, SweepResult, sweep
    from clafusion.calibration.methods import Calibrated, calibrates
    from clafusion.config import (
        Alignment,
        Assessment,
        Assignment,
        Auto,
        AutoCalibration,
        Average,
        Barycentre,
        BatchNorm,
        Calibration,
        Dare,
        Deeper,
        Exact,
        FusionConfig,
        Iterative,
        LeastSquares,
        Like,
        ManyToOne,
        Matching,
        MergeConfig,
        MergeMethod,
        Merging,
        NoCalibration,
        Orthogonal,
        Profiling,
        ReassemblyConfig,
        Repair,
        Sensitivity,
        Shallower,
        Sinkhorn,
        Solver,
        Strategy,
        Target,
        TaskArithmetic,
        Ties,
        Unbalanced,
        Wider,
        Zip,
    )
    from clafusion.correspondence.correspondence import Correspondence, correspond
    from clafusion.correspondence.inserted import inserted_model
    from clafusion.errors import (
        AlignmentError,
        AssessmentWarning,
        ClafusionError,
        ConvergenceWarning,
        DivergenceError,
        FusionWarning,
        GraphVerificationError,
        InputError,
        PinnedWarning,
        StructureError,
        UnsupportedOpError,
        WidthWarning,
    )
    from clafusion.estimates import FusionEstimate, estimate
    from clafusion.fusion import align, fuse, profile
    from clafusion.interop.resolver import load
    from clafusion.matching.activation_costs import channel_cost
    from clafusion.merging.combination import Combination
    from clafusion.merging.mean import average
    from clafusion.merging.naive import naive_average
    from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
    from clafusion.one_origin.merge import merge
    from clafusion.one_origin.result import MergeResult
    from clafusion.profiling.profile import ModelProfile
    from clafusion.quality import evaluate
    from clafusion.reassembly.reassemble import reassemble
    from clafusion.reassembly.result import ReassemblyResult
    from clafusion.reports import explain, plot, summary
    from clafusion.results import FusionResult
    from clafusion.shared_trunk.result import SharedTrunkResult
    from clafusion.targets.target import chooses
    from clafusion.tracing.layer import Layer, Stream
    from clafusion.tracing.model import (
        ChannelGroup,
        GroupAxis,
        HeadPartition,
        PinnedChannels,
        TracedModel,
    )
    from clafusion.tracing.moves import permute_channels
    from clafusion.tracing.trace import trace
    from clafusion.tracing.verify import verify_graph
    from clafusion.training import TrainingResult, distill, finetune
    from clafusion.transport.plan import TransportPlan
    from clafusion.transport.sinkhorn import sinkhorn
    from clafusion.transport.solution import TransportSolution
    from clafusion.transport.solve import solve_transport
    from clafusion.weights.factories import ModelFile
    from clafusion.weights.state_files import save_model

__all__ = [
    "AlignedModels",
    "Alignment",
    "AlignmentError",
    "Assessment",
    "AssessmentWarning",
    "Assignment",
    "Auto",
    "AutoCalibration",
    "Average",
    "Barycentre",
    "BatchNorm",
    "Calibrated",
    "Calibration",
    "ChannelGroup",
    "ClafusionError",
    "Combination",
    "ConvergenceWarning",
    "Correspondence",
    "Dare",
    "Deeper",
    "DivergenceError",
    "Evaluation",
    "Exact",
    "FusionAssessment",
    "FusionConfig",
    "FusionEstimate",
    "FusionProblem",
    "FusionResult",
    "FusionWarning",
    "GraphVerificationError",
    "GroupAxis",
    "HeadPartition",
    "InputError",
    "Iterative",
    "Layer",
    "LayerAlignment",
    "LayerAlignmentBatch",
    "LeastSquares",
    "Like",
    "ManyToOne",
    "Matching",
    "MergeConfig",
    "MergeMethod",
    "MergeResult",
    "MergeWeights",
    "Merging",
    "ModelFile",
    "ModelProfile",
    "Nearness",
    "NoCalibration",
    "Orthogonal",
    "PairResult",
    "Parent",
    "PinnedChannels",
    "PinnedWarning",
    "Profiling",
    "ReassemblyConfig",
    "ReassemblyResult",
    "Repair",
    "Score",
    "Sensitivity",
    "Shallower",
    "SharedTrunkResult",
    "Sinkhorn",
    "Solver",
    "Strategy",
    "Stream",
    "StructureError",
    "SweepPoint",
    "SweepResult",
    "Target",
    "TaskArithmetic",
    "Ties",
    "TracedModel",
    "TrainingResult",
    "TransportPlan",
    "TransportSolution",
    "Unbalanced",
    "UnsupportedOpError",
    "Wider",
    "WidthWarning",
    "Zip",
    "__version__",
    "align",
    "align_layers",
    "align_layers_batch",
    "average",
    "build_info",
    "calibrates",
    "channel_cost",
    "chooses",
    "cka",
    "correspond",
    "distill",
    "estimate",
    "evaluate",
    "explain",
    "finetune",
    "fuse",
    "fuse_pairs",
    "gram",
    "inserted_model",
    "layer_costs",
    "linear_cka",
    "load",
    "merge",
    "naive_average",
    "num_threads",
    "permute_channels",
    "plot",
    "profile",
    "reassemble",
    "save_model",
    "set_num_threads",
    "sinkhorn",
    "solve_transport",
    "summary",
    "sweep",
    "trace",
    "verify_graph",
]

__version__: str
"""The version of the installed package."""

_PLACES = {
    "clafusion._native": "build_info gram num_threads set_num_threads",
    "clafusion.alignment.dynamic_program": """
        LayerAlignment LayerAlignmentBatch align_layers align_layers_batch
    """,
    "clafusion.alignment.layer_costs": "cka layer_costs linear_cka",
    "clafusion.alignment.models": "AlignedModels",
    "clafusion.assessment.evaluation": "Evaluation Score",
    "clafusion.assessment.nearness": "FusionAssessment Nearness",
    "clafusion.batch.results": "PairResult",
    "clafusion.batch.run": "fuse_pairs",
    "clafusion.batch.sweep": "SweepPoint SweepResult sweep",
    "clafusion.calibration.methods": "Calibrated calibrates",
    "clafusion.config": """
        Alignment Assessment Assignment Auto AutoCalibration Average Barycentre BatchNorm
        Calibration Dare Deeper Exact FusionConfig Iterative LeastSquares Like ManyToOne Matching
        MergeConfig MergeMethod Merging NoCalibration Orthogonal Profiling ReassemblyConfig Repair
        Sensitivity Shallower Sinkhorn Solver Strategy Target TaskArithmetic Ties Unbalanced Wider
        Zip
    """,
    "clafusion.correspondence.correspondence": "Correspondence correspond",
    "clafusion.correspondence.inserted": "inserted_model",
    "clafusion.errors": """
        AlignmentError AssessmentWarning ClafusionError ConvergenceWarning DivergenceError
        FusionWarning GraphVerificationError InputError PinnedWarning StructureError
        UnsupportedOpError WidthWarning
    """,
    "clafusion.estimates": "FusionEstimate estimate",
    "clafusion.fusion": "align fuse profile",
    "clafusion.interop.resolver": "load",
    "clafusion.matching.activation_costs": "channel_cost",
    "clafusion.merging.combination": "Combination",
    "clafusion.merging.mean": "average",
    "clafusion.merging.naive": "naive_average",
    "clafusion.merging.problem": "FusionProblem MergeWeights Parent",
    "clafusion.one_origin.merge": "merge",
    "clafusion.one_origin.result": "MergeResult",
    "clafusion.profiling.profile": "ModelProfile",
    "clafusion.quality": "evaluate",
    "clafusion.reassembly.reassemble": "reassemble",
    "clafusion.reassembly.result": "ReassemblyResult",
    "clafusion.reports": "explain plot summary",
    "clafusion.results": "FusionResult",
    "clafusion.shared_trunk.result": "SharedTrunkResult",
    "clafusion.targets.target": "chooses",
    "clafusion.tracing.layer": "Layer Stream",
    "clafusion.tracing.model": "ChannelGroup GroupAxis HeadPartition PinnedChannels TracedModel",
    "clafusion.tracing.moves": "permute_channels",
    "clafusion.tracing.trace": "trace",
    "clafusion.tracing.verify": "verify_graph",
    "clafusion.training": "TrainingResult distill finetune",
    "clafusion.transport.plan": "TransportPlan",
    "clafusion.transport.sinkhorn": "sinkhorn",
    "clafusion.transport.solution": "TransportSolution",
    "clafusion.transport.solve": "solve_transport",
    "clafusion.weights.factories": "ModelFile",
    "clafusion.weights.state_files": "save_model",
}
"""Module -> the public names that it has, as above. Each is imported when somebody asks for it."""

_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Return a public name, whose module is imported now, or ``__version__``."""
    if name in _MODULE_OF:
        found = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return found
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("clafusion")
        except PackageNotFoundError as error:
            raise AttributeError("clafusion is not installed, and so has no version") from error
    if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
