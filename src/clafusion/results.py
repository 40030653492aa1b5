"""What a fusion returns: plain data. Tables and pictures are drawn elsewhere."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment.dynamic_program import LayerAlignment
from clafusion.alignment.models import AlignedModels
from clafusion.assessment.evaluation import (
    Evaluation,
    Network,
    evaluated,
    labelled,
    network_of,
)
from clafusion.assessment.nearness import DISTANCES, FusionAssessment, Nearness
from clafusion.assessment.output_cache import OutputCache
from clafusion.assessment.parts import labelled_output
from clafusion.config import FusionConfig, Iterative, ManyToOne
from clafusion.merging.combination import Combination
from clafusion.merging.problem import FusionProblem, Parent
from clafusion.profiling.batches import Data, batches
from clafusion.table import Table
from clafusion.tracing.model import TracedModel

__all__ = ["RESULT", "FusionResult", "parameter_count"]

RESULT = "the result"
"""What tables call the fused network."""


@dataclass(frozen=True)
class FusionResult:
    """A fused model and how it came about.

    Attributes
    ----------
    model
        The fused network, in the mode (train or eval) of the parent that gives the structure, and
        trainable as that one is.
    aligned
        The parents' profiles, layer costs and alignments.
    problem
        The target and its parents, with their correspondences, plans and merge weights.
    config
        The options.
    weights
        Each parent's weight; they add up to 1.
    anchor
        How far the interior leans towards one parent; None but for least squares. For the strategy
        ``"iterative"`` that of the last step; ``steps`` have the others.
    toward
        The name of the parent towards which it leans; None where ``anchor`` is None.
    averaged
        The names of the weights (parameters of two or more axes) that the calibration left at the
        average, as it cannot solve for them: see the page Concepts. Empty where it leaves all there
        ("none", "batchnorm"). For the strategy ``"iterative"`` those of the last step.
    left_out
        The names of parameters that nothing reads on the example inputs and that the parents have
        with unlike values, so that they are not fused: see the page Concepts.
    rounds
        How many times all parents were matched with the target.
    converged
        Whether the plans stopped changing, for a barycentre; else True.
    assessment
        How near the result comes to what the parents put out together, on data that was kept out of
        the fusion, and how near each parent alone. None with ``assessment="none"``, for models
        without a floating output and for ``steps``, and where outputs were matched one model after
        another.
    steps
        For the strategy ``"iterative"`` the results of the fusions one after another, the last one
        without its own steps. ``problem`` and ``aligned`` are those of the last. Else empty.
    timings
        Seconds of each stage, in order.
    peak_memory
        Bytes that were held at the most in each stage. On a GPU: by PyTorch, there. Elsewhere: by
        the whole process; exact for the stage that held the most of all, and for another one what
        was held at its beginning or its end.
    data_hash
        The SHA-256 of the data; None for data that is no tensor and no list of batches.
    evaluation
        Where labels were given: accuracy and loss of the result, of each parent and of their means,
        on the inputs that were kept out of the fusion, or on all where none were.
    """

    model: nn.Module
    aligned: AlignedModels
    problem: FusionProblem
    config: FusionConfig
    weights: tuple[float, ...]
    anchor: float | None
    timings: Mapping[str, float]
    peak_memory: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 1
    converged: bool = True
    assessment: FusionAssessment | None = None
    steps: tuple[FusionResult, ...] = ()
    toward: str | None = None
    averaged: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    data_hash: str | None = None
    evaluation: Evaluation | None = None

    def __repr__(self) -> str:
        facts = [f"{type(self.model).__name__} {parameter_count(self.model)} parameters"]
        if self.assessment is not None:
            facts.append(str(self.assessment.result).partition(", divergence")[0])
        if self.evaluation is not None:
            score = self.evaluation.scores[RESULT]
            right = score.accuracy
            facts.append(
                f"loss {score.loss:.3g}" if right is None else f"accuracy {100 * right:.1f} %"
            )
        return f"<FusionResult {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        lines = [repr(self)[1:-1]]
        if self.assessment is not None:
            lines.append(self.assessment.verdict)
        told = "".join(f"<p>{html.escape(one)}</p>" for one in lines)
        return f"<div>{told}{self.table._repr_html_()}</div>"

    @property
    def table(self) -> Table:
        """One row for each network: how near it is to the parents together, and how good."""
        found = self.assessment
        if found is None:
            return self._table({}, "distance")
        return self._table({RESULT: found.result, **found.parents}, DISTANCES[found.kind])

    def _table(self, near: Mapping[str, Nearness], distance: str) -> Table:
        """Return the table of networks that are so near by name; ``distance`` is its heading."""
        shares = dict(zip(self.names, self.weights, strict=True))
        rows: dict[str, dict[str, Any]] = {RESULT: {}}
        rows |= {name: {"weight": share} for name, share in shares.items()}
        for name, one in near.items():
            rows[name] |= {"agreement": one.agreement, "distance": one.distance}
        if self.evaluation is not None:
            for name, score in self.evaluation.scores.items():
                rows.setdefault(name, {}).update(accuracy=score.accuracy, loss=score.loss)
        columns = ("weight", "agreement", "distance", "accuracy", "loss")
        return Table.of(
            ("network", "weight", "agreement", distance, "accuracy", "loss"),
            [(name, *(row.get(one) for one in columns)) for name, row in rows.items()],
        )

    def evaluate(self, inputs: Data, labels: Any = None) -> Evaluation:
        """Say how good the result is on inputs with labels, beside its parents and their means.

        Parameters and errors are those of :func:`clafusion.evaluate`.
        """
        inputs, known = labelled(inputs, labels)
        first = next(iter(self.parent_models.values()))
        return self.evaluated(
            batches(inputs, first.example_inputs, first.keywords, device=first.device), known
        )

    def evaluated(
        self,
        inputs: Iterable[tuple[Tensor, ...]],
        labels: Tensor,
        known_outputs: OutputCache | None = None,
    ) -> Evaluation:
        """Do what :meth:`evaluate` does, with inputs in batches of tensors.

        What the parents put out is kept in ``known_outputs`` for further results.
        """
        first = next(iter(self.parent_models.values()))
        axis = self.config.assessment.axis
        output = labelled_output(first, axis)
        own = network_of(self.model, first.keywords, output)
        return evaluated(
            {RESULT: own, **self._parent_networks(known_outputs, output)},
            self.weights,
            inputs,
            labels,
            axis=axis,
            apart=(RESULT,),
        )

    def _parent_networks(
        self, known_outputs: OutputCache | None, output: int = 0
    ) -> dict[str, Network]:
        """Return what runs each parent, by name; what they put out is kept in ``known_outputs``."""
        parents = self.parent_models
        keywords = next(iter(parents.values())).keywords
        found = {}
        for name, one in parents.items():
            run = network_of(one.model, keywords, output)
            found[name] = run if known_outputs is None else known_outputs.keeping(one.model, run)
        return found

    @property
    def combination(self) -> Combination:
        """What the parents put out together, and why: see ``FusionConfig.combine``.

        For the strategy ``"iterative"`` that of the last step.
        """
        return self.problem.combination

    @property
    def taken(self) -> dict[str, Any]:
        """What was taken where the options leave a choice, as plain data for JSON.

        That is ``calibration`` and ``strategy`` by name; ``anchor`` and ``toward``, how far the
        interior leans towards whom; ``combination``, what the parents put out together and why;
        ``rounds`` and ``converged``. For the strategy ``"iterative"`` also ``leans``, anchor and
        toward of each step.
        """
        strategy = self.config.merging.strategy
        if isinstance(strategy, Iterative) and not self.steps:  # of two models they are the same
            strategy = ManyToOne()
        found: dict[str, Any] = {
            "calibration": self.config.used_calibration.name,
            "anchor": self.anchor,
            "toward": self.toward,
            "combination": self.combination.to_dict(),
            "strategy": strategy.name,
            "rounds": self.rounds,
            "converged": self.converged,
        }
        if self.steps:
            found["leans"] = [{"anchor": one.anchor, "toward": one.toward} for one in self.steps]
        return found

    @property
    def parent_models(self) -> dict[str, TracedModel]:
        """All parents by name; of fusions one after another not what came between."""
        found: dict[str, TracedModel] = {}
        for i, step in enumerate(self.steps or (self,)):
            pairs = zip(step.aligned.names, step.aligned.profiles, strict=True)
            found |= {name: one.traced for name, one in list(pairs)[i > 0 :]}
        return found

    def to_frame(self) -> Any:
        """Return :attr:`table` as a ``pandas.DataFrame``; errors are those of ``Table``."""
        return self.table.to_frame()

    def to_dict(self) -> dict[str, Any]:
        """Return what was found and done, as plain data for JSON.

        That is the alignments, what became of each parent, how good the result is, options and
        seconds. For the strategy ``"iterative"`` alignments and parents are those of each step.
        """
        steps = [_step_facts(one) for one in self.steps or (self,)]
        return {
            **(steps[0] if len(steps) == 1 else {"steps": steps}),
            "weights": list(self.weights),
            **self.taken,
            "averaged": list(self.averaged),
            "left_out": list(self.left_out),
            "assessment": None if self.assessment is None else self.assessment.to_dict(),
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
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
        processor_of: str | None = None,
        dtype: str | torch.dtype | None = None,
        max_shard_size: str | int = "5GB",
        command: str | None = None,
    ) -> None:
        """Write the fused network, so that :func:`clafusion.load` reads it again.

        A file holds the weights. Beside it a record (``fused.safetensors.json``) says what builds
        the network, and where it comes from: parents with their factories, files and hashes,
        options, the data's hash, versions, the command, the assessment, the seconds. What builds
        it is the factory of a parent or of the template, where they were made by one, also with
        other widths; of networks of transformers a config. For any other network an exported
        program is written beside the weights (``fused.pt2``), which needs none of its code. What a
        factory makes is compared with the result before the file gets its name.

        A directory is for networks of transformers. It holds the weights in safetensors files, a
        config that says what the fused network is, tokenizer, processor, chat template and
        generation config of a parent that was read from a directory, and a model card. Before this
        returns it is read afresh by ``from_pretrained`` and computes what the result computes;
        else nothing is left behind.

        Parameters
        ----------
        path
            A directory that is not there yet or empty; or a file (``.safetensors``, ``.pt``,
            ``.pth``, ``.safetensors.index.json``), for any network; or a ``.pt2`` file, for the
            exported program alone.
        processor_of
            The name of the parent whose tokenizer, processor, chat template and generation config
            the directory gets; default the one that gives the structure, or the first that has
            any.
        dtype
            The type of the written weights: ``"float32"``, ``"bfloat16"``, ``"float16"``. Default:
            that which they have.
        max_shard_size
            From which size on the weights go into several files.
        command
            The command that made the result, for the record or the model card.

        Raises
        ------
        InputError
            The ending is unknown, the directory exists and is not empty, the network is none of
            transformers, no config describes it, the parents have unlike vocabularies, what was
            written does not compute what the result computes, or the disk is full.

        Warns
        -----
        FusionWarning
            The network has no factory and cannot be exported, so that only its own code can load
            the file.
        """
        from clafusion.interop.saving import save_result  # needs transformers for a directory

        save_result(
            self,
            path,
            processor_of=processor_of,
            dtype=dtype,
            max_shard_size=max_shard_size,
            command=command,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models, also of those that earlier steps fused."""
        if not self.steps:
            return self.aligned.names
        first, *others = self.steps
        return (*first.aligned.names, *(one.aligned.names[-1] for one in others))

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The parents, in the order in which the models were given.

        For the strategy ``"iterative"`` those of the last step.
        """
        return self.problem.parents

    @property
    def alignment(self) -> LayerAlignment:
        """The alignment of the layers of two models.

        Raises
        ------
        InputError
            There are more than two: see ``aligned.alignments``.
        """
        return self.aligned.alignment

    @property
    def layer_weights(self) -> tuple[tuple[float | None, ...], ...]:
        """For each layer of the target every parent's weight; None where a parent has no such."""
        columns = [
            [
                weight if k >= 0 else None
                for weight, k in zip(
                    one.weights.of_layers(self.problem.target),
                    one.correspondence.layer_map,
                    strict=True,
                )
            ]
            for one in self.parents
        ]
        return tuple(zip(*columns, strict=True))


