"""Parameters that no operation on the example inputs reads: they are in no layer of any network.

An optional input, a branch for longer inputs, a head for training and other methods of a module
have such. Nothing says which channels they read, so they cannot be matched: the result has those of
its structure's module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.alignment.models import label
from clafusion.errors import FusionWarning, warn
from clafusion.merging.problem import FusionProblem, Parent

__all__ = ["left_out_parameters", "warn_of_left_out"]

_SHOWN = 4


def left_out_parameters(problem: FusionProblem) -> tuple[str, ...]:
    """Return the unread parameters of which the result does not have what all parents have.

    Those of the target that some parent with a weight has not, or with other values; then those of
    such parents that the target has not.
    """
    target, state = problem.target, problem.target.state()
    weighed = [one for one in problem.parents if one.weights.overall > 0]
    own = [
        name
        for name in target.unread
        if not all(_has_equal(one, name, state[name]) for one in weighed)
    ]
    others = [name for one in weighed for name in one.traced.unread if name not in state]
    return tuple(dict.fromkeys([*own, *others]))


def _has_equal(parent: Parent, name: str, value: Tensor) -> bool:
    """Say whether a parent has an entry of this name and these values, and reads it nowhere."""
    source = parent.traced
    if name not in source.unread:
        return False
    other = source.state()[name]
    if other.shape != value.shape:
        return False
    return torch.allclose(value, other.to(value), rtol=0.0, atol=0.0, equal_nan=True)


def warn_of_left_out(problem: FusionProblem, names: Sequence[str]) -> None:
    """Warn of what :func:`left_out_parameters` returned.

    Warns
    -----
    FusionWarning
        The message names the parameters, and whose values the result has.
    """
    if not names:
        return
    target, state = problem.target, problem.target.state()
    own = [name for name in names if name in state]
    givers = [
        label(one.name)
        for one in problem.parents
        if own and all(_has_equal(one, name, state[name]) for name in own if name in target.unread)
    ]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    kept = "those of " + givers[0] if givers else "those of the module of its structure"
    outcome = f"has {kept}" if own else "has none of them"
    warn(
        f"nothing that the example inputs reach reads {', '.join(map(repr, names[:_SHOWN]))}{more} "
        "(of an optional input, a branch for other inputs, a head for training or another "
        f"method?): they cannot be matched, and the result {outcome}. What reads them is not "
        "fused. Give example_inputs as the model is used with, or do not use it in the result",
        FusionWarning,
    )
