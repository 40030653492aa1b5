"""Aligned classifiers of other classes -> one trunk and branches: the stages in a row."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from clafusion.alignment.models import AlignedModels, label
from clafusion.assessment.evaluation import network_of
from clafusion.assessment.nearness import FusionAssessment
from clafusion.assessment.parts import Parts, most_assessed, parts_of
from clafusion.calibration.methods import Calibrated, calibrate
from clafusion.calibration.outputs import is_exact
from clafusion.config import Calibration, FusionConfig, NoCalibration
from clafusion.correspondence.correspondence import correspond
from clafusion.execution.call import State
from clafusion.merging.combination import Combination
from clafusion.merging.mean import average
from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
from clafusion.merging.widths import warn_of_uneven_widths
from clafusion.problems import prepared_sources, problem_of
from clafusion.profiling.batches import Data, Progress, batches
from clafusion.profiling.spilled import close_rows
from clafusion.quality import evaluation_of, hash_of
from clafusion.shared_trunk.branches import Branch, branch_of, part_of
from clafusion.shared_trunk.network import SharedTrunk
from clafusion.shared_trunk.result import SharedTrunkResult
from clafusion.shared_trunk.split import Split, aligned_beginnings, chosen_split
from clafusion.shared_trunk.tasks import check_classes, nearness
from clafusion.stages import Clock, warn_of_pinned_channels
from clafusion.targets.sources import sources_of
from clafusion.targets.target import choose_target
from clafusion.tracing.model import TracedModel

__all__ = ["Assembled", "assembled", "fuse_with_branches"]

_WHY = Combination(reason="each has classes of its own")


def fuse_with_branches(
    aligned: AlignedModels,
    data: Data,
    weights: tuple[float, ...],
    config: FusionConfig,
    *,
    data_hash: str | None = None,
    labels: Tensor | None = None,
    progress: Progress | None = None,
) -> SharedTrunkResult:
    """Fuse classifiers of other classes up to a layer, and keep what is behind it.

    Parameters
    ----------
    aligned
        The whole networks, aligned.
    data
        Inputs as :func:`clafusion.fuse` takes them, of all tasks.
    weights
        The parents' weights in the trunk; they add up to 1.
    config
        ``config.shared`` says where the trunk ends.
    data_hash, labels, progress
        As for :func:`clafusion.fusion.fuse_aligned`.

    Raises
    ------
    InputError
        A network puts out no class scores, or ``shared`` is the name of no layer at which the
        networks can be cut.
    StructureError
        The trunks cannot be brought to one structure, or a branch does not run behind the trunk.
    """
    names = aligned.names
    traced = {name: one.traced for name, one in zip(names, aligned.profiles, strict=True)}
    sizes = check_classes({label(name): one for name, one in traced.items()})
    parts = parts_of(data, tuple(traced.values()), config.assessment)
    clock = Clock(aligned.profiles[0].traced.device, aligned.timings, aligned.peak_memory)
    with clock.stage("target"):
        split = chosen_split(aligned, config.shared)
    if split.cuts is None:
        made = _side_by_side(aligned, weights, sizes)
    else:
        warn_of_pinned_channels(names, list(traced.values()), weights)
        problem = _matched(aligned, split, weights, parts.kept, config, clock)
        if progress is not None:
            progress("match", 1)
        made = assembled(aligned, split, problem, sizes, parts.kept, config, clock, progress)
    close_rows(one.rows for one in aligned.profiles)
    result = SharedTrunkResult(
        model=made.model,
        aligned=aligned,
        problem=made.problem,
        config=config,
        weights=weights,
        anchor=made.outcome.anchor,
        averaged=made.outcome.averaged,
        toward=made.outcome.toward,
        timings={},
        sizes=sizes,
        split=split,
        is_exact=made.is_exact,
        data_hash=data_hash or hash_of(data),
    )
    with clock.stage("assess"):
        result = _assessed(result, parts, labels, config, progress)
    return replace(result, timings=clock.seconds, peak_memory=clock.peak_memory)


@dataclass(frozen=True)
class Assembled:
    """What came of a fusion.

    Attributes
    ----------
    model
        The network.
    problem
        That of the trunk.
    outcome
        What the trunk's calibration says.
    is_exact
        Whether the averaged trunk leaves every branch what its own network puts out.
    """

    model: SharedTrunk
    problem: FusionProblem
    outcome: Calibrated
    is_exact: bool


def _side_by_side(
    aligned: AlignedModels, weights: tuple[float, ...], sizes: tuple[int, ...]
) -> Assembled:
    """Return the networks themselves, with their outputs one behind the other."""
    models = [one.traced for one in aligned.profiles]
    network = SharedTrunk(None, [part_of(one, None, None) for one in models], sizes)
    network.train(models[aligned.reference].model.training)
    # The trunk has no layer, and no parent has channels in it.
    bare = [replace(one, layers=(), heads=()) for one in models]
    target = bare[aligned.reference]
    parents = tuple(
        Parent(
            name,
            replace(profile, traced=source),
            correspond(target, source, ()),
            (None,) * len(target.groups),
            MergeWeights(weight),
        )
        for name, profile, source, weight in zip(
            aligned.names, aligned.profiles, bare, weights, strict=True
        )
    )
    problem = FusionProblem(target, parents, aligned.reference, combination=_WHY, is_beginning=True)
    return Assembled(network, problem, Calibrated(network), is_exact=True)


def _matched(
    aligned: AlignedModels,
    split: Split,
    weights: tuple[float, ...],
    data: Data,
    config: FusionConfig,
    clock: Clock,
) -> FusionProblem:
    """Return the problem of the trunk: the beginnings of all networks, matched."""
    trunks = aligned_beginnings(aligned, split)
    with clock.stage("target"):
        chosen = choose_target(trunks, config)
        sources = sources_of(chosen, trunks, is_beginning=True)
    with clock.stage("match"):
        sources = prepared_sources(trunks.names, sources, data, config)
        problem = problem_of(trunks.names, sources, weights, config)
    problem = replace(problem, combination=_WHY, is_beginning=True)
    warn_of_uneven_widths(problem)
    return problem


def assembled(
    aligned: AlignedModels,
    split: Split,
    problem: FusionProblem,
    sizes: tuple[int, ...],
    data: Data,
    config: FusionConfig,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Assembled:
    """Average and calibrate the trunk of a problem, then each branch behind it.

    Other parameters are those of :func:`fuse_with_branches`.
    """
    clock = clock or Clock(problem.target.device)
    assert split.cuts is not None, "something is shared"
    counts, cuts, reference = split.counts, split.cuts, aligned.reference
    like = aligned.profiles[reference].traced
    with clock.stage("merge"):
        branches = [
            branch_of(
                problem,
                profile,
                like,
                i,
                (counts[reference], counts[i]),
                (cuts[reference], cuts[i]),
            )
            for i, profile in enumerate(aligned.profiles)
        ]
        plain = average(problem)
    settings: Calibration = config.used_calibration
    with clock.stage("calibrate"):
        exact = all(_is_exact(one, plain, data) for one in branches)
        if exact:
            settings = NoCalibration()
        outcome = calibrate(problem, data, settings, seed=config.seed, progress=progress)
        state = _state_of(like, outcome.model)
        made = []
        for one in branches:
            own = one.with_trunk(state)
            found = calibrate(own, data, settings, seed=config.seed, progress=progress)
            made.append(part_of(_with_model(own.target, found.model), one.cut, None))
    trunk = part_of(_with_model(like, outcome.model), None, cuts[reference])
    network = SharedTrunk(trunk, made, sizes).train(like.model.training)
    return Assembled(network, problem, outcome, is_exact=exact)


def _is_exact(branch: Branch, trunk: State, data: Data) -> bool:
    """Say whether a branch puts out behind an averaged trunk what it does in its own network."""
    problem = branch.with_trunk(trunk)
    return is_exact(problem, average(problem), data)


def _with_model(traced: TracedModel, model: nn.Module) -> TracedModel:
    return replace(traced, model=model, weights=None)


def _state_of(traced: TracedModel, model: nn.Module) -> State:
    return _with_model(traced, model).state()


def _assessed(
    result: SharedTrunkResult,
    parts: Parts,
    labels: Tensor | None,
    config: FusionConfig,
    progress: Progress | None,
) -> SharedTrunkResult:
    """Return the result with how near it is to its parents, and how good where there are labels."""
    parents = result.parent_models
    first = next(iter(parents.values()))

    def seen(count: int) -> None:
        if progress is not None:
            progress("assess", count)

    if config.assessment.outputs != "none":
        networks = {name: network_of(one.model, first.keywords) for name, one in parents.items()}
        own = network_of(result.model, first.keywords)
        inputs = batches(parts.assessed, first.example_inputs, first.keywords, device=first.device)
        most = most_assessed(held_out=parts.held_out)
        joint, of_tasks, count = nearness(own, networks, result.sizes, inputs, most, seen)
        assessment = FusionAssessment("classes", joint, {}, None, count, parts.held_out)
        result = replace(result, assessment=assessment, nearness=of_tasks)
    if labels is None:
        return result
    return replace(result, evaluation=evaluation_of(result, parts, labels))
