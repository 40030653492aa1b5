"""Profiles of any number of models -> their layers' alignments with one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from clafusion.alignment.compatibility import check_outputs, fit_layers, gap_costs, skip_costs
from clafusion.alignment.dynamic_program import LayerAlignment, align_layers
from clafusion.alignment.layer_costs import layer_costs
from clafusion.config import FusionConfig, Shallower
from clafusion.errors import InputError, StructureError, retold
from clafusion.profiling.profile import ModelProfile
from clafusion.table import Table
from clafusion.tracing.labels.experts import UNREACHED
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import op_name

__all__ = [
    "AlignedModels",
    "PairAlignment",
    "align_models",
    "align_pair",
    "check_models",
    "label",
    "naming",
    "reference_of",
]


@dataclass(frozen=True)
class PairAlignment:
    """The alignment of two models' layers.

    Attributes
    ----------
    deep, shallow
        Positions of the models among those that are aligned. The deep one has at least as many
        layers.
    costs
        ``(m, n)``: the costs of all pairs of layers, before structure forbids some.
    alignment
        The layers' alignment. Its cost matrix is ``inf`` where structures differ.
    """

    deep: int
    shallow: int
    costs: NDArray[np.float64]
    alignment: LayerAlignment


@dataclass(frozen=True)
class AlignedModels:
    """Traced and profiled models, and how their layers correspond.

    Attributes
    ----------
    names
        What the caller calls the models.
    profiles
        Their profiles.
    reference
        Position of the model with which all others are aligned: the deepest, or for a shallower
        result the shallowest.
    alignments
        The alignment of each model with the reference; None for the reference itself.
    timings
        Seconds of each stage.
    peak_memory
        On a GPU: bytes that PyTorch held there at the most, in each stage. Else empty.
    """

    names: tuple[str, ...]
    profiles: tuple[ModelProfile, ...]
    reference: int
    alignments: tuple[PairAlignment | None, ...]
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def pairs(self) -> tuple[PairAlignment, ...]:
        """All alignments, in the order of the models."""
        return tuple(one for one in self.alignments if one is not None)

    @property
    def alignment(self) -> LayerAlignment:
        """The only alignment, of two models.

        Raises
        ------
        InputError
            There are more than two models: see ``alignments``.
        """
        if len(self.pairs) != 1:
            raise InputError(
                f"{len(self.names)} models have {len(self.pairs)} alignments: see .alignments"
            )
        return self.pairs[0].alignment

    def layer_names(self, position: int) -> list[str]:
        """Return the names of a model's layers."""
        return [layer.name for layer in self.profiles[position].traced.layers]

    def __repr__(self) -> str:
        depths = [
            f"{name} ({len(one.traced.layers)} layers)"
            for name, one in zip(self.names, self.profiles, strict=True)
        ]
        return f"<AlignedModels {', '.join(depths)}, aligned with {self.names[self.reference]}>"

    @property
    def table(self) -> Table:
        """One row for each layer of each pair: both models' layers, None where one has none."""
        rows = []
        for pair in self.pairs:
            names = self.layer_names(pair.deep), self.layer_names(pair.shallow)
            for deep, shallow in pair.alignment.steps:
                matched = deep >= 0 and shallow >= 0
                rows.append(
                    (
                        self.names[pair.deep],
                        names[0][deep] if deep >= 0 else None,
                        self.names[pair.shallow],
                        names[1][shallow] if shallow >= 0 else None,
                        float(pair.alignment.cost[deep, shallow]) if matched else None,
                    )
                )
        return Table(("deep", "deep layer", "shallow", "shallow layer", "cost"), tuple(rows))

    def to_frame(self) -> Any:
        """Return :attr:`table` as a ``pandas.DataFrame``; errors are those of ``Table``."""
        return self.table.to_frame()

    def to_dict(self) -> dict[str, Any]:
        """Return the models' layers and every alignment with the reference, as data for JSON."""
        return {
            "models": [
                {
                    "name": name,
                    "layers": self.layer_names(i),
                    "pinned": [asdict(one) for one in self.profiles[i].traced.pinned],
                }
                for i, name in enumerate(self.names)
            ],
            "reference": self.names[self.reference],
            "alignments": [self._pair_facts(pair) for pair in self.pairs],
            "samples": self.profiles[self.reference].num_inputs,
        }

    def _pair_facts(self, pair: PairAlignment) -> dict[str, Any]:
        alignment = pair.alignment
        return {
            "deep": self.names[pair.deep],
            "shallow": self.names[pair.shallow],
            "deep_to_shallow": [k if k >= 0 else None for k in alignment.deep_to_shallow],
            "costs": [
                [float(cost) if math.isfinite(cost) else None for cost in row]
                for row in alignment.cost
            ],
            "total_cost": alignment.matched_cost,
            "forced": alignment.forced,
        }


