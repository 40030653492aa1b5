"""The same models fused by every combination of settings: quality over weights, and its spread."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from clafusion.alignment.models import AlignedModels
from clafusion.assessment.evaluation import Evaluation, checked_labels
from clafusion.assessment.nearness import FusionAssessment
from clafusion.assessment.output_cache import OutputCache
from clafusion.batch.grid import GridPoint, grid_of
from clafusion.batch.run import PAIR_PROGRESS, PairProgress
from clafusion.config import Barycentre, FusionConfig, Iterative, Like
from clafusion.errors import (
    AssessmentWarning,
    ClafusionError,
    DataError,
    InputError,
    check_callable,
    is_number_in_array,
    warn,
)
from clafusion.fusion import align, fuse, fuse_aligned
from clafusion.interop.inputs import readable
from clafusion.interop.vocabulary import check_alike
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data
from clafusion.quality import hash_of
from clafusion.results import RESULT, FusionResult
from clafusion.stages import (
    ExampleInputs,
    merge_weights,
    named_models,
    needs_moments,
    placed,
    profile_options,
    traced_template,
)
from clafusion.table import Table
from clafusion.weights.factories import Model

__all__ = ["SweepPoint", "SweepResult", "sweep", "sweep_grid"]

_QUALITIES = ("accuracy", "loss", "agreement", "distance")
_LESS_IS_BETTER = ("loss", "distance")


@dataclass(frozen=True)
class SweepPoint:
    """One fusion of a sweep.

    Attributes
    ----------
    chosen
        What varies -> its value here: ``weight`` or ``weights``, paths of options, ``seed``.
    config, weights
        The options and the models' weights.
    assessment, evaluation
        As in ``FusionResult``; None after an error.
    seconds
        How long it took, without what it shares with others.
    error
        Why it could not be fused; else None.
    """

    chosen: Mapping[str, Any]
    config: FusionConfig
    weights: tuple[float, ...]
    assessment: FusionAssessment | None
    evaluation: Evaluation | None
    seconds: float
    error: str | None = None

    def __repr__(self) -> str:
        near = "failed" if self.assessment is None else str(self.assessment.result)
        return f"<SweepPoint {_shown(self.chosen)}: {self.evaluation or near}>"

    def quality(self, name: str) -> float | None:
        """Return the result's ``"accuracy"``, ``"loss"``, ``"agreement"`` or ``"distance"``."""
        if name in ("accuracy", "loss"):
            score = None if self.evaluation is None else self.evaluation.scores[RESULT]
            found = None if score is None else getattr(score, name)
        else:
            near = None if self.assessment is None else self.assessment.result
            found = None if near is None else getattr(near, name)
        return found


