"""Models and data -> a network of their blocks: the stages in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clafusion.alignment.models import label
from clafusion.assessment.assess import compare
from clafusion.assessment.nearness import FusionAssessment, Kind
from clafusion.assessment.output_cache import OutputCache
from clafusion.assessment.parts import Parts, compared_output, parts_of
from clafusion.config import FusionConfig, ReassemblyConfig
from clafusion.errors import AssessmentWarning, InputError, check_callable, warn
from clafusion.execution.call import call_model
from clafusion.execution.flops import count_operations
from clafusion.interop.inputs import readable
from clafusion.merging.combination import Means
from clafusion.profiling.batches import PROGRESS, Data, Progress
from clafusion.quality import hash_of
from clafusion.reassembly.blocks import Block, block_module, blocks_between
from clafusion.reassembly.cutting import Cut, chosen_cuts, cuts_of
from clafusion.reassembly.grouping import block_distances, grouped
from clafusion.reassembly.network import Reassembled
from clafusion.reassembly.result import ReassemblyResult, Tried
from clafusion.reassembly.search import Candidate, Joins, candidates_of, joins_of
from clafusion.reassembly.stitching import fitted
from clafusion.reassembly.values import (
    changes_at,
    check_varied,
    cut_values,
    grams_of,
    inputs_of,
    similarity,
)
from clafusion.settings import overridden
from clafusion.stages import Clock, ExampleInputs, named_models, placed, traced_parent
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import module_path
from clafusion.weights.factories import Model

__all__ = ["TRIED_BLOCKS", "check_cuts", "reassemble"]

_COMPARED = 400  # inputs by which values are compared, and joins ranked
TRIED_BLOCKS = (2, 3, 4)
"""The numbers of blocks that are tried where none is asked for."""


def reassemble(
    models: Sequence[Model] | Mapping[str, Model],
    data: Data,
    config: ReassemblyConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> ReassemblyResult:
    """Cut trained models of any kinds into blocks, and stitch the best of them into one network.

    Each model is cut where one value alone passes and little changes around it. Blocks that read
    and put out alike values form groups (pFedHR, arXiv 2308.08643). Networks that take one block of
    each group, in order and from several models, are stitched, which needs neither labels nor
    gradients, and assessed: the one is returned that comes nearest to what the models put out
    together, of 2, 3 and 4 blocks where ``config.blocks`` is None. See
    :mod:`clafusion.reassembly`. No model is modified.

    Parameters
    ----------
    models
        Two or more trained networks with the same inputs and outputs, of any kinds: a list, or a
        mapping with names.
    data
        Unlabelled inputs, as for :func:`clafusion.fuse`.
    config
        The options; see :class:`clafusion.ReassemblyConfig`.
    example_inputs, device
        As for :func:`clafusion.fuse`.
    progress
        Called with the stage's name and how many of its models or networks are done.
    overrides
        Any field of ``config``: ``blocks=4``, ``most_parameters=100_000``.

    Returns
    -------
    ReassemblyResult
        With the network as ``.model``.

    Raises
    ------
    InputError
        An option or the data are unusable, a model has too few places at which it can be cut, the
        models put out different things, no blocks can be joined, or no network is within the
        budget.
    ClafusionError
        A model cannot be traced, as for :func:`clafusion.fuse`.

    Warns
    -----
    AssessmentWarning
        A model alone comes clearly nearer to what all put out together than the result does.

    Examples
    --------
    >>> result = clafusion.reassemble([resnet, vgg, mixer], images)  # doctest: +SKIP
    >>> result.save("stitched.pt2")  # doctest: +SKIP
    """
    if "memory_limit" in overrides:
        raise InputError(
            "memory_limit is for fusions and merges: a reassembly holds all models "
            "and what their blocks put out. Fewer samples take less"
        )
    config = overridden(
        ReassemblyConfig, config, overrides, ("example_inputs", "device", "progress")
    )
    check_callable(progress, "progress", PROGRESS)
    named = named_models(models)
    data = readable(data, named)
    named, example_inputs = placed(named, data, example_inputs, device)
    clock = Clock(None)
    with clock.stage("trace"):
        parents = _traced(named, example_inputs, progress)
    first = next(iter(parents.values()))
    parts = parts_of(data, tuple(parents.values()), config.assessment)
    inputs = inputs_of(first, parts.kept, config.samples, config.seed)
    few = inputs_of(first, parts.kept, min(_COMPARED, config.samples), config.seed)
    whole = _Whole(parents, inputs, few, parts, config)
    found = list[_Assessed]()
    refused = list[InputError]()
    for count in _counts(parents, config):
        own = Clock(None)
        try:
            found += _assessed(whole, count, own, len(found), progress)
        except InputError as error:  # another number of blocks may do
            refused.append(error)
        clock.add(own)
    if not found:
        raise refused[0]
    found.sort(key=lambda one: one.order)
    result = ReassemblyResult(
        model=found[0].model,
        tried=tuple(one.tried for one in found),
        groups=found[0].groups,
        parents=parents,
        config=config,
        timings=clock.seconds,
        peak_memory=clock.peak_memory,
        data_hash=hash_of(data),
    )
    if _is_beaten(result.assessment):
        warn(
            f"{result.assessment.verdict}. Try other numbers of blocks, more candidates, more "
            "data, or training (clafusion.distill)",
            AssessmentWarning,
        )
    return result


def _is_beaten(found: FusionAssessment) -> bool:
    """Say whether a model alone is clearly nearer, and of classes agrees more often, too."""
    own = found.result.agreement
    return any(own is None or (found.parents[name].agreement or 0.0) > own for name in found.nearer)


def _traced(
    named: Mapping[str, Model], example_inputs: ExampleInputs, progress: Progress | None
) -> dict[str, TracedModel]:
    """Trace all models; nothing is proved, for no channel moves."""
    found: dict[str, TracedModel] = {}
    for name, model in named.items():
        traced = traced_parent(name, model, example_inputs, FusionConfig(verify=False))
        if traced.graph is not None:
            raise InputError(
                f"{label(name)} is a graph network, whose blocks cannot be reassembled: what lies "
                "between them belongs to nodes, edges or graphs. Fuse them by clafusion.fuse"
            )
        found[name] = replace(traced, thinning=None)
        if progress is not None:
            progress("trace", len(found))
    (first, own), *others = found.items()
    for name, one in others:
        if one.outputs != own.outputs or one.keywords != own.keywords:
            raise InputError(
                f"{label(name)} puts out {one.outputs_text}, and {label(first)} "
                f"{own.outputs_text}: blocks come from networks with the same inputs and outputs"
            )
    return found


def check_cuts(
    models: Mapping[str, Model], example_inputs: ExampleInputs, config: ReassemblyConfig
) -> None:
    """Refuse models that cannot be cut into so many blocks, or put out different things.

    Raises
    ------
    ClafusionError
        As for :func:`reassemble`.
    """
    _counts(_traced(models, example_inputs, None), config)


def _counts(models: Mapping[str, TracedModel], config: ReassemblyConfig) -> list[int]:
    """Return the numbers of blocks to try: into so many all models can be cut."""
    least = config.blocks or TRIED_BLOCKS[0]
    most = min(len(_places(name, one, least)) for name, one in models.items()) + 1
    return [config.blocks] if config.blocks else [one for one in TRIED_BLOCKS if one <= most]


def _places(name: str, model: TracedModel, blocks: int) -> tuple[Cut, ...]:
    """Return where a model can be cut."""
    places = cuts_of(model)
    if len(places) < blocks - 1:
        raise InputError(
            f"{label(name)} has {len(places)} places at which one value alone passes between "
            f"two layers with weights, and {blocks} blocks need {blocks - 1}: "
            "take fewer blocks. A mask that all layers read leaves no such place"
        )
    return places


def _blocks(
    parents: Mapping[str, TracedModel],
    inputs: Sequence[tuple[Tensor, ...]],
    count: int,
) -> tuple[list[Block], tuple[tuple[int, ...], ...]]:
    """Cut all models into so many blocks, and group these."""
    blocks: list[Block] = []
    into: list[Tensor] = []
    out: list[Tensor] = []
    flat = torch.cat([one[0].double().flatten(1) for one in inputs])
    at_start = flat @ flat.T
    check_varied(at_start, "data is")
    for name, model in parents.items():
        places = _places(name, model, count)
        grams = grams_of(model, inputs, places)
        outputs = torch.cat([model.output_tensors(one)[0].double().flatten(1) for one in inputs])
        at_end = outputs @ outputs.T
        for node, gram in grams.items():
            where = next(module_path(one) for one in model.module.graph.nodes if one.name == node)
            called = f"operation {node!r} in {where or 'the top level'!r}"
            check_varied(gram, f"{label(name)}: what {called} puts out is")
        check_varied(at_end, f"{label(name)}: what it puts out is")
        change = changes_at([at_start, *(grams[one.node] for one in places), at_end])
        cuts = tuple(places[i] for i in chosen_cuts(change, count - 1))
        blocks += blocks_between(name, model, cuts)
        own = [grams[one.node] for one in cuts]
        into += [at_start, *own]
        out += [*own, at_end]
    distances = block_distances(similarity(into, into), similarity(out, out))
    return blocks, grouped(blocks, np.asarray(distances), count)


def _residuals(
    blocks: Sequence[Block],
    joins: Joins,
    parents: Mapping[str, TracedModel],
    inputs: Sequence[tuple[Tensor, ...]],
    ridge: float,
) -> dict[tuple[int, int], float]:
    """Return for each join the share of the variance that a stitch of the models' values leaves."""
    nodes: dict[str, list[str]] = {}
    for one in blocks:
        if one.end is not None:
            nodes.setdefault(one.model, []).append(one.end.node)
    values = {name: list(cut_values(parents[name], inputs, of)) for name, of in nodes.items()}
    found = {}
    for (i, j), plan in joins.plans.items():
        if plan is None:
            continue
        ours, theirs = values[blocks[i].model], values[blocks[j].model]
        pairs = [
            (one[plan.source.node], other[plan.target.node])
            for one, other in zip(ours, theirs, strict=True)
        ]
        found[i, j] = fitted(plan, pairs, ridge)[1]
    return found


