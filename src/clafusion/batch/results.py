"""The result of one pair, and the facts as which it is sent and kept: plain data for JSON."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn

from clafusion.alignment.dynamic_program import LayerAlignment
from clafusion.alignment.models import label
from clafusion.assessment.evaluation import Evaluation
from clafusion.assessment.nearness import FusionAssessment
from clafusion.batch.prepared import operations_of
from clafusion.errors import InputError
from clafusion.interop.huggingface import ModelDirectory, load_directory
from clafusion.results import RESULT, FusionResult
from clafusion.table import Table
from clafusion.tracing.model import TracedModel
from clafusion.weights.build import fill
from clafusion.weights.factories import Model, ModelFile
from clafusion.weights.state_files import stored_content

__all__ = [
    "ModelFacts",
    "Pair",
    "PairResult",
    "differing_settings",
    "facts_of",
    "pairs_table",
    "result_of",
    "settings_of",
]

Pair: TypeAlias = "tuple[str, str]"
"""The names of the first and the second model."""


@dataclass(frozen=True)
class ModelFacts:
    """What a pair's result says of one of its two models.

    Attributes
    ----------
    source
        Its factory and its file, or its class.
    sha256
        The SHA-256 of its file of weights, as ``sha256sum`` gives it. Of several files that of
        their hashes, of a module that of names, shapes and values. None where they could not be
        read.
    parameters, operations
        As in :class:`PairResult`; None where the pair could not be fused.
    """

    source: str
    sha256: str | None = None
    parameters: int | None = None
    operations: int | None = None


@dataclass(frozen=True)
class PairResult:
    """The result of one pair.

    It is small enough to be sent between processes and kept for hundreds of pairs: it holds
    neither the parents nor their profiles, as :class:`clafusion.FusionResult` does.

    Attributes
    ----------
    first, second
        The models' names.
    error
        Why the pair could not be fused; None where it was fused. After an error the attributes
        below are None or empty.
    deep
        The name of the model with more layers; of equals the first.
    structure
        The name of the model whose architecture the fused model has. Its widths may be others.
    deep_layers, shallow_layers
        The names of both models' layers.
    alignment
        The alignment of the layers, as in ``FusionResult.alignment``.
    layer_weights
        For each layer of the fused model the weights of the first and the second model; None where
        a model has no such layer. As in ``FusionResult.layer_weights``.
    taken
        What was taken where the options leave a choice, as in ``FusionResult.taken``.
    assessment
        How near the result comes to what both models put out together, and each model alone; as in
        ``FusionResult.assessment``.
    evaluation
        Where labels were given: accuracy and loss of the result, of both models and of the two
        together; as in ``FusionResult.evaluation``.
    seconds
        How long each stage took. Stages that models share are counted in the pair for which they
        were done.
    peak_memory
        Bytes that were held at the most in each stage, as in ``FusionResult.peak_memory``.
    parameters
        How many numbers the fused model's parameters have.
    operations
        How many floating-point operations the fused model takes for one input: those of matrix
        products, convolutions, attention and recurrent layers, a multiplication and an addition
        counted as two.
    resized
        Whether the fused model has other widths than ``structure``, so that its weights do not fit
        into a model of the same class and arguments.
    models
        What is known of both models, by name; also after an error. Empty for results that earlier
        versions kept, and so are ``settings``, ``peak_memory``, ``parameters`` and ``operations``.
    settings
        The options as plain data, as ``FusionConfig.to_dict`` gives them; also after an error.
    weights
        The weights of the first and the second model; also after an error.
    warnings
        The texts of the warnings.
    path
        The file of the fused weights, of two Hugging Face directories a directory; None without
        ``out_dir``.
    resumed
        Whether an earlier run fused the pair.
    """

    first: str
    second: str
    error: str | None
    deep: str | None
    structure: str | None
    deep_layers: tuple[str, ...]
    shallow_layers: tuple[str, ...]
    alignment: LayerAlignment | None
    layer_weights: tuple[tuple[float | None, ...], ...]
    taken: Mapping[str, Any]
    assessment: FusionAssessment | None
    evaluation: Evaluation | None
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]
    parameters: int | None
    operations: int | None
    resized: bool
    models: Mapping[str, ModelFacts]
    settings: Mapping[str, Any]
    weights: tuple[float, ...]
    warnings: tuple[str, ...]
    path: Path | None
    resumed: bool
    _state: Mapping[str, Any] | None = field(repr=False)
    _architecture: Model | None = field(repr=False)
    _has_record: bool = field(repr=False)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"<PairResult {self.first} and {self.second}: failed>"
        near = "" if self.assessment is None else f": {self.assessment.result}"
        right = "" if self.accuracy is None else f", accuracy {100 * self.accuracy:.1f} %"
        return f"<PairResult {self.first} and {self.second}{near}{right}>"

    @property
    def accuracy(self) -> float | None:
        """The share of the labels that the result chooses, from 0 to 1; None without labels."""
        return None if self.evaluation is None else self.evaluation.scores[RESULT].accuracy

    @property
    def loss(self) -> float | None:
        """The result's mean cross-entropy, or squared error, with labels; None without."""
        return None if self.evaluation is None else self.evaluation.scores[RESULT].loss

    @property
    def agreement(self) -> float | None:
        """How often the result and both models together choose the same class; None for no classes.

        From 0 to 1. Of classes this orders pairs better than :attr:`distance`.
        """
        return None if self.assessment is None else self.assessment.result.agreement

    @property
    def distance(self) -> float:
        """How far the result is from both models together, to sort by; inf where that is unknown.

        The mean Kullback-Leibler divergence in nats, or the relative squared error: see
        :class:`clafusion.Nearness`.
        """
        return math.inf if self.assessment is None else self.assessment.result.distance

    @property
    def factory(self) -> str | None:
        """The factory for which ``clafusion.load(factory, path)`` is the fused model, if any.

        None for modules and Hugging Face directories, for other widths (see :attr:`loads_itself`),
        and without a file.
        """
        is_factory = type(self._architecture) is ModelFile
        return self.builder if is_factory and self.path is not None and not self.resized else None

    @property
    def builder(self) -> str | None:
        """What ``clafusion.load`` makes a network of the fused one's structure from, if anything.

        A factory or an exported program; its widths may be others. None for modules and for Hugging
        Face directories.
        """
        kind = self._architecture
        if isinstance(kind, ModelFile) and not isinstance(kind, ModelDirectory):
            return kind.factory
        return None

    @property
    def loads_itself(self) -> bool:
        """Whether ``clafusion.load(path, trust_code=True)`` is the fused model, other widths too.

        The file says which factory makes it. Not without a file, and not for modules.
        """
        return self._has_record and self.path is not None and self.path.suffix == ".safetensors"

    @property
    def state(self) -> Mapping[str, Any]:
        """The fused weights, read from ``path`` where there is a file.

        They are tensors, and what modules' ``get_extra_state`` returned.

        Raises
        ------
        InputError
            The pair failed, or the file is gone.
        """
        if self._state is not None:
            return self._state
        if self.path is None:
            raise InputError(
                f"{label(self.first)} and {label(self.second)} were not fused: {self.error}"
            )
        if self.path.is_dir():
            return load_directory(self.path).state_dict()
        # With the names as they were written: a model's own may begin with "module.".
        state: Mapping[str, Any] = stored_content(self.path)
        return state

    @property
    def model(self) -> nn.Module:
        """The fused model: a new one of ``structure``'s architecture with the fused weights.

        Raises
        ------
        InputError
            The pair failed, or the file is gone.
        """
        if self.path is not None and self.path.is_dir():
            return load_directory(self.path)
        state = self.state
        kind = self._architecture
        assert kind is not None, "a fused pair has an architecture"
        built = kind.build() if isinstance(kind, ModelFile) else copy.deepcopy(kind)
        fill(built, state)
        return built