def label(name: str) -> str:
    """Return how errors call a model: as the caller would write it."""
    return name if name.startswith("models[") else f"models[{name!r}]"


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let errors about a model in here begin with what its caller calls it."""
    try:
        yield
    except StructureError as error:
        raise retold(error, f"{label(name)}: {error}") from error.__cause__


def reference_of(models: Sequence[TracedModel], config: FusionConfig) -> int:
    """Return the position of the model that gives the depth: the deepest, or the shallowest."""
    depths = [len(one.layers) for one in models]
    return depths.index(min(depths) if config.target.reference == "shallowest" else max(depths))


def check_models(names: Sequence[str], models: Sequence[TracedModel], config: FusionConfig) -> bool:
    """Refuse traced models that cannot be brought to one structure, before anything takes long.

    Return whether one of them has that structure: else only their union has, or a template.

    Raises
    ------
    StructureError
        The message names the layers that stand in the way.
    """
    reference = reference_of(models, config)
    has_gaps = False
    for i, model in enumerate(models):
        if i != reference:
            deep, shallow = _by_depth(models, reference, i)
            called = label(names[deep]), label(names[shallow])
            if config.outputs == "same":
                check_outputs((label(names[reference]), label(names[i])), models[reference], model)
            try:
                fit = fit_layers(
                    called,
                    models[deep].layers,
                    models[shallow].layers,
                    is_left_out=isinstance(config.target, Shallower),
                )
                has_gaps |= fit.needs_gaps
            except StructureError as error:
                jumps = [_most_joined(models[one]) for one in (deep, shallow)]
                if jumps[0] != jumps[1] and min(jumps) > 1:
                    raise retold(
                        error,
                        f"{called[0]} brings what {jumps[0]} layers put out together, and "
                        f"{called[1]} that of {jumps[1]}, as JumpingKnowledge does: such networks "
                        "need as many layers each. clafusion.distill is for others. In detail: "
                        f"{error}",
                    ) from None
                lonely = [one for i in (deep, shallow) for one in models[i].pinned]
                if all(one.why != UNREACHED for one in lonely):
                    raise
                raise retold(
                    error,
                    f"{error}. Not all experts have tokens among the example inputs, and others in "
                    "each model: give example_inputs with more of them",
                ) from None
    return not has_gaps


def _most_joined(model: TracedModel) -> int:
    """Return how many values of nodes a graph network joins at once at the most; 0 for none."""
    if model.graph is None:
        return 0
    found = 0
    for node in model.module.graph.nodes:
        name = op_name(node)
        if name not in ("cat", "stack") or not isinstance(node.args[0], (list, tuple)):
            continue
        values = [one.meta.get("val") for one in node.args[0] if isinstance(one, fx.Node)]
        axis = node.args[1] if len(node.args) > 1 else 0
        if all(isinstance(one, Tensor) and one.is_floating_point() for one in values):
            last = values[0].dim() - (name == "cat")
            found = max(found, len(values) if last > 0 and axis in (-1, last) else 0)
    return found


def align_models(
    names: Sequence[str], profiles: Sequence[ModelProfile], config: FusionConfig
) -> AlignedModels:
    """Align every model's layers with those of the one that gives the depth.

    Raises
    ------
    InputError
        The profiles are of different inputs.
    StructureError, AlignmentError
        The models cannot be brought to one structure.
    """
    models = [one.traced for one in profiles]
    reference = reference_of(models, config)
    alignments: list[PairAlignment | None] = []
    for i, model in enumerate(models):
        if i == reference:
            alignments.append(None)
            continue
        deep, shallow = _by_depth(models, reference, i)
        if config.outputs == "same":
            check_outputs((label(names[reference]), label(names[i])), models[reference], model)
        called = label(names[deep]), label(names[shallow])
        costs = layer_costs(
            profiles[deep], profiles[shallow], metric=config.alignment.cost, names=called
        )
        found = align_pair(called, models[deep].layers, models[shallow].layers, costs, config)
        alignments.append(PairAlignment(deep, shallow, costs, found))
    return AlignedModels(tuple(names), tuple(profiles), reference, tuple(alignments))


def _by_depth(models: Sequence[TracedModel], reference: int, other: int) -> tuple[int, int]:
    """Return the reference and another model, the deep one first; of equals the earlier one."""
    depths = [len(models[one].layers) for one in (reference, other)]
    if depths[0] == depths[1]:
        return min(reference, other), max(reference, other)
    return (reference, other) if depths[0] > depths[1] else (other, reference)


def align_pair(
    names: tuple[str, str],
    deep: Sequence[Layer],
    shallow: Sequence[Layer],
    costs: NDArray[np.float64],
    config: FusionConfig,
) -> LayerAlignment:
    """Align the layers of two networks, given what each pair costs."""
    is_left_out = isinstance(config.target, Shallower)
    fit = fit_layers(names, deep, shallow, is_left_out=is_left_out)
    skip_shallow = None
    if fit.needs_gaps:
        if config.alignment.mode != "layer":
            raise StructureError(
                f"{names[0]} and {names[1]} are each the deeper one somewhere, and so each needs "
                "gaps; they are in alignment.mode='layer' only, and this is "
                f"alignment.mode={config.alignment.mode!r}"
            )
        skip_shallow = gap_costs(deep, shallow, np.where(fit.allowed, costs, 0.0))
    return align_layers(
        np.where(fit.allowed, costs, np.inf),
        skip=skip_costs(deep, is_left_out=is_left_out),
        skip_shallow=skip_shallow,
        mode=config.alignment.mode,
        pin_first=config.alignment.pin_ends,
        pin_last=config.alignment.pin_ends,
        seed=config.seed,
    )