@dataclass(frozen=True)
class _Whole:
    """What all numbers of blocks share."""

    parents: Mapping[str, TracedModel]
    inputs: Sequence[tuple[Tensor, ...]]
    few: Sequence[tuple[Tensor, ...]]
    parts: Parts
    config: ReassemblyConfig
    known: OutputCache = field(default_factory=OutputCache)


@dataclass(frozen=True)
class _Assessed:
    """A network that was stitched: the less its order, the nearer it is."""

    order: tuple[float, float, int]
    model: Reassembled
    tried: Tried
    groups: tuple[tuple[Block, ...], ...]


def _assessed(
    whole: _Whole, count: int, clock: Clock, done: int, progress: Progress | None
) -> list[_Assessed]:
    """Cut all models into so many blocks, and stitch and assess the candidates.

    ``done`` are those that were stitched of other numbers.
    """
    parents, config = whole.parents, whole.config
    with clock.stage("cut"):
        blocks, groups = _blocks(parents, whole.few, count)
    with clock.stage("search"):
        joins = joins_of(blocks, groups)
        residuals = _residuals(blocks, joins, parents, whole.few, config.ridge)
        candidates = candidates_of(blocks, groups, joins, residuals, config.most_parameters)
    with clock.stage("stitch"):
        modules = [block_module(parents[one.model], one) for one in blocks]
        named = tuple(tuple(blocks[i] for i in group) for group in groups)
        first = next(iter(parents.values()))
        compared = compared_output(first, config.assessment)
        if compared is None:
            raise InputError("networks are chosen by their outputs: assessment must not be 'none'")
        equal = (1.0 / len(parents),) * len(parents)
        means = _means(config.combine, compared[1], first)
        found = list[_Assessed]()
        least = None
        for one in candidates:
            if len(found) == config.candidates:
                break
            model, left = _stitched(
                one, blocks, modules, joins, parents, whole.inputs, config.ridge
            )
            operations = _operations(model, first)
            least = operations if least is None else min(least, operations)
            if config.most_operations is not None and operations > config.most_operations:
                continue
            assessment = compare(
                model,
                parents,
                equal,
                whole.parts,
                config.assessment,
                known=whole.known,
                means=means,
            )
            assert assessment is not None
            own = tuple(blocks[i] for i in one.blocks)
            near = assessment.result  # of classes the agreement tells more than the divergence
            found.append(
                _Assessed(
                    (-(near.agreement or 0.0), near.distance, done + len(found)),
                    model,
                    Tried(own, left, one.parameters, operations, assessment),
                    named,
                )
            )
            if progress is not None:
                progress("stitch", done + len(found))
    if not found:
        raise InputError(
            f"most_operations={config.most_operations}: the smallest network of these blocks takes "
            f"{least} for an input"
        )
    return found


