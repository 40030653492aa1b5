"""A chosen target -> how every parent maps to it, and what the target's channels do on the data.

Where the target is a parent's own model, its channels are that parent's. Else every channel group
of the target gets its channels from one parent, the first that has it: they are kept or doubled
where the numbers differ. What the target's channels do is then known without running it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clafusion.alignment.models import AlignedModels, label, naming
from clafusion.correspondence.correspondence import (
    Correspondence,
    correspond,
    identity_correspondence,
    identity_plans,
    warn_of_counted_channels,
)
from clafusion.correspondence.heads import unite_heads, unite_models
from clafusion.correspondence.hooks import source_hook
from clafusion.correspondence.inserted import check_inserted, warn_of_other_operations
from clafusion.correspondence.moving import move_state, move_values
from clafusion.execution.lazy import overlaid
from clafusion.profiling.profile import ModelProfile
from clafusion.targets.resizing import resizing_plan
from clafusion.targets.target import ChosenTarget
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import ChannelGroup, TracedModel
from clafusion.transport.plan import TransportPlan
from clafusion.weights.build import with_weights

__all__ = ["Source", "TargetSources", "source_of", "sources_of"]


@dataclass(frozen=True)
class Source:
    """A parent as the target sees it.

    Attributes
    ----------
    correspondence
        How it maps to the target. Heads of which the two have different numbers are united in it.
    profile
        The parent's profile, with the same heads united.
    target
        The target's profile, with the same heads united.
    plans
        Plans that are known already, by group: those of channels that the parent gives the target.
    rotations
        Group of the target -> the orthogonal matrix by which the parent's channels ``x`` have
        become ``x @ rotation``. The correspondence and the profile are of the rotated parent.
    orders
        Where modules of a list, as experts, have changed places: index in the parent's ``heads`` ->
        for every place the module that came there. The correspondence and the profile are of the
        parent in that order.
    """

    correspondence: Correspondence
    profile: ModelProfile
    target: ModelProfile
    plans: Mapping[int, TransportPlan]
    rotations: Mapping[int, Tensor] = field(default_factory=dict)
    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetSources:
    """A target and its sources.

    Attributes
    ----------
    profile
        What the target's channels do. ``profile.traced`` is the target; its module holds the
        weights of the parent that gives it most of its channels.
    sources
        For each parent how it maps to the target.
    reference
        Position of the parent that gives the target most of its channels.
    """

    profile: ModelProfile
    sources: tuple[Source, ...]
    reference: int


def sources_of(
    chosen: ChosenTarget, aligned: AlignedModels, *, is_beginning: bool = False
) -> TargetSources:
    """Map every parent to the target.

    Of the beginning of a network that parents keep their functions in the target's structure is
    not checked here: their modules are those of the whole networks.

    Raises
    ------
    StructureError
        A parent differs from the target in more than widths and depth, or the layers that are
        inserted into it change its function.

    Warns
    -----
    WidthWarning
        See :func:`clafusion.correspondence.correspondence.warn_of_counted_channels`.
    FusionWarning
        See :func:`clafusion.correspondence.inserted.warn_of_other_operations`.
    """
    if chosen.owner is None:
        found = _of_template(chosen, aligned)
    else:
        found = _of_owner(chosen, aligned, chosen.owner)
    for i, one in enumerate(found.sources):
        correspondence = one.correspondence
        if i == chosen.owner:
            continue
        if correspondence.uses_all_layers and not is_beginning:
            with naming(aligned.names[i]):
                check_inserted(correspondence)
        if not is_beginning:
            warn_of_other_operations(correspondence, label(aligned.names[i]))
        warn_of_counted_channels(correspondence, label(aligned.names[i]))
    return found


def source_of(
    target: ModelProfile,
    profile: ModelProfile,
    layer_map: tuple[int, ...],
    products: Mapping[str, Tensor] | None = None,
) -> Source:
    """Map a parent to a target whose profile is known."""
    view, source = unite_heads(target, profile, layer_map)
    correspondence = correspond(view.traced, source.traced, layer_map, products)
    return Source(correspondence, source, view, {})


def _of_owner(chosen: ChosenTarget, aligned: AlignedModels, owner: int) -> TargetSources:
    target = aligned.profiles[owner]
    sources = []
    for i, profile in enumerate(aligned.profiles):
        if i == owner:
            plans = dict(enumerate(identity_plans(target.traced)))
            own = identity_correspondence(target.traced)
            sources.append(Source(own, target, target, plans))
        else:
            with naming(aligned.names[i]):
                source = source_of(target, profile, chosen.layer_maps[i], chosen.products[i])
            sources.append(source)
    return TargetSources(target, tuple(sources), owner)


# --- a target that is nobody's ------------------------------------------------------------------


def _of_template(chosen: ChosenTarget, aligned: AlignedModels) -> TargetSources:
    template = chosen.model
    drafts: list[_Draft] = []
    for name, profile, of, products in zip(
        aligned.names, aligned.profiles, chosen.layer_maps, chosen.products, strict=True
    ):
        view, source = unite_models(template, profile.traced, of)
        with naming(name):
            drafts.append(_Draft(correspond(view, source, of, products), profile))
    order = _order([one.correspondence for one in drafts])
    givers = _givers([one.correspondence for one in drafts], order, template)
    plans = [_given_plans(i, one, givers, template) for i, one in enumerate(drafts)]
    first = drafts[order[0]].correspondence
    every = [plans[order[0]].get(one.index) for one in first.target.groups]
    target = with_weights(template, overlaid(template.state(), move_state(first, every)))
    profile = _composed(target, drafts, plans, order, givers)
    sources = tuple(
        replace(source_of(profile, original, of, products), plans=known)
        for original, of, products, known in zip(
            aligned.profiles, chosen.layer_maps, chosen.products, plans, strict=True
        )
    )
    return TargetSources(profile, sources, order[0])


@dataclass(frozen=True)
class _Draft:
    """A parent while the target's own profile is not known yet.

    Its rows are those of ``profile``; which channels they show, ``correspondence.source`` says.
    """

    correspondence: Correspondence
    profile: ModelProfile


def _order(correspondences: Sequence[Correspondence]) -> list[int]:
    """Return the parents in the order in which they give the target channels.

    Those that have the target's widths come first, then the deeper ones: the target's channels are
    better left as they are.
    """
    return sorted(
        range(len(correspondences)),
        key=lambda i: (
            not correspondences[i].changes_no_width,
            -len(correspondences[i].source.layers),
            i,
        ),
    )


def _givers(
    correspondences: Sequence[Correspondence], order: Sequence[int], template: TracedModel
) -> list[int]:
    """Return for each channel group of the template the parent that gives it its channels."""
    givers = [-1] * len(template.groups)
    for i in reversed(order):
        one = correspondences[i]
        for group, other in zip(one.target.groups, one.groups, strict=True):
            if other >= 0:
                for index in _parts(template, one.target, group.index):
                    givers[index] = i
    return givers


def _parts(template: TracedModel, view: TracedModel, index: int) -> list[int]:
    """Return the template's groups of which a group of its view with united heads is made."""
    if view is template:
        return [index]
    atoms = set(view.groups[index].atoms.tolist())
    return [one.index for one in template.groups if int(one.atoms[0]) in atoms]


