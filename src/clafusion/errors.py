"""The exceptions that clafusion raises on purpose.

Each message names what was found, where, and what to do about it.
"""

import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence

__all__ = [
    "AlignmentError",
    "AssessmentWarning",
    "ClafusionError",
    "ConvergenceWarning",
    "DataError",
    "DivergenceError",
    "FusionWarning",
    "GraphVerificationError",
    "InputError",
    "PinnedWarning",
    "StructureError",
    "UnsupportedOpError",
    "WidthWarning",
    "check_callable",
    "check_listed",
    "check_type",
    "is_number_in_array",
    "kind_of",
    "retold",
    "warn",
]


class ClafusionError(Exception):
    """Base of every error that clafusion raises on purpose."""


class InputError(ClafusionError, ValueError):
    """An argument, a file or a batch of data is not what the function needs."""


class DataError(InputError):
    """A batch of data is not what the models take, whatever the options are."""


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


def check_callable(value: object, argument: str, given: Sequence[str]) -> None:
    """Refuse what cannot be called with the arguments ``given``; None stands for no function.

    Raises
    ------
    InputError
        The message calls the value ``argument``, and names the arguments that it has to take.
    """
    if value is None:
        return
    wanted = f"{argument} must be None or a function of ({', '.join(given)})"
    if not callable(value):
        raise InputError(f"{wanted}; got {kind_of(value)}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # code that is not Python's own may have none
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        called = getattr(value, "__qualname__", type(value).__name__)
        raise InputError(f"{wanted}; {called} takes {signature}") from error


def is_number_in_array(value: object) -> bool:
    """Say whether an array or a tensor is a single number: it has a length by name only."""
    return getattr(value, "ndim", None) == 0


def check_listed(value: object, argument: str, wanted: str) -> None:
    """Refuse what holds no values in order; the message says which list is wanted.

    Raises
    ------
    InputError
        It is no list, tuple, array or tensor.
    """
    is_list = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if is_number_in_array(value) or not is_list or isinstance(value, (str, bytes, Mapping, type)):
        raise InputError(f"{argument} must be {wanted}; got {kind_of(value)}")


def check_type(value: object, kind: type | tuple[type, ...], argument: str, wanted: str) -> None:
    """Refuse what is of another type; the message calls it ``argument``, and says what is wanted.

    Raises
    ------
    InputError
        It is of another type.
    """
    if not isinstance(value, kind):
        raise InputError(f"{argument} must be {wanted}; got {kind_of(value)}")


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
