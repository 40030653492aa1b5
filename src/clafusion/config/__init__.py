"""Every option of clafusion, once: its name, type, default, choices and one line of help.

Python keywords, ``config=``, the command line's options, manifests, cache keys and the reference
page are all made from here. This package imports no stage. Each module has the options of one
stage, and is called as the package that reads them. To add an option, add one field.

Options that only make sense together are one value: a solver carries its own regularisation, a
calibration its own settings, a target its own widths. Where a value has variants (a *family*), each
variant is a class; its name is what a string, a manifest or the command line calls it. Subclassing
``Calibration`` or ``Target`` adds a variant, also from outside of this package.
"""

from clafusion.config.alignment import ALIGNMENT_MODES, LAYER_COSTS, Alignment
from clafusion.config.assessment import ASSESSED_OUTPUTS, Assessment
from clafusion.config.calibration import (
    LEANS,
    AutoCalibration,
    BatchNorm,
    Calibration,
    LeastSquares,
    NoCalibration,
    Repair,
)
from clafusion.config.fusion import COMBINATIONS, OUTPUTS, FusionConfig
from clafusion.config.matching import (
    CHANNEL_COSTS,
    GRAPH_ROWS,
    IMPORTANCES,
    Assignment,
    Auto,
    Exact,
    Matching,
    Orthogonal,
    Sinkhorn,
    Solver,
    Unbalanced,
    Zip,
)
from clafusion.config.merging import (
    LAYER_WEIGHTS,
    NORMALISATIONS,
    Barycentre,
    Iterative,
    ManyToOne,
    Merging,
    Strategy,
)
from clafusion.config.one_origin import (
    Average,
    Dare,
    MergeConfig,
    MergeMethod,
    Sensitivity,
    TaskArithmetic,
    Ties,
)
from clafusion.config.profiling import LAYER_VALUES, Profiling
from clafusion.config.reassembly import REASSEMBLY_COMBINATIONS, ReassemblyConfig
from clafusion.config.targets import MERGES, WIDTHS, Deeper, Like, Shallower, Target, Wider
from clafusion.settings import (
    Choices,
    Option,
    Settings,
    choice,
    count,
    flag,
    nested,
    number,
    options_of,
    text,
)

__all__ = [
    "ALIGNMENT_MODES",
    "ASSESSED_OUTPUTS",
    "CHANNEL_COSTS",
    "COMBINATIONS",
    "GRAPH_ROWS",
    "IMPORTANCES",
    "LAYER_COSTS",
    "LAYER_VALUES",
    "LAYER_WEIGHTS",
    "LEANS",
    "MERGES",
    "NORMALISATIONS",
    "OUTPUTS",
    "REASSEMBLY_COMBINATIONS",
    "WIDTHS",
    "Alignment",
    "Assessment",
    "Assignment",
    "Auto",
    "AutoCalibration",
    "Average",
    "Barycentre",
    "BatchNorm",
    "Calibration",
    "Choices",
    "Dare",
    "Deeper",
    "Exact",
    "FusionConfig",
    "Iterative",
    "LeastSquares",
    "Like",
    "ManyToOne",
    "Matching",
    "MergeConfig",
    "MergeMethod",
    "Merging",
    "NoCalibration",
    "Option",
    "Orthogonal",
    "Profiling",
    "ReassemblyConfig",
    "Repair",
    "Sensitivity",
    "Settings",
    "Shallower",
    "Sinkhorn",
    "Solver",
    "Strategy",
    "Target",
    "TaskArithmetic",
    "Ties",
    "Unbalanced",
    "Wider",
    "Zip",
    "choice",
    "count",
    "flag",
    "nested",
    "number",
    "options_of",
    "text",
]
