"""Which function does which calibration. Add one of your own by :func:`calibrates`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from clafusion.calibration.batchnorm import reset_batchnorm
from clafusion.calibration.least_squares import regress_anchored
from clafusion.calibration.output_layer import refit_output_layer
from clafusion.calibration.outputs import KnownOutputs, is_exact
from clafusion.calibration.repair import moment_goals, repair
from clafusion.calibration.scales import with_equal_scales
from clafusion.config import BatchNorm, Calibration, LeastSquares, NoCalibration, Repair
from clafusion.errors import FusionWarning, InputError, warn
from clafusion.execution.call import State
from clafusion.merging.mean import average
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data, Progress
from clafusion.tracing.operations import affine_operands

__all__ = ["Calibrated", "Method", "calibrate", "calibrates"]


@dataclass(frozen=True)
class Calibrated:
    """A calibrated network.

    Attributes
    ----------
    model
        The network.
    anchor
        See :class:`clafusion.FusionResult`; None for calibrations that have none.
    averaged
        The names of the weights that several parents have and the calibration left at the average.
    toward
        The name of the parent towards which the interior leans; None where there is no anchor.
    outputs
        Inputs on which the network ran as it is now, and what it put out; empty where that is not
        known.
    """

    model: nn.Module
    anchor: float | None = None
    averaged: tuple[str, ...] = ()
    toward: str | None = None
    outputs: KnownOutputs = ()


_MOST_KEPT = 1 << 25  # numbers of outputs


Method: TypeAlias = Callable[..., "Calibrated | Mapping[str, Tensor]"]
"""``(problem, data, settings, *, seed, progress)`` -> the calibrated state, or what it became."""

_METHODS: dict[type[Calibration], Method] = {}


def calibrates(settings: type[Calibration]) -> Callable[[Method], Method]:
    """Register the function that does a calibration with settings of this type.

    It is called as ``function(problem, data, settings, seed=..., progress=...)`` and returns the
    state of the fused network, or a :class:`Calibrated`. The mean of the parents is
    :func:`clafusion.merging.mean.average` of the problem.
    """

    def register(function: Method) -> Method:
        _METHODS[settings] = function
        return function

    return register


def calibrate(
    problem: FusionProblem,
    data: Data,
    settings: Calibration,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibrated:
    """Average the parents and calibrate the mean.

    Raises
    ------
    InputError
        No function is registered for the settings.
    """
    method = _METHODS.get(type(settings))
    if method is None:
        raise InputError(
            f"no function does the calibration {settings.name!r}: register one by "
            "clafusion.calibrates"
        )
    outcome = method(problem, data, settings, seed=seed, progress=progress)
    if isinstance(outcome, Calibrated):
        return outcome
    return Calibrated(_built(problem, outcome))


def _built(problem: FusionProblem, state: State) -> nn.Module:
    return problem.storage.model(problem.target.model, state, problem.target.aliases)


@calibrates(NoCalibration)
def _plain_mean(problem: FusionProblem, *_: Any, **__: Any) -> State:
    return average(problem)


@calibrates(BatchNorm)
def _batchnorm(problem: FusionProblem, data: Data, *_: Any, **__: Any) -> Calibrated:
    model = _built(problem, average(problem))
    reset_batchnorm(model, data, problem.target.example_inputs, problem.target.keywords)
    return Calibrated(model)


@calibrates(Repair)
def _repair(
    problem: FusionProblem,
    data: Data,
    *_: Any,
    progress: Progress | None = None,
    **__: Any,
) -> Calibrated:
    problem = with_equal_scales(problem)
    plain = average(problem)
    if is_exact(problem, plain, data):  # the mean of outputs varies less than either of them
        return Calibrated(_built(problem, plain))
    goals = moment_goals(problem)
    outputs: list[tuple[tuple[Tensor, ...], list[Tensor]]] = []
    kept = 0

    def observe(inputs: tuple[Tensor, ...], found: list[Tensor]) -> None:
        nonlocal kept
        kept += sum(one.numel() for one in found)
        if kept <= _MOST_KEPT:
            outputs.append((inputs, found))

    is_plain = not problem.target.types  # half precision rounds what is built of the parameters
    state = repair(
        problem.target,
        plain,
        data,
        goals,
        progress=progress,
        observe=observe if is_plain else None,
    )
    return Calibrated(
        _built(problem, state),
        averaged=_averaged(problem, _rescaled(problem, goals.overall)),
        outputs=tuple(outputs),
    )


@calibrates(LeastSquares)
def _least_squares(
    problem: FusionProblem,
    data: Data,
    settings: LeastSquares,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibrated:
    found = regress_anchored(problem, data, settings, seed=seed, progress=progress)
    if problem.combination.means == "probabilities":
        why = refit_output_layer(problem, found.state, data, settings, seed=seed)
        if why is not None and problem.combination.is_asked_for:
            warn(
                "the last layer is not refitted to the parents' mean of probabilities, for "
                f"{why}: it aims at the mean of their logits",
                FusionWarning,
            )
    return Calibrated(
        _built(problem, found.state),
        found.anchor,
        _averaged(problem, found.solved),
        found.toward,
    )


def _rescaled(problem: FusionProblem, goals: Collection[str]) -> set[str]:
    """Return the parameters whose outputs REPAIR rescales: those with goals."""
    target = problem.target
    nodes = {node.name: node for node in target.module.graph.nodes}
    found = set()
    for point in (point for layer in target.layers for point in layer.calibration_points):
        if point.node in goals:
            found.add(point.weight)
            if point.affine is not None:  # whose outputs a BatchNorm rescales
                kernel = affine_operands(nodes[point.affine])["weight"]
                found.add(target.entries.get(kernel, point.weight))
    return found


def _averaged(problem: FusionProblem, calibrated: Collection[str]) -> tuple[str, ...]:
    """Return the weights that several parents have and that are not among the calibrated ones.

    A weight is a parameter of two or more axes: of a layer, or a table.
    """
    state = problem.target.state()
    names = dict.fromkeys(name for one in problem.target.layers for name in one.parameters)
    return tuple(
        name
        for name in names
        if name not in calibrated
        and state[name].dim() > 1
        and sum(one.correspondence.origins[name] == "matched" for one in problem.parents) > 1
    )
