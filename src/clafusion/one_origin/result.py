"""What a merge returns: plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.assessment.evaluation import Evaluation
from clafusion.assessment.nearness import DISTANCES, FusionAssessment
from clafusion.config import MergeConfig
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data
from clafusion.quality import evaluated_beside
from clafusion.results import RESULT, parameter_count
from clafusion.settings import described
from clafusion.table import Table

__all__ = ["BASE", "MergeResult"]

BASE = "base"
"""What tables and errors call the network that the others were trained from."""


@dataclass(frozen=True)
class MergeResult:
    """A model that was merged of models of one origin, and how it came about.

    Attributes
    ----------
    model
        The merged network, in the mode (train or eval) of the base, and trainable as that one is.
    base
        The network that the models were trained from.
    models
        The models by name.
    weights
        Each model's weight; they add up to 1.
    distances
        How far each model's weights are from the base's, relative to their norm.
    config
        The options.
    problem
        What was calibrated: the models as parents, in the base's structure. None without data.
    assessment
        How near the result comes to what the models put out together; None without data, with
        ``assessment="none"``, and for models without a floating output.
    averaged
        The names of the weights that the calibration left as they were merged; empty where it
        leaves all there.
    timings
        Seconds of each stage, in order.
    peak_memory
        Bytes that were held at the most in each stage.
    data_hash
        The SHA-256 of the data; None for data that is no tensor and no list of batches.
    example
        A few inputs that the network takes, and their names where it takes them by keyword; None
        where neither data nor ``example_inputs`` were given.
    """

    model: nn.Module
    base: nn.Module
    models: Mapping[str, nn.Module]
    weights: tuple[float, ...]
    distances: Mapping[str, float]
    config: MergeConfig
    problem: FusionProblem | None = None
    assessment: FusionAssessment | None = None
    averaged: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: Mapping[str, int] = field(default_factory=dict)
    data_hash: str | None = None
    example: tuple[tuple[Tensor, ...], tuple[str, ...]] | None = None

    def __repr__(self) -> str:
        facts = [
            f"{type(self.model).__name__} {parameter_count(self.model)} parameters",
            f"{len(self.models)} models by {described(self.config.method)}",
        ]
        if self.assessment is not None:
            facts.append(str(self.assessment.result).partition(", divergence")[0])
        return f"<MergeResult {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    @property
    def table(self) -> Table:
        """One row for each network: its weight, its distance from the base, and how near it is."""
        found = self.assessment
        nearness = {} if found is None else {RESULT: found.result, **found.parents}
        weights = dict(zip(self.models, self.weights, strict=True))
        rows = []
        for name in (RESULT, *self.models):
            near = nearness.get(name)
            agreement = None if near is None else near.agreement
            distance = None if near is None else near.distance
            far = self.distances.get(name)
            rows.append((name, weights.get(name), far, agreement, distance))
        kind = "distance" if found is None else DISTANCES[found.kind]
        columns = ("network", "weight", "distance from the base", "agreement", kind)
        return Table.of(columns, rows)

    def evaluate(self, inputs: Data, labels: Any = None) -> Evaluation:
        """Say how good the result is on inputs with labels, beside the models and their means.

        Parameters and errors are those of :func:`clafusion.evaluate`.
        """
        return evaluated_beside(
            self.model,
            self.models,
            self.weights,
            inputs,
            labels,
            self.config.assessment,
            None if self.problem is None else self.problem.target,
        )

    @property
    def taken(self) -> dict[str, Any]:
        """What was taken where the options leave a choice, as plain data for JSON.

        That is the ``calibration`` by name, None without data, and ``by_task``: whether it aimed at
        each model on data of its own task, else at the models' mean.
        """
        problem = self.problem
        used = None if problem is None else self.config.fusion.used_calibration.name
        return {"calibration": used, "by_task": problem is not None and bool(problem.owners)}

    def to_frame(self) -> Any:
        """Return :attr:`table` as a ``pandas.DataFrame``; errors are those of ``Table``."""
        return self.table.to_frame()

    def to_dict(self) -> dict[str, Any]:
        """Return what was done and found, as plain data for JSON."""
        return {
            "models": list(self.models),
            "weights": list(self.weights),
            "distances": dict(self.distances),
            **self.taken,
            "averaged": list(self.averaged),
            "assessment": None if self.assessment is None else self.assessment.to_dict(),
            "config": self.config.to_dict(),
            "seconds": dict(self.timings),
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON on one line."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        max_shard_size: str | int = "5GB",
        command: str | None = None,
    ) -> None:
        """Write the merged network, so that it loads where the base's weights load.

        A file holds the weights, and beside it lies a record of where they come from and of what
        builds the network again, by which :func:`clafusion.load` reads it: the factory of a
        :class:`clafusion.ModelFile`, the config of a network of transformers, or an exported
        program, which is written for the merge of a plain module that had ``data`` or
        ``example_inputs``. A ``.pt2`` file is such a program, with the weights in it. A directory
        is for networks of transformers: weights in safetensors files, config, a model card, and the
        base's tokenizer, processor and generation config. It is read afresh before this returns.

        Parameters
        ----------
        path
            A directory that is not there yet or empty; or a file (``.safetensors``, ``.pt``,
            ``.pth``, ``.safetensors.index.json``, ``.pt2``).
        dtype
            The type of the written weights: ``"float32"``, ``"bfloat16"``, ``"float16"``. Default:
            that which they have.
        max_shard_size
            From which size on the weights of a directory go into several files.
        command
            The command that made the result, for the record or the model card.

        Raises
        ------
        InputError
            The ending is unknown, the directory exists and is not empty, the network is none of
            transformers, what was written does not come back, or the disk is full; or a ``.pt2``
            file has a ``dtype``, or nothing to export the network with.
        UnsupportedOpError
            A ``.pt2`` file is wanted of a network that cannot be exported.

        Warns
        -----
        FusionWarning
            Nothing builds the network again: the file holds weights alone.
        """
        from clafusion.one_origin.saving import save_merged  # needs transformers for a directory

        save_merged(self, path, dtype=dtype, max_shard_size=max_shard_size, command=command)