@dataclass(frozen=True)
class SweepResult:
    """What :func:`sweep` returns.

    Attributes
    ----------
    points
        All fusions, in the order of the grid.
    axes
        What varies, in order.
    """

    points: tuple[SweepPoint, ...]
    axes: tuple[str, ...]

    def __repr__(self) -> str:
        failed = sum(one.error is not None for one in self.points)
        told = f", {failed} failed" if failed else ""
        over = f" over {', '.join(self.axes)}" if self.axes else ""
        return f"<SweepResult of {len(self.points)} fusions{over}{told}>"

    def _repr_html_(self) -> str:
        return self.summary._repr_html_()

    @property
    def quality(self) -> str:
        """By what results are compared: accuracy with labels, else agreement, else distance."""
        order = ("accuracy", "loss", "agreement")
        return next((name for name in order if self._is_known(name)), "distance")

    def _is_known(self, name: str) -> bool:
        return any(one.quality(name) is not None for one in self.points)

    @property
    def table(self) -> Table:
        """One row for each fusion."""
        rows = [
            (
                *(one.chosen.get(axis) for axis in self.axes),
                *(one.quality(name) for name in _QUALITIES),
                one.seconds,
                one.error,
            )
            for one in self.points
        ]
        return Table.of((*self.axes, *_QUALITIES, "seconds", "error"), rows)

    @property
    def summary(self) -> Table:
        """One row for each combination: mean and standard deviation over the seeds."""
        axes = [one for one in self.axes if one != "seed"]
        groups: dict[str, list[SweepPoint]] = {}
        for one in self.points:
            key = json.dumps([one.chosen.get(axis) for axis in axes], default=str)
            groups.setdefault(key, []).append(one)
        known = [name for name in _QUALITIES if self._is_known(name)]
        columns = [part for name in known for part in (name, f"{name} sd")]
        rows = []
        for same in groups.values():
            cells: list[Any] = [same[0].chosen.get(axis) for axis in axes]
            for name in known:
                values = [value for one in same if (value := one.quality(name)) is not None]
                cells.append(statistics.fmean(values) if values else None)
                cells.append(statistics.stdev(values) if len(values) > 1 else None)
            rows.append((*cells, len(same), sum(one.error is not None for one in same) or None))
        return Table.of((*axes, *columns, "seeds", "failed"), rows)

    @property
    def best(self) -> SweepPoint:
        """The fusion of the best quality.

        Raises
        ------
        InputError
            None was fused and compared.
        """
        name = self.quality
        sign = -1 if name in _LESS_IS_BETTER else 1
        known = [one for one in self.points if one.quality(name) is not None]
        if not known:
            raise InputError("no fusion of the sweep has a quality: see the errors in its table")
        return max(known, key=lambda one: sign * (one.quality(name) or 0.0))

    def to_csv(self, path: Any = None) -> str:
        """Return :attr:`table` as CSV; with ``path`` write it there, too."""
        return self.table.to_csv(path)

    def to_frame(self) -> Any:
        """Return :attr:`table` as a ``pandas.DataFrame``; errors are those of ``Table``."""
        return self.table.to_frame()


def sweep(
    models: Sequence[Model] | Mapping[str, Model],
    data: Data,
    config: FusionConfig | None = None,
    *,
    weight: Sequence[float] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    seeds: int | Sequence[int] | None = None,
    labels: Any = None,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    progress: PairProgress | None = None,
    **settings: Any,
) -> SweepResult:
    """Fuse the same models by every combination of settings.

    Tracing, profiles, alignments and plans are shared where the settings allow: fusions that differ
    in weights and calibration only are aligned and matched once for each seed. Each point gives
    what :func:`clafusion.fuse` gives with its settings. A point that fails says why, and the others
    go on; data that no settings could make usable end the sweep at its first point.

    Parameters
    ----------
    models, data, config, labels, example_inputs, device
        As for :func:`clafusion.fuse`.
    weight
        Of two models: weights of the first one, from 0 to 1; the second has the rest.
    weights
        Of any number: lists of all models' weights.
    seeds
        How many seeds, from 0 on, or a list of them; default that of ``config``.
    progress
        Called with the numbers of fusions that are done and of all.
    settings
        As for :func:`clafusion.fuse`; a list, at any depth, stands for several values:
        ``calibration=["repair", "least_squares"]``, ``matching={"cost": ["correlation",
        "weights"]}``.

    Raises
    ------
    InputError
        An argument is unusable; or a batch of data is, as one with NaN.

    Examples
    --------
    >>> found = clafusion.sweep([a, b], images, weight=[0, 0.5, 1], seeds=5)  # doctest: +SKIP
    >>> clafusion.plot(found, "sweep.png")  # doctest: +SKIP
    """
    return sweep_grid(
        models,
        data,
        grid_of(config, settings),
        weight=weight,
        weights=weights,
        seeds=seeds,
        labels=labels,
        example_inputs=example_inputs,
        device=device,
        progress=progress,
    )


