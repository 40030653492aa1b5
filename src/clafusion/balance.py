r"""An aligned pair -> one structure: which network gives it, and what stands in it for the other.

The deep network's units that have no partner are either *added* to the shallow network, as units
that change nothing, or *merged* away. Where the result is to have the other network's widths, a
network of that structure and those widths is made, and stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clafusion.data import Data
from clafusion.depth import Lifting, lift, lifted_state, lifting, with_state
from clafusion.errors import InputError, StructureError
from clafusion.graph import ModelGraph, Unit
from clafusion.layer_alignment import LayerAlignment
from clafusion.least_squares import Parent, frame_as_parent, regress
from clafusion.signatures import Signature
from clafusion.trace import trace

__all__ = ["Balance", "Balanced", "Merge", "Width", "balance"]

Balance = Literal["add", "merge"]
Merge = Literal["least_squares", "sum", "majority", "average"]
Width = Literal["own", "first", "second", "narrow", "wide"]


@dataclass(frozen=True)
class Balanced:
    """Two networks that can be averaged unit by unit.

    Attributes
    ----------
    target
        Gives the result its structure, widths and frame.
    source
        Is brought into the target's frame.
    partner
        For each unit of the target the source's unit, -1 where it has none.
    stand_ins
        Units of the target that hold nothing of its own: inserted blocks that write zero.
    target_is_deep
        Whether the target stands for the deep network of the pair.
    """

    target: Signature
    source: Signature
    partner: tuple[int, ...]
    stand_ins: frozenset[int]
    target_is_deep: bool


def balance(
    deep: Signature,
    shallow: Signature,
    alignment: LayerAlignment,
    data: Data,
    *,
    deep_is_first: bool,
    how: Balance,
    merge: Merge,
    width: Width,
    profile: Callable[[ModelGraph], Signature],
    seed: int,
) -> Balanced:
    r"""Bring two aligned networks to one structure.

    Parameters
    ----------
    deep, shallow, alignment
        The networks and their units' alignment.
    data
        What they were profiled on; used where a network has to be made.
    deep_is_first
        Whether the deep network is the first of the pair, for ``width``.
    how
        ``"add"``: the deep network's structure. ``"merge"``: the shallow one's.
    merge
        How unmatched units go: ``"least_squares"``: they are left out, and the layers that stay are
        regressed onto what the deep network's put out. ``"sum"``, ``"majority"``, ``"average"``:
        of fully connected networks, ``W_{l+1} diag(d) W_l`` (the layer merging of CLAFusion, arXiv
        2110.15538) with ``d`` from the signs of the layer's pre-activations over the inputs: 1
        where their sum is positive, 1 where most of them are, or the share that is.
    width
        ``"own"``: of the network that gives the structure; else of the first or second network,
        or of the one with fewer or more channels. Inside inserted blocks the deep network's
        stay.
    profile
        Profiles a made network as the two were.
    seed
        Seed of the choices that least squares makes.

    Raises
    ------
    StructureError
        A width is fixed in a module's code, or layers to be merged by signs are not linear.
    InputError
        ``data`` come in another order every time, so that a made network cannot be compared.
    """
    if how == "add":
        target, source, partner = deep, shallow, alignment.deep_to_shallow
    else:
        target, source = shallow, deep
        partner = tuple(one for one, _ in alignment.pairs)
        gone = [deep.graph.units[one] for one in alignment.unmatched]
        if any(unit.insertable == "identity" for unit in gone):
            source = profile(_without_layers(target, source, partner, merge, data, seed))
            partner = tuple(range(len(partner)))
        elif gone and merge != "least_squares":
            raise StructureError(_not_linear(gone[0], merge))
    plan = lifting(target.graph, source.graph, partner)
    target_is_deep = how == "add"
    if _has_width(width, plan, target_is_first=target_is_deep == deep_is_first):
        return Balanced(target, source, partner, frozenset(), target_is_deep)
    every = tuple(range(len(partner)))
    if partner == every and len(source.graph.units) == len(every):  # of one depth: swap them
        return Balanced(source, target, every, frozenset(), not target_is_deep)
    if how == "add":
        made = lift(target.graph.model, plan)
        stand_ins = frozenset(
            unit.index
            for unit in target.graph.units
            if partner[unit.index] < 0 and unit.insertable == "zero"
        )
    else:
        graph = _made(lifted_state(plan), target.graph)
        made, stand_ins = _made_up_for(graph, source.graph, partner, data, seed), frozenset()
    signature = profile(_traced(made, target.graph))
    return Balanced(signature, target, every, stand_ins, not target_is_deep)


def _has_width(width: Width, plan: Lifting, *, target_is_first: bool) -> bool:
    """Say whether the network that gives the structure also has the wanted widths."""
    if width in ("first", "second"):
        return target_is_first == (width == "first")
    grown = sum(
        one.size - plan.shallow.classes[other].size
        for one, other in zip(plan.deep.classes, plan.classes, strict=True)
        if other >= 0
    )
    return width == "own" or grown == 0 or (grown > 0) == (width == "wide")


def _inputs(graph: ModelGraph) -> tuple[Tensor, ...] | dict[str, Tensor]:
    names, example = graph.keywords, graph.example_inputs
    return dict(zip(names, example, strict=True)) if names else example


def _traced(model: nn.Module, like: ModelGraph) -> ModelGraph:
    return trace(model, _inputs(like), verify=False)


def _made(state: Mapping[str, Tensor], like: ModelGraph) -> ModelGraph:
    """Trace a network of the structure of another one, with weights of other widths."""
    try:
        return _traced(with_state(like.model, state, like), like)
    except InputError as error:
        raise StructureError(
            "the result cannot have the other network's widths: a width is fixed in the module's "
            f"code ({error})"
        ) from error


def _made_up_for(
    graph: ModelGraph, original: ModelGraph, partner: tuple[int, ...], data: Data, seed: int
) -> nn.Module:
    """Regress a network that lacks some units onto the one from which it was made."""
    plan = lifting(graph, original, partner)
    plans = [
        None if other < 0 else torch.eye(one.size, dtype=torch.float64)
        for one, other in zip(graph.classes, plan.classes, strict=True)
    ]
    parents = [Parent(plan, plans, 1.0), frame_as_parent(graph, 0.0)]
    state = regress(parents, graph.state(), data, seed=seed)
    return with_state(graph.model, state, graph)


def _without_layers(
    target: Signature,
    source: Signature,
    partner: tuple[int, ...],
    merge: Merge,
    data: Data,
    seed: int,
) -> ModelGraph:
    """Return the deep network with its unmatched layers multiplied into the next matched ones."""
    of_source = source.graph.state()
    state = target.graph.state()
    last = -1
    for unit, k in zip(target.graph.units, partner, strict=True):
        other = source.graph.units[k]
        state.update(
            {
                name: of_source[theirs].clone()
                for name, theirs in zip(unit.parameters, other.parameters, strict=True)
            }
        )
        for gone in reversed(range(last + 1, k)):
            _multiply(state, unit, source, source.graph.units[gone], of_source, merge)
        last = k
    if last + 1 < len(source.graph.units):
        raise StructureError(
            f"unit {source.graph.units[-1].name!r} comes after all that are matched: there is no "
            "layer left into which it could be merged"
        )
    graph = _made(state, target.graph)
    if merge == "least_squares":
        graph = _traced(_made_up_for(graph, source.graph, partner, data, seed), graph)
    return graph


def _not_linear(unit: Unit, merge: Merge) -> str:
    return (
        f"unit {unit.name!r} is not a single linear layer, so that merge={merge!r} does not apply; "
        "use merge='least_squares'"
    )


def _multiply(
    state: dict[str, Tensor],
    into: Unit,
    source: Signature,
    gone: Unit,
    of_source: dict[str, Tensor],
    merge: Merge,
) -> None:
    """Multiply an unmatched layer into the layer that stands behind it, in ``state``."""
    weights = []
    for unit, tensors in ((into, state), (gone, of_source)):
        matrices = [name for name in unit.parameters if tensors[name].dim() >= 2]
        vectors = [name for name in unit.parameters if tensors[name].dim() == 1]
        is_linear = (
            len(matrices) == 1
            and tensors[matrices[0]].dim() == 2
            and len(matrices) + len(vectors) == len(unit.parameters) <= 2
        )
        if merge != "least_squares" and not is_linear:
            raise StructureError(_not_linear(unit, merge))
        if len(matrices) != 1:
            raise StructureError(
                f"unit {gone.name!r} cannot be merged into {into.name!r}: {unit.name!r} has "
                f"{len(matrices)} weight matrices, and one is needed; use balance='add'"
            )
        weights.append((matrices[0], vectors[0] if is_linear and vectors else None))
    (into_weight, into_bias), (gone_weight, gone_bias) = weights
    z = source.rows[gone.index, len(gone.read_points) - 1].double()
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
            f"unit {into.name!r} has no bias to take over that of {gone.name!r}, which is merged "
            f"into it by merge={merge!r}; use merge='least_squares'"
        )
    shift = second @ (d * of_source[gone_bias].double())
    state[into_bias] = (state[into_bias].double() + shift).to(state[into_bias])
