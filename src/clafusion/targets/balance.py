r"""An aligned pair -> one structure: which network gives it, and what stands in it for the other.

The deep network's layers that have no partner are either *added* to the shallow network, as layers
that change nothing, or *merged* away. Where the result is to have the other network's widths, or
another architecture than either's (a given one, or the union of both, where each is the deeper one
somewhere), a network of that structure and those widths is made, and stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from clafusion.alignment.dynamic_program import LayerAlignment
from clafusion.alignment.layer_costs import layer_costs
from clafusion.calibration.least_squares import Parent, frame_as_parent, one_thread, regress
from clafusion.correspondence.correspondence import (
    Correspondence,
    check_lifted,
    lift,
    lifted_state,
    lifting,
    warn_of_counted_channels,
    with_state,
)
from clafusion.errors import InputError, StructureError
from clafusion.matching.united_heads import unite_models
from clafusion.merging.blending import aligned_state
from clafusion.merging.layer_weights import MergeWeights
from clafusion.profiling.batches import Data
from clafusion.profiling.profile import ModelProfile
from clafusion.targets.union import Item, placed, union_items, union_model
from clafusion.tracing.model import Layer, TracedModel, UnitedHeads
from clafusion.tracing.trace import trace_like

__all__ = ["Balance", "Balanced", "Merge", "Width", "balance"]

Balance = Literal["add", "merge"]
Merge = Literal["least_squares", "sum", "majority", "average"]
Width = Literal["own", "first", "second", "narrow", "wide"]


@dataclass(frozen=True)
class Balanced:
    """Two networks that can be averaged layer by layer.

    Attributes
    ----------
    target
        Gives the result its structure, widths and frame.
    source
        Is brought into the target's frame.
    partner
        For each layer of the target the source's layer, -1 where it has none.
    target_only_layers
        Layers of the target that hold nothing of its own: inserted blocks and identity layers.
    target_is_deep
        Whether the target stands for the deep network of the pair.
    """

    target: ModelProfile
    source: ModelProfile
    partner: tuple[int, ...]
    target_only_layers: frozenset[int]
    target_is_deep: bool


def balance(
    deep: ModelProfile,
    shallow: ModelProfile,
    alignment: LayerAlignment,
    data: Data,
    *,
    deep_is_first: bool,
    how: Balance,
    merge: Merge,
    width: Width,
    into: TracedModel | None,
    profile: Callable[[TracedModel], ModelProfile],
    seed: int,
) -> Balanced:
    r"""Bring two aligned networks to one structure.

    Parameters
    ----------
    deep, shallow, alignment
        The networks and their layers' alignment.
    data
        What they were profiled on; used where a network has to be made.
    deep_is_first
        Whether the deep network is the first of the pair, for ``width``.
    how
        ``"add"``: the deep network's structure. ``"merge"``: the shallow one's.
    merge
        How unmatched layers go: ``"least_squares"``: they are left out, and the layers that stay are
        regressed onto what the deep network's put out. ``"sum"``, ``"majority"``, ``"average"``:
        of fully connected networks, ``W_{l+1} diag(d) W_l`` (the layer merging of CLAFusion, arXiv
        2110.15538) with ``d`` from the signs of the layer's pre-activations over the inputs: 1
        where their sum is positive, 1 where most of them are, or the share that is.
    width
        ``"own"``: of the network that gives the structure; else of the first or second network,
        or of the one with fewer or more channels. Inside inserted blocks the deep network's
        stay.
    into
        The architecture of the result, where it is neither network's. Without it, where each
        network is the deeper one somewhere, it is their union, in the deep one's widths.
    profile
        Profiles a made network as the two were.
    seed
        Seed of the choices that least squares makes.

    Raises
    ------
    StructureError
        A width is fixed in a module's code, layers to be merged by signs are not linear, the union
        cannot be built, or ``into`` has no place for a layer.
    InputError
        ``data`` come in another order every time, so that a made network cannot be compared.
    """
    if into is not None or alignment.unmatched_shallow:
        if into is not None and (how == "merge" or width != "own"):
            raise StructureError(
                "into= gives the result's depth and widths; leave balance and width, which are "
                f"{how!r} and {width!r}, as they are by default"
            )
        if how == "merge" or width != "own":
            raise StructureError(
                "each of the two networks has layers that the other has no partner for, so that "
                f"neither architecture can be the result's; balance={how!r} with width={width!r} "
                "is for results of one of them. Give into=, a module of the wanted architecture"
            )
        items = union_items(deep.traced, shallow.traced, alignment)
        template = into or union_model(deep.traced, shallow.traced, alignment)
        name = "the union" if into is None else "into="
        return _in_another(template, name, deep, shallow, items, data, profile, seed)
    if how == "add":
        target, source, partner = deep, shallow, alignment.deep_to_shallow
    else:
        target, source = shallow, deep
        partner = tuple(one for one, _ in alignment.pairs)
        gone = [deep.traced.layers[one] for one in alignment.unmatched]
        if any(layer.insertable == "identity" for layer in gone):
            source = profile(_without_layers(target, source, partner, merge, data, seed))
            partner = tuple(range(len(partner)))
        elif gone and merge != "least_squares":
            raise StructureError(_not_linear(gone[0], merge))
    target_is_deep = how == "add"
    if width == "own":
        return Balanced(target, source, partner, frozenset(), target_is_deep)
    plan = _lifting(target.traced, source.traced, partner)
    if _has_width(width, plan, target_is_first=target_is_deep == deep_is_first):
        return Balanced(target, source, partner, frozenset(), target_is_deep)
    every = tuple(range(len(partner)))
    if partner == every and len(source.traced.layers) == len(every):  # of one depth: swap them
        return Balanced(source, target, every, frozenset(), not target_is_deep)
    if plan.deep.united_heads:
        one, other = plan.deep.united_heads[0], plan.shallow.united_heads[0]
        raise StructureError(
            f"width={width!r} gives {target.traced.layers[one.layer].name!r} {other.count} attention "
            f"heads, but its module's code has {one.count}: give into=, a module that has as many"
        )
    if how == "add":
        made = lift(target.traced.model, plan)
        target_only_layers = frozenset(i for i, k in enumerate(partner) if k < 0)
    else:
        graph = _made(lifted_state(plan), target.traced)
        made, target_only_layers = (
            _made_up_for(graph, source.traced, partner, data, seed),
            frozenset(),
        )
    profile_ = profile(trace_like(made, target.traced))
    return Balanced(profile_, target, every, target_only_layers, not target_is_deep)


def _lifting(target: TracedModel, source: TracedModel, partner: tuple[int, ...]) -> Correspondence:
    """Find what corresponds, where the networks may have different numbers of heads."""
    return lifting(*unite_models(target, source, partner), partner)


def _has_width(width: Width, plan: Correspondence, *, target_is_first: bool) -> bool:
    """Say whether the network that gives the structure also has the wanted widths."""
    if width in ("first", "second"):
        return target_is_first == (width == "first")
    grown = sum(
        one.size - plan.shallow.groups[other].size
        for one, other in zip(plan.deep.groups, plan.groups, strict=True)
        if other >= 0
    )
    return grown == 0 or (grown > 0) == (width == "wide")


def _made(state: Mapping[str, Tensor], like: TracedModel) -> TracedModel:
    """Trace a network of the structure of another one, with weights of other widths."""
    try:
        return trace_like(with_state(like.model, state, like), like)
    except InputError as error:
        raise StructureError(
            "the result cannot have the other network's widths: a width is fixed in the module's "
            f"code ({error})"
        ) from error


def _made_up_for(
    graph: TracedModel,
    original: TracedModel,
    partner: tuple[int, ...],
    data: Data,
    seed: int,
    plans: Sequence[Tensor | None] | None = None,
) -> nn.Module:
    """Regress a network that lacks something onto the one from which it was made."""
    plan = _lifting(graph, original, partner)
    if plans is None:
        plans = [
            None if other < 0 else torch.eye(one.size, dtype=torch.float64)
            for one, other in zip(graph.groups, plan.groups, strict=True)
        ]
    parents = [Parent(plan, plans, MergeWeights(1.0)), frame_as_parent(graph, MergeWeights(0.0))]
    state = regress(parents, graph.state(), data, seed=seed)
    return with_state(graph.model, state, graph)


# --- another architecture -----------------------------------------------------------------------


def _in_another(
    template: TracedModel,
    name: str,
    deep: ModelProfile,
    shallow: ModelProfile,
    items: Sequence[Item],
    data: Data,
    profile: Callable[[TracedModel], ModelProfile],
    seed: int,
) -> Balanced:
    """Bring one network to another architecture, and say how the other one corresponds."""
    changes = _changes(deep), _changes(shallow)
    both = placed(template, deep.traced, shallow.traced, items, changes, name)
    plans_of = [
        _lifting(template, one.traced, layers)
        for one, layers in zip((deep, shallow), both, strict=True)
    ]
    # The frame is better left as it is: it comes from the network that has the wanted widths.
    target_is_deep = _same_widths(plans_of[0]) or not _same_widths(plans_of[1])
    target, source = (deep, shallow) if target_is_deep else (shallow, deep)
    plan, _ = plans_of if target_is_deep else reversed(plans_of)
    of_target, of_source = both if target_is_deep else reversed(both)
    plans = [
        None if other < 0 else _resizing(plan, one.index, target)
        for one, other in zip(plan.deep.groups, plan.groups, strict=True)
    ]
    left_out = set(range(len(target.traced.layers))) - set(of_target)
    if not (left_out or plan.deep.united_heads):
        check_lifted(plan)
    warn_of_counted_channels(plan)
    state = {**template.state(), **aligned_state(plan, plans)}
    model = with_state(template.model, state, template)
    narrower = any(one is not None and one.size(0) > one.size(1) for one in plans)
    if left_out or narrower:
        graph = trace_like(model, template)
        model = _made_up_for(graph, target.traced, of_target, data, seed, plans)
    target_only_layers = frozenset(
        i
        for i, (own, other) in enumerate(zip(of_target, of_source, strict=True))
        if own < 0 <= other
    )
    profile_ = profile(trace_like(model, template))
    return Balanced(profile_, source, of_source, target_only_layers, target_is_deep)


def _changes(profile: ModelProfile) -> list[float]:
    """Return for every layer one minus the linear CKA of what goes in and what comes out."""
    costs = layer_costs(profile, profile)
    return [1.0, *(float(one) for one in np.clip(np.diagonal(costs, -1), 0.0, 1.0))]


def _same_widths(plan: Correspondence) -> bool:
    return all(
        other < 0 or one.size == plan.shallow.groups[other].size
        for one, other in zip(plan.deep.groups, plan.groups, strict=True)
    )


def _resizing(plan: Correspondence, index: int, source: ModelProfile) -> Tensor:
    """Return a plan ``(num_source, num_target)`` that keeps or doubles channels of one network.

    Those are kept, or doubled, that tell the most of all. Of attention heads, of which there are
    other numbers, whole ones are, and channels within them.
    """
    sizes = plan.shallow.groups[plan.groups[index]].size, plan.deep.groups[index].size
    rows = _shown(plan, index, source)
    chosen = None
    for one, other in zip(plan.shallow.united_heads, plan.deep.united_heads, strict=True):
        if index in other.groups:
            inner = sizes[0] // one.count, sizes[1] // other.count
            chosen = torch.cat(
                [
                    block * inner[0]
                    + _kept(*inner, None if rows is None else rows.split(inner[0], 1)[block])
                    for block in _kept_heads(plan, one, other, source)
                ]
            )
    if chosen is None:
        chosen = _kept(*sizes, rows)
    resizing = torch.zeros(sizes, dtype=torch.float64)
    resizing[chosen, torch.arange(sizes[1])] = 1.0
    return resizing


def _shown(plan: Correspondence, index: int, source: ModelProfile) -> Tensor | None:
    """Return ``(num_rows, num_channels)``: a group's values where they show, else None."""
    shown = [source.rows[one.shallow][:, one.shallow_columns] for one in plan.points[index]]
    return torch.cat(shown) if shown else None