def sweep_grid(
    models: Sequence[Model] | Mapping[str, Model],
    data: Data,
    grid: Sequence[GridPoint],
    *,
    weight: Sequence[float] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    seeds: int | Sequence[int] | None = None,
    labels: Any = None,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    progress: PairProgress | None = None,
) -> SweepResult:
    """Do what :func:`sweep` does, for a grid of settings."""
    check_callable(progress, "progress", PAIR_PROGRESS)
    named = named_models(models)
    by_name = _weights(weight, weights, tuple(named))
    count = _seeds(seeds)
    data = readable(data, named)
    known = None if labels is None else checked_labels(labels, data)
    check_alike(named)
    named, example_inputs = placed(named, data, example_inputs, device)
    runs = [
        (
            {**shown, **point.chosen, **({} if seed is None else {"seed": seed})},
            point.config if seed is None else replace(point.config, seed=seed),
            given,
        )
        for shown, given in by_name
        for point in grid
        for seed in count
    ]
    shared = _Shared(named, data, example_inputs, known, [config for _, config, _ in runs])
    points = []
    for done, (chosen, own, given) in enumerate(runs):
        if progress is not None:
            progress(done, len(runs))
        points.append(shared.point(chosen, own, given))
    if progress is not None:
        progress(len(runs), len(runs))
    axes = dict.fromkeys(name for chosen, *_ in runs for name in chosen)
    return SweepResult(tuple(points), tuple(axes))


def _weights(
    weight: Sequence[float] | None,
    weights: Sequence[Sequence[float]] | None,
    names: Sequence[str],
) -> list[tuple[dict[str, Any], tuple[float, ...]]]:
    """Return what is shown of the weights, and the weights, of each point."""
    if weight is not None and weights is not None:
        raise InputError("weight and weights are both weights: give one of them")
    if weight is not None:
        if len(names) != 2:
            raise InputError(f"weight is for two models; these are {len(names)}: give weights")
        _check_several("weight", weight, "of numbers from 0 to 1, as [0, 0.5, 1]")
        for one in weight:
            if not (isinstance(one, Real) and 0 <= one <= 1):
                raise InputError(f"weight must be numbers from 0 to 1; got {one!r}")
        if not len(weight):
            raise InputError("weight is empty: give at least one")
        return [({"weight": float(one)}, (float(one), 1 - float(one))) for one in weight]
    if weights is None:
        return [({}, merge_weights(None, names))]
    _check_several(
        "weights", weights, "with the weights of all models for each point, as [[2, 1], [1, 1]]"
    )
    if not len(weights):
        raise InputError("weights is empty: give at least one list")
    for i, given in enumerate(weights):
        _check_several(f"weights[{i}]", given, "of numbers")
        if not all(isinstance(one, Real) for one in given):
            raise InputError(f"weights[{i}] must be a list of numbers; got {given!r}")
    shown = [":".join(f"{one:g}" for one in given) for given in weights]
    return [
        ({"weights": text}, merge_weights(given, names))
        for text, given in zip(shown, weights, strict=True)
    ]


def _check_several(name: str, given: Any, what: str) -> None:
    """Refuse what is no list or another run of values, by its name."""
    is_list = hasattr(given, "__len__") and not is_number_in_array(given)
    if isinstance(given, (str, bytes, Mapping)) or not is_list:
        raise InputError(f"{name} must be a list {what}; got {given!r}")


def _seeds(seeds: int | Sequence[int] | None) -> list[int | None]:
    if seeds is None:
        return [None]
    if isinstance(seeds, bool) or not isinstance(seeds, int):
        _check_several("seeds", seeds, "or a whole number")
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not found:
        raise InputError(f"seeds must be at least 1, or a list of seeds; got {seeds!r}")
    return [*found]