def pairs_table(results: Sequence[PairResult]) -> Table:
    """Return one row for each pair, with the settings where results have several."""
    settings = settings_of(results)
    rows = [
        (
            one.first,
            one.second,
            chosen or None,
            one.structure,
            None if one.alignment is None else one.alignment.total_cost,
            one.agreement,
            None if math.isinf(one.distance) else one.distance,
            one.accuracy,
            one.loss,
            math.fsum(one.seconds.values()),
            None if one.path is None else str(one.path),
            one.error,
        )
        for one, chosen in zip(results, settings, strict=True)
    ]
    columns = ("first", "second", "settings", "structure", "cost", "agreement", "distance")
    return Table.of((*columns, "accuracy", "loss", "seconds", "file", "error"), rows)


def settings_of(results: Sequence[PairResult]) -> list[str]:
    """Return for each result what of its options and weights is not the same in all results."""
    return differing_settings([{**one.settings, "weights": list(one.weights)} for one in results])


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return of each of several settings, as plain data, what is not the same in all of them."""
    flat = [dict(_flat(one)) for one in settings]
    paths = dict.fromkeys(path for one in flat for path in one)
    varying = [path for path in paths if len({repr(one.get(path)) for one in flat}) > 1]
    return [", ".join(f"{path} {one[path]}" for path in varying if path in one) for one in flat]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every option; a variant by its name."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name, inner in value.items():
        yield from _flat(inner, path if name == "name" else f"{path}.{name}" if path else str(name))


def facts_of(
    result: FusionResult,
    models: Sequence[TracedModel] | None = None,
    operations: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return what is kept of a fusion of two models, but for their names and the weights.

    ``models`` are the two as their own code builds them, where they were completed for the fusion;
    ``operations`` what :func:`operations_of` gives for them, where that is known.
    """
    aligned = result.aligned
    (pair,) = aligned.pairs
    built = models or [one.traced for one in aligned.profiles]
    structure = _structure(result, built)
    resized = _shapes(result.model) != _shapes(built[structure].model)
    if operations is None or resized:
        of_result = operations_of(result.problem.target)
    else:  # the same layers of the same widths
        of_result = operations[structure]
    return {
        "deep": aligned.names[pair.deep],
        "structure": aligned.names[structure],
        "deep_layers": aligned.layer_names(pair.deep),
        "shallow_layers": aligned.layer_names(pair.shallow),
        "alignment": _alignment_facts(pair.alignment),
        "layer_weights": [list(one) for one in result.layer_weights],
        "taken": result.taken,
        "assessment": None if result.assessment is None else result.assessment.to_dict(),
        "evaluation": None if result.evaluation is None else result.evaluation.to_dict(),
        "seconds": dict(result.timings),
        "peak_memory": dict(result.peak_memory),
        "parameters": _num_parameters(result.model),
        "operations": of_result,
        "resized": resized,
        "models": {
            name: {"parameters": _num_parameters(one.model)}
            for name, one in zip(aligned.names, built, strict=True)
        },
    }


