"""The exceptions that clafusion raises on purpose.

Each message names what was found, where, and what to do about it.
"""

import sys
import warnings

__all__ = [
    "AlignmentError",
    "AssessmentWarning",
    "ClafusionError",
    "ConvergenceWarning",
    "DivergenceError",
    "FusionWarning",
    "GraphVerificationError",
    "InputError",
    "PinnedWarning",
    "StructureError",
    "UnsupportedOpError",
    "WidthWarning",
    "kind_of",
    "retold",
    "warn",
]


class ClafusionError(Exception):
    """Base of every error that clafusion raises on purpose."""


class InputError(ClafusionError, ValueError):
    """An argument, a file or a batch of data is not what the function needs."""


class UnsupportedOpError(ClafusionError, NotImplementedError):
    """The channel analysis has no rule for an operation of the model."""


class GraphVerificationError(ClafusionError):
    """Permuting a channel group changed the model's output: the analysis was wrong."""


class StructureError(ClafusionError, ValueError):
    """Two models (or two layers) cannot be brought to one structure."""


class AlignmentError(ClafusionError, ValueError):
    """No alignment of the layers exists under the given costs and constraints.

    Attributes
    ----------
    reached_deep, reached_shallow
        How many leading layers of each network the search could use up before it was stuck.
    """

    def __init__(self, message: str, reached_deep: int = 0, reached_shallow: int = 0) -> None:
        super().__init__(message)
        self.reached_deep = reached_deep
        self.reached_shallow = reached_shallow


def kind_of(value: object) -> str:
    """Return what an error calls something that is no network, and where the network in it is.

    What clafusion returns has its network as ``model``.
    """
    kind = type(value).__name__
    inner = getattr(value, "model", None)
    holds_one = hasattr(inner, "state_dict") and not hasattr(value, "state_dict")
    return f"{kind}: give its .model" if holds_one else kind


def retold(error: ClafusionError, message: str) -> ClafusionError:
    """Return an error with another message, and all else as it was."""
    error.args = (message, *error.args[1:])
    return error


class DivergenceError(ClafusionError, ArithmeticError):
    """Training was stopped because the loss is no longer finite.

    Attributes
    ----------
    step
        The optimizer step (from 0) whose loss it was.
    """

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class FusionWarning(UserWarning):
    """Base of every warning that clafusion gives about a result."""


class AssessmentWarning(FusionWarning):
    """A parent alone comes clearly nearer to what all put out together than the result does."""


class ConvergenceWarning(FusionWarning):
    """An iterative solver stopped before it reached its tolerance."""


class PinnedWarning(FusionWarning):
    """Channels keep their places, although other places might do as well.

    They are averaged as they stand: see ``TracedModel.pinned`` and ``TracedModel.unreached``.
    """


class WidthWarning(FusionWarning):
    """What a network computes is not kept in the result's numbers of channels.

    Channels that differ in number are counted, not weighed, so that copies of one add up (see
    ``ChannelGroup.is_counted``); the result has fewer heads of queries; the only network that
    has weight has widths of which the result's are no multiples; or a wider result has no places
    of their own for some channels, or a norm that spans both networks' channels.
    """


def warn(message: str, category: type[Warning]) -> None:
    """Give a warning that points at the line that called clafusion, however deep it arose."""
    level = 2
    frame = sys._getframe(1)
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").split(".")[0] == "clafusion"
    ):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)