class _Shared:
    """What fusions of the same models share, by the settings that count for it."""

    def __init__(
        self,
        models: Mapping[str, Model],
        data: Data,
        example_inputs: ExampleInputs,
        labels: Tensor | None,
        configs: Sequence[FusionConfig],
    ) -> None:
        self._models = models
        self._data = data
        self._example = example_inputs
        self._labels = labels
        self._data_hash = hash_of(data)
        # Statistics that only some calibrations need are recorded where one of them will.
        self._with_moments = {_aligning(one): one for one in sorted(configs, key=needs_moments)}
        self._left = [_aligning(one) for one in configs]
        self._aligned: dict[str, AlignedModels | ClafusionError] = {}
        self._matched: dict[str, FusionProblem] = {}
        self._outputs: dict[str, OutputCache] = {}

    def point(
        self, chosen: Mapping[str, Any], config: FusionConfig, weights: tuple[float, ...]
    ) -> SweepPoint:
        """Fuse by one combination; of warnings about its quality say which one that is."""
        key = _aligning(config)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", AssessmentWarning)
                result = self._fused(key, config, weights)
            for one in caught:
                if issubclass(one.category, AssessmentWarning):
                    warn(f"{_shown(chosen)}: {one.message}", one.category)
                else:
                    warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        except DataError:  # all other points would fail alike
            raise
        except ClafusionError as error:
            return SweepPoint(chosen, config, weights, None, None, 0.0, str(error))
        finally:
            self._left.remove(key)
            if key not in self._left:  # profiles take much memory
                self._aligned.pop(key, None)
                self._outputs.pop(key, None)
                self._matched = {
                    name: one for name, one in self._matched.items() if not name.startswith(key)
                }
        seconds = sum(result.timings.values()) - sum(result.aligned.timings.values())
        return SweepPoint(
            chosen, config, weights, result.assessment, result.evaluation, max(seconds, 0.0)
        )

    def _fused(self, key: str, config: FusionConfig, weights: tuple[float, ...]) -> FusionResult:
        if isinstance(config.merging.strategy, Iterative) and len(self._models) > 2:
            return fuse(
                self._models,
                self._data,
                weights,
                config,
                example_inputs=self._example,
                labels=self._labels,
            )
        if key not in self._aligned:
            try:
                self._aligned[key] = align(
                    self._models,
                    self._data,
                    self._with_moments[key],
                    example_inputs=self._example,
                )
            except ClafusionError as error:
                self._aligned[key] = error
        aligned = self._aligned[key]
        if isinstance(aligned, ClafusionError):
            raise aligned
        of_plans = key + _matching(config)
        matched, template = self._matched.get(of_plans), None
        if matched is None and isinstance(config.target, Like):
            like = next(iter(self._models.values()))
            template = traced_template(config, like, self._example)
        result = fuse_aligned(
            aligned,
            self._data,
            weights,
            config,
            template=template,
            known_outputs=self._outputs.setdefault(key, OutputCache()),
            data_hash=self._data_hash,
            labels=self._labels,
            matched=matched,
        )
        # The plans of a barycentre depend on the weights; those of a trunk are no whole network's.
        if config.outputs == "same" and not isinstance(config.merging.strategy, Barycentre):
            self._matched[of_plans] = result.problem
        return result


def _shown(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in chosen.items())


def _aligning(config: FusionConfig) -> str:
    """Return all options on which an alignment depends, but for which statistics are recorded."""
    return json.dumps(
        {
            **profile_options(config),
            "moments": None,
            "alignment": config.alignment.to_dict(),
            "assessment": config.assessment.to_dict(),
            "reference": config.target.reference,
            "outputs": config.outputs,
            "solver": config.matching.solver.name == "orthogonal",
        },
        sort_keys=True,
    )


def _matching(config: FusionConfig) -> str:
    """Return all options on which plans depend, given the alignment."""
    target = config.target
    return json.dumps(
        {
            "target": [target.to_dict(), id(target.template) if isinstance(target, Like) else 0],
            "matching": config.matching.to_dict(),
            "merging": config.merging.normalisation,
        },
        sort_keys=True,
    )
