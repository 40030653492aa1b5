"""What a reassembly returns: plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from clafusion.assessment.evaluation import Evaluation
from clafusion.assessment.nearness import DISTANCES, FusionAssessment
from clafusion.config import ReassemblyConfig
from clafusion.errors import InputError
from clafusion.interop.programs import PROGRAM, save_program
from clafusion.profiling.batches import Data
from clafusion.quality import evaluated_beside
from clafusion.reassembly.blocks import Block
from clafusion.reassembly.network import Reassembled
from clafusion.results import RESULT, parameter_count
from clafusion.table import Table
from clafusion.tracing.model import TracedModel
from clafusion.weights.atomic import check_output, path_of

__all__ = ["ReassemblyResult", "Tried"]


@dataclass(frozen=True)
class Tried:
    """A network that was stitched and assessed.

    Attributes
    ----------
    blocks
        Its blocks, in order.
    residuals
        The share of the variance that each stitch leaves on the network's own values; None where
        two blocks follow each other in their own model.
    parameters, operations
        How many it has, and how many floating-point operations it takes for an input.
    assessment
        How near it is to what the models put out together.
    """

    blocks: tuple[Block, ...]
    residuals: tuple[float | None, ...]
    parameters: int
    operations: int
    assessment: FusionAssessment

    @property
    def text(self) -> str:
        """Where its blocks come from."""
        return " | ".join(f"{one.model} {one.index}" for one in self.blocks)


@dataclass(frozen=True)
class ReassemblyResult:
    """A network of several models' blocks, and how it came about.

    Attributes
    ----------
    model
        The network: blocks as exported graphs, and stitches between them. See
        :class:`clafusion.reassembly.network.Reassembled`.
    tried
        All networks that were stitched, the best first, which is ``model``.
    groups
        The groups of blocks, in order; a network takes a block of each.
    parents
        The models by name.
    config
        The options.
    timings
        Seconds of each stage, in order.
    peak_memory
        Bytes that were held at the most in each stage.
    data_hash
        The SHA-256 of the data; None for data that is no tensor and no list of batches.
    """

    model: Reassembled
    tried: tuple[Tried, ...]
    groups: tuple[tuple[Block, ...], ...]
    parents: Mapping[str, TracedModel]
    config: ReassemblyConfig
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: Mapping[str, int] = field(default_factory=dict)
    data_hash: str | None = None

    def __repr__(self) -> str:
        near = str(self.assessment.result).partition(", divergence")[0]
        parts = f"{parameter_count(self.model)} parameters, {self.tried[0].text}"
        return f"<ReassemblyResult {parts}, {near}>"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the network, in order."""
        return self.tried[0].blocks

    @property
    def assessment(self) -> FusionAssessment:
        """How near the network is to what the models put out together, and how near each model."""
        return self.tried[0].assessment

    @property
    def parent_models(self) -> dict[str, nn.Module]:
        """The models by name, as they were given."""
        return {name: one.model for name, one in self.parents.items()}

    def evaluate(self, inputs: Data, labels: Any = None) -> Evaluation:
        """Say how good the network is on inputs with labels, beside the models and their means.

        Parameters and errors are those of :func:`clafusion.evaluate`. In the means all models count
        the same.
        """
        parents = self.parent_models
        return evaluated_beside(
            self.model,
            parents,
            (1 / len(parents),) * len(parents),
            inputs,
            labels,
            self.config.assessment,
            next(iter(self.parents.values())),
        )

    @property
    def table(self) -> Table:
        """One row for the result, for each model and for each other network that was tried."""
        found = self.assessment
        rows: list[tuple[Any, ...]] = []
        for i, one in enumerate(self.tried):
            near = one.assessment.result
            name = RESULT if i == 0 else "tried"
            rows.append(
                (name, one.text, near.agreement, near.distance, one.parameters, one.operations)
            )
        for name, near in found.parents.items():
            count = sum(one.numel() for one in self.parents[name].model.parameters())
            rows.insert(1, (name, None, near.agreement, near.distance, count, None))
        columns = ("network", "blocks", "agreement", DISTANCES[found.kind])
        return Table.of((*columns, "parameters", "operations"), rows)

    def to_frame(self) -> Any:
        """Return :attr:`table` as a ``pandas.DataFrame``; errors are those of ``Table``."""
        return self.table.to_frame()

    def to_dict(self) -> dict[str, Any]:
        """Return what was done and found, as plain data for JSON."""
        return {
            "blocks": [_facts(one) for one in self.blocks],
            "groups": [[_facts(one) for one in group] for group in self.groups],
            "tried": [
                {
                    "blocks": [[block.model, block.index] for block in one.blocks],
                    "residuals": list(one.residuals),
                    "parameters": one.parameters,
                    "operations": one.operations,
                    "assessment": one.assessment.to_dict(),
                }
                for one in self.tried
            ],
            "config": self.config.to_dict(),
            "seconds": dict(self.timings),
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON on one line."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network as an exported program, which :func:`clafusion.load` reads again.

        It needs none of the models' code, and can be trained further. ``to_json`` says where its
        blocks come from.

        Parameters
        ----------
        path
            A ``.pt2`` file.

        Raises
        ------
        InputError
            The ending is another one, or the file cannot be written.
        UnsupportedOpError
            The network cannot be exported.
        """
        path = path_of(path, "path")
        if path.suffix.lower() != PROGRAM:
            raise InputError(
                f"{str(path)!r}: a network of several models' blocks has no architecture of its "
                f"own, and is written as an exported program: give a file {PROGRAM}"
            )
        first = next(iter(self.parents.values()))
        check_output(path, (PROGRAM,), "path")
        save_program(self.model, first.example_inputs, first.keywords, path)


def _facts(block: Block) -> dict[str, Any]:
    return {
        "model": block.model,
        "index": block.index,
        "layers": list(block.layers),
        "parameters": block.parameters,
        "start": None if block.start is None else block.start.node,
        "end": None if block.end is None else block.end.node,
    }