def _given_plans(
    position: int, draft: _Draft, givers: Sequence[int], template: TracedModel
) -> dict[int, TransportPlan]:
    """Return the plans by which a parent gives the target its channels."""
    correspondence = draft.correspondence
    return {
        group.index: resizing_plan(correspondence, group.index, draft.profile)
        for group, other in zip(correspondence.target.groups, correspondence.groups, strict=True)
        if other >= 0
        and all(
            givers[one] == position for one in _parts(template, correspondence.target, group.index)
        )
    }


def _composed(
    target: TracedModel,
    drafts: Sequence[_Draft],
    plans: Sequence[Mapping[int, TransportPlan]],
    order: Sequence[int],
    givers: Sequence[int],
) -> ModelProfile:
    """Return what the target's channels do, from what the parents' do."""
    first = drafts[order[0]].profile
    rows: dict[tuple[int, int], Tensor] = {}
    of_structure = set[tuple[int, int]]()
    for layer in target.layers:
        for index in range(len(layer.hook_points)):
            for i in order:
                moved = _moved_rows(layer, index, drafts[i], plans[i])
                if moved is not None:
                    rows[layer.index, index] = moved
                    if (
                        _shown(drafts[i].correspondence, layer, index)
                        in drafts[i].profile.of_structure
                    ):
                        of_structure.add((layer.index, index))
                    break
    last, of_first = target.layers[-1], first.traced.layers[-1]
    outputs = first.rows.get((of_first.index, len(of_first.hook_points)))
    if outputs is not None:
        rows[last.index, len(last.hook_points)] = outputs
        if (of_first.index, len(of_first.hook_points)) in first.of_structure:
            of_structure.add((last.index, len(last.hook_points)))
    return replace(
        first,
        traced=target,
        grams=(),
        features=(),
        rows=rows,
        importance=_composed_importance(target, drafts, plans, givers),
        moments=None,
        sensitivity=None,
        of_structure=frozenset(of_structure),
    )