def _means(combine: str, kind: Kind, model: TracedModel) -> Means:
    """Return of what the models' mean is taken, as ``combine`` asks for."""
    if kind == "classes":
        return "logits" if combine == "logits" else "probabilities"
    if combine == "probabilities":
        raise InputError(
            f"combine='probabilities' needs outputs that are classes; the models put out "
            f"{model.outputs_text}. Take 'logits', or say what they are: "
            "assessment.outputs='classes' and assessment.axis"
        )
    return "logits"


@torch.no_grad()
def _stitched(
    candidate: Candidate,
    blocks: Sequence[Block],
    modules: Sequence[torch.nn.Module],
    joins: Joins,
    parents: Mapping[str, TracedModel],
    inputs: Sequence[tuple[Tensor, ...]],
    ridge: float,
) -> tuple[Reassembled, tuple[float | None, ...]]:
    """Return a network with its stitches, each fitted to what comes out of the one before."""
    first = candidate.blocks[0]
    keywords = next(iter(parents.values())).keywords
    made: list[torch.nn.Module] = [modules[first]]
    values = [call_model(modules[first], one, keywords)[0] for one in inputs]
    residuals: list[float | None] = []
    for i, j in pairwise(candidate.blocks):
        plan = joins.plans[i, j]
        residual = None
        if plan is not None:
            node = plan.target.node
            goals = (one[node] for one in cut_values(parents[blocks[j].model], inputs, [node]))
            stitch, residual = fitted(plan, zip(values, goals, strict=True), ridge)
            made.append(stitch)
            values = [stitch(one) for one in values]
        residuals.append(residual)
        made.append(modules[j])
        if blocks[j].end is not None:
            values = [modules[j](one) for one in values]
    return Reassembled(made).eval(), tuple(residuals)


def _operations(model: Reassembled, like: TracedModel) -> int:
    """Return how many floating-point operations a network takes for an input."""
    inputs = like.example_inputs
    rows = inputs[0].size(0)
    return round(count_operations(lambda: call_model(model, inputs, like.keywords)) / rows)