def _kept_heads(
    plan: Correspondence, one: UnitedHeads, other: UnitedHeads, source: ModelProfile
) -> list[int]:
    """Choose for each target block one of the source's, the same for all of their groups."""
    if one.count <= other.count:
        return [place % one.count for place in range(other.count)]
    rows = _shown(plan, other.groups[-1], source)
    if rows is None:
        return list(range(other.count))
    size = rows.size(1) // one.count
    blocks = dict.fromkeys((_most_telling(rows) // size).tolist())  # as they first appear
    return sorted(list(blocks)[: other.count])


def _kept(num_source: int, num_target: int, rows: Tensor | None) -> Tensor:
    """Choose for each target channel one of the source's, which ``rows`` show."""
    chosen = torch.arange(min(num_source, num_target))
    if num_source == num_target:
        return chosen
    order = torch.arange(num_source) if rows is None else _most_telling(rows)
    if num_source > num_target:
        return order[:num_target].sort().values
    more = num_target - num_source
    return torch.cat([chosen, order.repeat(more // num_source + 1)[:more]])


def _most_telling(rows: Tensor) -> Tensor:
    """Order channels so that each is the one of which those before it tell the least.

    It is the order of the pivots of the covariance's Cholesky factor, as in column subset selection
    by QR (Businger and Golub, Numer. Math. 1965).
    """
    with one_thread():
        centred = rows.double().cpu()
        centred = centred - centred.mean(0)
        covariance = centred.T @ centred
        left = covariance.diagonal().clone()
        factor = torch.zeros_like(covariance)
        order = []
        for i in range(len(left)):
            pivot = int(left.argmax())
            order.append(pivot)
            column = covariance[pivot] - factor[:, :i] @ factor[pivot, :i]
            factor[:, i] = column / left[pivot].clamp(min=1e-300).sqrt()
            left -= factor[:, i].square()
            left[order] = -torch.inf
    return torch.tensor(order)


# --- layers merged away -------------------------------------------------------------------------


def _without_layers(
    target: ModelProfile,
    source: ModelProfile,
    partner: tuple[int, ...],
    merge: Merge,
    data: Data,
    seed: int,
) -> TracedModel:
    """Return the deep network with its unmatched layers multiplied into the next matched ones."""
    of_source = source.traced.state()
    state = target.traced.state()
    last = -1
    for layer, k in zip(target.traced.layers, partner, strict=True):
        other = source.traced.layers[k]
        state.update(
            {
                name: of_source[theirs].clone()
                for name, theirs in zip(layer.parameters, other.parameters, strict=True)
            }
        )
        for gone in reversed(range(last + 1, k)):
            _multiply(state, layer, source, source.traced.layers[gone], of_source, merge)
        last = k
    if last + 1 < len(source.traced.layers):
        raise StructureError(
            f"layer {source.traced.layers[-1].name!r} comes after all that are matched: there is no "
            "layer left into which it could be merged"
        )
    graph = _made(state, target.traced)
    if merge == "least_squares":
        graph = trace_like(_made_up_for(graph, source.traced, partner, data, seed), graph)
    return graph


def _not_linear(layer: Layer, merge: Merge) -> str:
    return (
        f"layer {layer.name!r} is not a single linear layer, so that merge={merge!r} does not apply; "
        "use merge='least_squares'"
    )


def _multiply(
    state: dict[str, Tensor],
    into: Layer,
    source: ModelProfile,
    gone: Layer,
    of_source: dict[str, Tensor],
    merge: Merge,
) -> None:
    """Multiply an unmatched layer into the layer that stands behind it, in ``state``."""
    weights = []
    for layer, tensors in ((into, state), (gone, of_source)):
        matrices = [name for name in layer.parameters if tensors[name].dim() >= 2]
        vectors = [name for name in layer.parameters if tensors[name].dim() == 1]
        is_linear = (
            len(matrices) == 1
            and tensors[matrices[0]].dim() == 2
            and len(matrices) + len(vectors) == len(layer.parameters) <= 2
        )
        if merge != "least_squares" and not is_linear:
            raise StructureError(_not_linear(layer, merge))
        if len(matrices) != 1:
            raise StructureError(
                f"layer {gone.name!r} cannot be merged into {into.name!r}: {layer.name!r} has "
                f"{len(matrices)} weight matrices, and one is needed; use balance='add'"
            )
        weights.append((matrices[0], vectors[0] if is_linear and vectors else None))
    (into_weight, into_bias), (gone_weight, gone_bias) = weights
    z = source.rows[gone.index, len(gone.hook_points) - 1].double()
    if merge == "sum":
        d = (z.sum(0) > 0).double()
    else:
        d = (z > 0).double().mean(0)
        d = (d > 0.5).double() if merge == "majority" else d
    first, second = of_source[gone_weight].double(), state[into_weight].double()
    for size in reversed(first.shape[2:]):  # of a convolution the centre, where regression starts
        first = first.select(-1, size // 2)
    # Of a flattened image a channel stands for several columns.
    columns = second.reshape(len(second), len(first), -1)
    merged = torch.einsum("ocr,c,ci->oir", columns, d.to(columns), first)
    state[into_weight] = merged.reshape(len(second), -1, *second.shape[2:]).to(state[into_weight])
    if gone_bias is None or merge == "least_squares":
        return
    if into_bias is None:
        raise StructureError(
            f"layer {into.name!r} has no bias to take over that of {gone.name!r}, which is merged "
            f"into it by merge={merge!r}; use merge='least_squares'"
        )
    shift = second @ (d * of_source[gone_bias].double())
    state[into_bias] = (state[into_bias].double() + shift).to(state[into_bias])