def _moved_rows(
    layer: Layer, index: int, draft: _Draft, plans: Mapping[int, TransportPlan]
) -> Tensor | None:
    """Return a hook point's rows from a parent; None where it does not give those channels."""
    correspondence, profile = draft.correspondence, draft.profile
    key = _shown(correspondence, layer, index)
    if key is None or key not in profile.rows:
        return None
    hook = correspondence.target.layers[layer.index].hook_points[index]
    other = correspondence.source.layers[key[0]].hook_points[key[1]]
    groups = hook.groups[hook.groups >= 0].unique().tolist()
    if not all(one in plans for one in groups):
        return None
    if correspondence.layer_map[layer.index] < 0 and hook.post == layer.output:
        # What leaves an inserted layer has passed a nonlinearity already; see ``flowing``.
        key = next(one for one in ((key[0], ~key[1]), key) if one in profile.rows)
    every = [plans.get(one.index) for one in correspondence.target.groups]
    return move_values(profile.rows[key], correspondence, every, hook, other)


def _shown(correspondence: Correspondence, layer: Layer, index: int) -> tuple[int, int] | None:
    """Return where a parent shows a hook point, also what flows past a block that it lacks."""
    key = source_hook(correspondence.source, correspondence.layer_map, layer, index)
    if key is not None or layer.index not in correspondence.passing:
        return key
    if index != len(layer.hook_points) - 1 or layer.hook_points[index].post != layer.output:
        return None
    before = [one for one in correspondence.layer_map[: layer.index] if one >= 0][-1]
    hooks = correspondence.source.layers[before].hook_points
    if hooks[-1].positions != layer.hook_points[index].positions:  # a pooling lies between
        return None
    return before, len(hooks) - 1


def _composed_importance(
    target: TracedModel,
    drafts: Sequence[_Draft],
    plans: Sequence[Mapping[int, TransportPlan]],
    givers: Sequence[int],
) -> tuple[Tensor, ...]:
    """Return the masses of the target's channels: those of the channels that they are copies of."""
    if not drafts[0].profile.importance:
        return ()
    masses = []
    for group in target.groups:
        given = torch.full((group.size,), 1 / group.size, dtype=torch.float64)
        giver = givers[group.index]
        if giver >= 0:
            correspondence, profile = drafts[giver].correspondence, drafts[giver].profile
            view = _same_group(correspondence.target, group)
            if view is not None:  # else it is part of united heads, whose channels count alike
                of_source = correspondence.source.groups[correspondence.groups[view.index]]
                own = _same_group(profile.traced, of_source)
                if own is not None:
                    given = plans[giver][view.index].outgoing(profile.importance[own.index])
        masses.append(given / given.sum())
    return tuple(masses)


def _same_group(model: TracedModel, group: ChannelGroup) -> ChannelGroup | None:
    """Return a model's group of the same channels; None where heads were united, or were not."""
    return next((one for one in model.groups if torch.equal(one.atoms, group.atoms)), None)