# --- as plain data ------------------------------------------------------------------------------


def parameter_count(model: nn.Module) -> str:
    """Return how many parameters a module has, to three digits."""
    count = sum(one.numel() for one in model.parameters())
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _step_facts(result: FusionResult) -> dict[str, Any]:
    target = result.problem.target
    return {
        **result.aligned.to_dict(),
        "target": [layer.name for layer in target.layers],
        "parents": [_parent_facts(one) for one in result.parents],
        "layer_weights": [list(weights) for weights in result.layer_weights],
    }


def _parent_facts(parent: Parent) -> dict[str, Any]:
    source, target = parent.correspondence.source, parent.correspondence.target
    return {
        "name": parent.name,
        "layer_map": [k if k >= 0 else None for k in parent.correspondence.layer_map],
        "groups": [
            {"name": one.name, "channels": None if plan is None else list(plan.shape)}
            for one, plan in zip(target.groups, parent.plans, strict=True)
        ],
        "rotated": [target.groups[index].name for index in parent.rotations],
        "head_orders": [
            {"layer": source.layers[source.heads[index].layer].name, "order": list(order)}
            for index, order in parent.head_orders.items()
        ],
        "heads": [
            {"layer": target.layers[to.layer].name, "source": of.count, "target": to.count}
            for of, to in zip(source.united_heads, target.united_heads, strict=True)
        ],
    }
