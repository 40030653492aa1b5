"""What a fusion returns: plain data. Tables and pictures are drawn elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from clafusion.alignment.dynamic_program import LayerAlignment
from clafusion.alignment.models import AlignedModels
from clafusion.assessment.nearness import FusionAssessment
from clafusion.config import FusionConfig
from clafusion.merging.problem import FusionProblem, Parent

__all__ = ["FusionResult"]


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
    averaged: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        processor_of: str | None = None,
        dtype: str | torch.dtype | None = None,
        max_shard_size: str | int = "5GB",
        command: str | None = None,
    ) -> None:
        """Write the fused network: a Hugging Face directory, or a file of weights.

        A directory is for networks of transformers. It holds the weights in safetensors files, a
        config that says what the fused network is, tokenizer, processor, chat template and
        generation config of a parent that was read from a directory, and a model card. Before this
        returns it is read afresh by ``from_pretrained`` and computes what the result computes;
        else nothing is left behind.

        Parameters
        ----------
        path
            A directory that is not there yet or empty; or a file (``.safetensors``, ``.pt``,
            ``.pth``, ``.safetensors.index.json``), for any network.
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
            The command that made the result, for the model card.

        Raises
        ------
        InputError
            The directory exists and is not empty, the network is none of transformers, no config
            describes it, the parents have unlike vocabularies, what was written does not compute
            what the result computes, or the disk is full.
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
