"""Up to which layer networks share a trunk, and their beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from clafusion.alignment.models import AlignedModels, PairAlignment, label
from clafusion.errors import FusionWarning, InputError, StructureError, warn
from clafusion.profiling.profile import ModelProfile
from clafusion.profiling.spilled import with_columns
from clafusion.reassembly.blocks import nodes_between
from clafusion.reassembly.cutting import Cut, cuts_behind_layers
from clafusion.tracing.model import TracedModel

__all__ = ["Split", "aligned_beginnings", "beginning", "chosen_split", "possible_splits"]


@dataclass(frozen=True)
class Split:
    """Where the shared trunk ends in each network.

    Attributes
    ----------
    counts
        How many of each network's layers are in the trunk: the first ones.
    cuts
        The value that each network's branch reads; None where nothing is shared.
    layers
        The name of each network's last layer in the trunk; "" where nothing is shared.
    """

    counts: tuple[int, ...]
    cuts: tuple[Cut, ...] | None
    layers: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is shared."""
        return self.cuts is None


def chosen_split(aligned: AlignedModels, shared: float | str) -> Split:
    """Return where the trunk ends.

    Parameters
    ----------
    aligned
        The networks.
    shared
        The share of the reference's layers, from 0 for none to 1 for as many as can be; the nearest
        place is taken at which the networks can be cut. Or the name of the last layer in the trunk,
        as the reference, or another network in which it stands, calls it.

    Raises
    ------
    InputError
        There is no such layer, or the networks cannot be cut behind it.

    Warns
    -----
    FusionWarning
        A share is asked for, and there is no place where all networks can be cut.
    """
    none = Split((0,) * len(aligned.names), None, ("",) * len(aligned.names))
    if shared == 0:
        return none
    found = possible_splits(aligned)
    if not isinstance(shared, str):
        if not found:
            warn(
                f"nothing is shared, where {shared} of the layers were asked for: there is no "
                "layer behind which all networks can be cut. The result is the networks side by "
                "side",
                FusionWarning,
            )
        most = found[-1].counts[aligned.reference] if found else 0
        every = [none, *found]
        return min(every, key=lambda one: abs(one.counts[aligned.reference] - shared * most))
    order = [aligned.reference, *range(len(aligned.names))]
    for i in order:
        for one in found:
            if one.layers[i] == shared:
                return one
    known = ", ".join(repr(one.layers[aligned.reference]) for one in found) or "none"
    deepest = label(aligned.names[aligned.reference])
    is_layer = any(shared in aligned.layer_names(i) for i in order)
    what = (
        "is a layer behind which not all networks can be cut"
        if is_layer
        else "is the name of no layer"
    )
    raise InputError(
        f"shared={shared!r} {what}. The layers of {deepest}, which gives the trunk, with which it "
        f"can end are {known}; or give a share of its layers in [0, 1]"
    )


def possible_splits(aligned: AlignedModels) -> tuple[Split, ...]:
    """Return all places at which a trunk can end, the first one first.

    All networks have one value there through which alone passes what they compute, with equal
    positions, and a layer behind it; and no weight stands on both sides.
    """
    reference = aligned.reference
    models = [one.traced for one in aligned.profiles]
    cuts = [cuts_behind_layers(one) for one in models]
    found = []
    for count in range(1, len(models[reference].layers)):
        counts = [_partners(pair, count) for pair in aligned.alignments]
        if any(k < 1 or k >= len(one.layers) for k, one in zip(counts, models, strict=True)):
            continue
        chosen = [of[k - 1] for of, k in zip(cuts, counts, strict=True)]
        cut = chosen[reference]
        if cut is None or any(
            one is None or one.positions != cut.positions or one.axis != cut.axis for one in chosen
        ):
            continue
        given = tuple(one for one in chosen if one is not None)
        if all(_parts(one, k, of) for one, k, of in zip(models, counts, given, strict=True)):
            names = tuple(one.layers[k - 1].name for one, k in zip(models, counts, strict=True))
            found.append(Split(tuple(counts), given, names))
    return tuple(found)


def _partners(pair: PairAlignment | None, count: int) -> int:
    """Return how many of a network's layers match the reference's first ``count``."""
    if pair is None:
        return count
    return sum(k >= 0 for k in pair.alignment.deep_to_shallow[:count])


def _parts(model: TracedModel, count: int, cut: Cut) -> bool:
    """Say whether a cut parts a network's layers, and no weight stands on both sides of it."""
    order = {node.name: i for i, node in enumerate(model.module.graph.nodes)}
    place = order[cut.node]
    if not model.layers[count - 1].hook_points:
        return False
    if any(order[one.output] > place for one in model.layers[:count]) or any(
        order[one.output] <= place for one in model.layers[count:]
    ):
        return False
    before, behind = (
        {model.entries[one] for one in nodes if one in model.entries}
        for nodes in (nodes_between(model, None, cut), nodes_between(model, cut, None))
    )
    trained = {model.aliases.get(one, one) for one, _ in model.model.named_parameters()}
    return not before & behind & trained


# --- beginnings ---------------------------------------------------------------------------------


def beginning(model: TracedModel, count: int, cut: Cut) -> TracedModel:
    """Return the first layers of a network, up to a cut whose value it puts out.

    Groups and state are those of the whole network.
    """
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in model.module.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = node.name  # by which layers and points know it
        if node.name == cut.node:
            break
    graph.output((made[node],))
    return replace(
        model,
        module=fx.GraphModule(model.module, graph),
        layers=model.layers[:count],
        heads=tuple(one for one in model.heads if one.layer < count),
        thinning=None,
    )


def aligned_beginnings(aligned: AlignedModels, split: Split) -> AlignedModels:
    """Return the networks' trunks, aligned as the whole networks are."""
    assert split.cuts is not None, "something is shared"
    profiles = []
    for one, count, cut in zip(aligned.profiles, split.counts, split.cuts, strict=True):
        profiles.append(_profile_of(one, beginning(one.traced, count, cut)))
    alignments = [
        None if pair is None else _beginning_of(pair, split.counts) for pair in aligned.alignments
    ]
    return replace(aligned, profiles=tuple(profiles), alignments=tuple(alignments))


def _profile_of(whole: ModelProfile, traced: TracedModel) -> ModelProfile:
    """Return the profile of a network's beginning: only what lies in that was seen."""
    nodes = {node.name for node in traced.module.graph.nodes}
    moments = whole.moments
    if moments is not None:
        moments = tuple({k: one for k, one in of.items() if k in nodes} for of in moments)
    kept = [key for key in whole.rows if key[0] < len(traced.layers)]
    rows = with_columns(whole.rows, dict.fromkeys(kept))
    return replace(whole, traced=traced, rows=rows, moments=moments)


def _beginning_of(pair: PairAlignment, counts: Sequence[int]) -> PairAlignment:
    whole = pair.alignment
    deep, shallow = counts[pair.deep], counts[pair.shallow]
    if whole.unmatched_shallow:
        raise StructureError(
            "outputs='both' shares a trunk of networks of which one is everywhere at least as deep "
            "as the others; of these each is the deeper one somewhere. Take shared=0, which puts "
            "them side by side, or train one network on all classes"
        )
    part = replace(
        whole,
        deep_to_shallow=whole.deep_to_shallow[:deep],
        cost=whole.cost[:deep, :shallow],
        skip=whole.skip[:deep],
        pin_last=False,
    )
    total = sum(float(part.cost[i, k]) for i, k in part.pairs)
    return replace(
        pair,
        costs=pair.costs[:deep, :shallow],
        alignment=replace(part, total_cost=total),
    )