def _num_parameters(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def _shapes(module: nn.Module) -> dict[str, Any]:
    """Return the shapes of what a module keeps in files."""
    return {name: getattr(one, "shape", None) for name, one in module.state_dict().items()}


def _structure(result: FusionResult, built: Sequence[TracedModel]) -> int:
    """Return the position of the model whose architecture the fused model has."""
    target = result.problem.target
    order = result.aligned.reference, 1 - result.aligned.reference
    for i in order:
        if built[i].module is target.module:
            return i
    # With other widths, or of a completed model: the code of one of the two builds it.
    names = _shapes(result.model).keys()
    return next((i for i in order if _shapes(built[i].model).keys() == names), order[0])


def result_of(
    facts: Mapping[str, Any],
    *,
    models: Mapping[str, Model],
    folder: Path | None = None,
    state: Mapping[str, Any] | None = None,
    resumed: bool = False,
) -> PairResult:
    """Return the result that the facts describe.

    Parameters
    ----------
    facts
        Those of :func:`facts_of` with the pair's names, its error, its warnings, its settings, what
        is known of its models, and its file. Of a pair that failed all but the file and those of
        :func:`facts_of`. What earlier versions did not keep may be missing.
    models
        The models by name.
    folder
        Where the file lies; None where there is no file.
    state
        The fused weights, where there is no file.
    resumed
        Whether an earlier run fused the pair.
    """
    is_fused = facts["error"] is None
    assessment, evaluation = facts.get("assessment"), facts.get("evaluation")
    return PairResult(
        first=facts["first"],
        second=facts["second"],
        error=facts["error"],
        deep=facts.get("deep"),
        structure=facts.get("structure"),
        deep_layers=tuple(facts.get("deep_layers", ())),
        shallow_layers=tuple(facts.get("shallow_layers", ())),
        alignment=_alignment_of(facts["alignment"]) if is_fused else None,
        layer_weights=tuple(tuple(one) for one in facts.get("layer_weights", ())),
        taken=facts.get("taken", {}),
        assessment=None if assessment is None else FusionAssessment.from_dict(assessment),
        evaluation=None if evaluation is None else Evaluation.from_dict(evaluation),
        seconds={stage: float(one) for stage, one in facts.get("seconds", {}).items()},
        peak_memory={stage: int(one) for stage, one in facts.get("peak_memory", {}).items()},
        parameters=facts.get("parameters"),
        operations=facts.get("operations"),
        resized=bool(facts.get("resized", False)),
        models={name: ModelFacts(**one) for name, one in facts.get("models", {}).items()},
        settings=facts.get("settings", {}),
        weights=tuple(facts.get("weights", ())),
        warnings=tuple(facts["warnings"]),
        path=folder / facts["file"] if is_fused and folder is not None else None,
        resumed=resumed,
        _state=state,
        _architecture=models[facts["structure"]] if is_fused else None,
        _has_record=facts.get("architecture") is not None,
    )


def _alignment_facts(alignment: LayerAlignment) -> dict[str, Any]:
    gaps = alignment.skip_shallow
    return {
        "deep_to_shallow": list(alignment.deep_to_shallow),
        "total_cost": alignment.total_cost,
        "cost": _finite(alignment.cost.tolist()),
        "skip": _finite(alignment.skip.tolist()),
        "skip_shallow": None if gaps is None else _finite(gaps.tolist()),
        "mode": alignment.mode,
        "pin_first": alignment.pin_first,
        "pin_last": alignment.pin_last,
    }


def _alignment_of(facts: Mapping[str, Any]) -> LayerAlignment:
    gaps = facts["skip_shallow"]
    return LayerAlignment(
        tuple(facts["deep_to_shallow"]),
        facts["total_cost"],
        _array(facts["cost"]),
        _array(facts["skip"]),
        facts["mode"],
        facts["pin_first"],
        facts["pin_last"],
        None if gaps is None else _array(gaps),
    )


def _finite(values: list[Any]) -> list[Any]:
    """Return nested lists with None for infinity, which JSON does not have."""
    return [
        _finite(one) if isinstance(one, list) else one if math.isfinite(one) else None
        for one in values
    ]


def _array(values: Any) -> NDArray[np.float64]:
    numbers = np.array(values, dtype=np.float64)  # None becomes NaN
    return np.where(np.isnan(numbers), np.inf, numbers)
