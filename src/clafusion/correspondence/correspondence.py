"""Two traced models + a layer map -> which parameters, channels and values correspond.

The *source* is brought to the *target*'s structure. Where the target has a layer that the source
lacks, a layer stands for it that changes nothing: in a chain one with identity weights, exact
because its input has passed the same idempotent activation (ReLU) before; in a residual network a
block whose last write is zero. Where the source has layers that the target lacks, they are left
out, or multiplied into the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from clafusion.correspondence.hooks import HookPair, SharedHooks, source_hook
from clafusion.correspondence.shared_heads import lacks_heads, share_otherwise
from clafusion.errors import InputError, StructureError, WidthWarning, check_type, warn
from clafusion.tracing.layer import CalibrationPoint, HookPoint, Layer
from clafusion.tracing.model import TracedModel
from clafusion.transport.plan import TransportPlan

__all__ = [
    "Correspondence",
    "Origin",
    "correspond",
    "identity_correspondence",
    "identity_plans",
    "warn_of_counted_channels",
]

Origin = Literal["matched", "identity", "zero_residual", "target_only"]


@dataclass(frozen=True)
class Correspondence:
    """How one network, the source, maps to the target's structure.

    Attributes
    ----------
    target, source
        The network that gives the structure and the one that is brought to it.
    layer_map
        For each layer of the target the source's, -1 where it has none.
    origins
        For each parameter and buffer of the target where the source's comes from: ``"matched"``
        (the source's parameter in ``names``), ``"identity"`` (part of an inserted identity layer),
        ``"zero_residual"`` (the last write of an inserted block: zero, or what a layer's
        ``fillings`` say) or ``"target_only"``
        (inside an inserted block, where any value will do: the source has none).
    names
        Parameter of the target -> parameter of the source, where matched.
    groups
        For each channel group of the target the source's, or -1 where it has none (inside an
        inserted block).
    hooks
        For each channel group of the target the hook points by which to match it.
    points
        Node of a calibration point of the target -> the source's point, where the layers are
        matched, or the source's value that flows past an inserted identity layer.
    passing
        Layer of the target that the source lacks -> the source's value that flows past it.
    products
        Parameter of the target -> the product of source layers that stands for it, where layers
        that the target lacks are multiplied into the next one; in the source's channels.
    """

    target: TracedModel
    source: TracedModel
    layer_map: tuple[int, ...]
    origins: Mapping[str, Origin]
    names: Mapping[str, str]
    groups: tuple[int, ...]
    hooks: tuple[tuple[HookPair, ...], ...]
    points: Mapping[str, CalibrationPoint]
    passing: Mapping[int, CalibrationPoint]
    products: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        matched = sum(k >= 0 for k in self.layer_map)
        return f"<Correspondence: {matched} of {len(self.layer_map)} layers matched>"

    @cached_property
    def head_counts(self) -> Mapping[int, tuple[int, int]]:
        """How many united heads the source and the target have, for the target's groups of such."""
        pairs = zip(self.target.united_heads, self.source.united_heads, strict=True)
        return {index: (of.count, to.count) for to, of in pairs for index in to.groups}

    @cached_property
    def shared_hooks(self) -> SharedHooks:
        """Which hook points show the same value in both networks."""
        return SharedHooks(self.target, self.source, self.layer_map)

    @cached_property
    def target_points(self) -> Mapping[str, CalibrationPoint]:
        """The target's calibration points by node."""
        return {one.node: one for layer in self.target.layers for one in layer.calibration_points}

    @property
    def uses_all_layers(self) -> bool:
        """Whether every layer of the source has a place in the target."""
        return set(self.layer_map) >= set(range(len(self.source.layers)))

    @property
    def changes_no_width(self) -> bool:
        """Whether all groups that both networks have are of equal size, in as many places."""
        return not self.shares_otherwise and all(
            other < 0 or one.size == self.source.groups[other].size
            for one, other in zip(self.target.groups, self.groups, strict=True)
        )

    @property
    def shares_otherwise(self) -> bool:
        """Whether other numbers of heads of queries share one of keys somewhere."""
        return any(
            other >= 0 and one.sharing != self.source.groups[other].sharing
            for one, other in zip(self.target.groups, self.groups, strict=True)
        )


def correspond(
    target: TracedModel,
    source: TracedModel,
    layer_map: tuple[int, ...],
    products: Mapping[str, Tensor] | None = None,
) -> Correspondence:
    """Find what corresponds under a layer map.

    Raises
    ------
    InputError
        A model is not traced, or the layer map is of other networks.
    StructureError
        Matched layers differ in more than widths, or one channel group of the target would
        correspond to two of the source.
    """
    _check_arguments(target, source, layer_map)
    check_type(products, (Mapping, type(None)), "products", "a mapping of names to tensors or None")
    origins: dict[str, Origin] = {}
    names: dict[str, str] = {}
    points: dict[str, CalibrationPoint] = {}
    passing: dict[int, CalibrationPoint] = {}
    for layer, k in zip(target.layers, layer_map, strict=True):
        if k >= 0:
            other = source.layers[k]
            _match_parameters(layer, other, names)
            for one, point in zip(layer.calibration_points, other.calibration_points, strict=True):
                points[one.node] = point
            continue
        inner: Origin = "identity" if layer.insertable == "identity" else "target_only"
        for parameter in layer.parameters:
            origins.setdefault(parameter, inner)
        origins.update({name: "identity" for name, _ in layer.fillings})
        origins.update(dict.fromkeys(layer.last_write, "zero_residual"))
        shown = _passing(target, source, layer_map, layer)
        if shown is not None and layer.insertable == "zero":
            passing[layer.index] = shown
        elif shown is not None:  # what leaves an identity is what flows past it in the source
            points.update({one.node: shown for one in layer.calibration_points})
    for layer, k in zip(target.layers, layer_map, strict=True):  # a matched layer's stay so
        if k >= 0:
            origins.update(dict.fromkeys(layer.parameters, "matched"))
    _check_counts(target, layer_map, origins)
    for name in target.state():
        origins.setdefault(name, "target_only")
    groups = _match_groups(target, source, names, layer_map)
    shared = SharedHooks(target, source, layer_map)
    hooks = tuple(tuple(shared.pairs(one.index, groups[one.index])) for one in target.groups)
    return Correspondence(
        target, source, layer_map, origins, names, groups, hooks, points, passing, products or {}
    )


def _check_arguments(target: Any, source: Any, layer_map: Any) -> None:
    for name, model in (("target", target), ("source", source)):
        check_type(model, TracedModel, name, "a traced model, as clafusion.trace returns it")
    count, most = len(target.layers), len(source.layers) - 1
    is_whole = isinstance(layer_map, Sequence) and all(
        isinstance(k, Integral) and -1 <= int(k) <= most for k in layer_map
    )
    if not is_whole or len(layer_map) != count:
        raise InputError(
            f"layer_map must be {count} whole numbers, one for each layer of the target: which of "
            f"the source's layers matches it, up to {most}, or -1 for none; got {layer_map!r}"
        )


def _check_counts(
    target: TracedModel, layer_map: tuple[int, ...], origins: Mapping[str, Origin]
) -> None:
    """Refuse to insert a layer whose weights a matched layer has, too."""
    for layer, k in zip(target.layers, layer_map, strict=True):
        shared = [name for name in layer.parameters if origins[name] == "matched"]
        needed = {*layer.last_write, *(name for name, _ in layer.fillings)}
        if layer.insertable == "identity":
            needed = set(layer.parameters)
        found = [name for name in shared if name in needed]
        if k < 0 and found:
            raise StructureError(
                f"layer {layer.name!r} cannot be inserted, for other layers have its weights "
                f"({found[0]!r}), too: where one layer runs again and again (as in ALBERT), the "
                "depth is a count and not a matter of weights. Give networks with equal counts"
            )


def _passing(
    target: TracedModel, source: TracedModel, layer_map: tuple[int, ...], layer: Layer
) -> CalibrationPoint | None:
    """Return the source's value that flows past an inserted layer, where it shows."""
    if layer.insertable == "identity":
        key = source_hook(source, layer_map, layer, len(layer.hook_points) - 1)
        return None if key is None else _flow_point(source.layers[key[0]].hook_points[key[1]])
    matched = [
        i for i in target.streams[layer.stream].layers if i < layer.index and layer_map[i] >= 0
    ][-1:]
    # Before a post-norm block flows what its norm makes of the value, which shows nowhere.
    is_normed = bool({name for name, _ in layer.fillings} - set(layer.last_write))
    if layer.insertable == "zero" and matched and not is_normed:
        last, following = _following(source, layer_map[matched[0]])
        glue = [
            name for one in target.layers[matched[0] + 1 : layer.index + 1] for name in one.leading
        ]
        if last.hook_points and last.hook_points[-1].post == last.output:
            # As many poolings lie before the block as in the target.
            nodes = [last.output, *following]
            if len(glue) < len(nodes) and not set(following[: len(glue)]) & source.reshapes:
                return replace(_flow_point(last.hook_points[-1]), node=nodes[len(glue)])
    return None


def _following(source: TracedModel, k: int) -> tuple[Layer, tuple[str, ...]]:
    """Return a layer, and the nodes between it and the next one."""
    layer = source.layers[k]
    rest = [one for one in source.layers[k + 1 : k + 2] if one.stream == layer.stream]
    return layer, rest[0].leading if rest else ()


def _flow_point(hook: HookPoint) -> CalibrationPoint:
    """Return a calibration point that shows a value which no layer of its own makes."""
    return CalibrationPoint(
        hook.post, None, None, None, hook.axis, "", None, hook.groups, hook.members
    )


def _match_parameters(layer: Layer, other: Layer, names: dict[str, str]) -> None:
    if len(layer.parameters) != len(other.parameters) or len(layer.calibration_points) != len(
        other.calibration_points
    ):
        raise StructureError(
            f"layers {layer.name!r} and {other.name!r} are matched but have "
            f"{len(layer.parameters)} and {len(other.parameters)} parameters"
        )
    for one, two in zip(layer.parameters, other.parameters, strict=True):
        if names.setdefault(one, two) != two:
            raise StructureError(
                f"it has two parameters, {names[one]!r} and {two!r}, where the network that gives "
                f"the structure has one, {one!r}, which several layers share. Tie the two, or give "
                "each of those layers a parameter of its own"
            )


def _match_groups(
    target: TracedModel,
    source: TracedModel,
    names: Mapping[str, str],
    layer_map: tuple[int, ...],
) -> tuple[int, ...]:
    votes = _Votes(target, source)
    # What a layer reads has no partner where other layers come before it in the source.
    apart = {
        name
        for layer, before in zip(target.layers[1:], layer_map, strict=False)
        if before >= 0 and layer_map[layer.index] > before + 1
        for name in layer.parameters
    }
    for name, other_name in names.items():
        votes.of_parameter(name, other_name, reads_apart=name in apart)
    state = target.state()
    for layer, k in zip(target.layers, layer_map, strict=True):
        if k < 0 and layer.insertable == "identity":
            weight = next(p for p in layer.parameters if state[p].dim() > 1)
            by_direction: dict[str, set[int]] = {"in": set(), "out": set()}
            for group, axis in target.axes_by_parameter.get(weight, ()):
                by_direction[axis.direction].add(group.index)
            (incoming,), (outgoing,) = by_direction["in"], by_direction["out"]
            votes.vote(outgoing, votes.found[incoming], weight)
    return tuple(votes.found.get(one.index, -1) for one in target.groups)


class _Votes:
    """Collect which group of the source corresponds to each of the target's."""

    def __init__(self, target: TracedModel, source: TracedModel) -> None:
        self.target = target
        self.source = source
        self.found: dict[int, int] = {}

    def vote(self, one: int, other: int, where: str) -> None:
        if self.found.setdefault(one, other) != other:
            raise StructureError(
                f"the channels of {self.target.groups[one].name!r} would have to match those of "
                f"both {self.source.groups[self.found[one]].name!r} and "
                f"{self.source.groups[other].name!r} (at {where!r}); the networks are wired "
                "differently"
            )

    def of_parameter(self, name: str, other_name: str, *, reads_apart: bool) -> None:
        other_axes = self.source.axes_of(other_name)
        for (use, axis), one in self.target.axes_of(name).items():
            if reads_apart and all(group_axis.direction == "in" for _, group_axis in one):
                continue
            other = other_axes.get((use, axis), [])
            if len(one) != len(other):
                raise StructureError(
                    f"axis {axis} of {name!r} carries {len(one)} channel group(s), that of "
                    f"{other_name!r} {len(other)}; the networks are wired differently, or have "
                    "different numbers of heads or groups that cannot change places (each has a "
                    "parameter or position of its own): only equal numbers of those can be fused"
                )
            for (group, group_axis), (other_group, other_axis) in zip(one, other, strict=True):
                self.vote(group.index, other_group.index, name)
                repeats = group_axis.positions.size(1), other_axis.positions.size(1)
                if repeats[0] != repeats[1] and not share_otherwise(group, other_group, *repeats):
                    raise StructureError(
                        f"in axis {axis} of {name!r} a channel stands for {repeats[0]} positions, "
                        f"in its partner for {repeats[1]}; the inputs or the strides differ, or "
                        "how many heads of queries share one of keys where these lie in one weight"
                    )


def identity_correspondence(model: TracedModel) -> Correspondence:
    """Return what corresponds in a network and itself."""
    return correspond(model, model, tuple(range(len(model.layers))))


def identity_plans(model: TracedModel) -> tuple[TransportPlan, ...]:
    """Return for each group the plan that leaves its channels where they are."""
    return tuple(TransportPlan.identity(one.size) for one in model.groups)


def warn_of_counted_channels(correspondence: Correspondence, name: str = "the source") -> None:
    """Warn where the networks' numbers of channels differ, and copies of a channel add up.

    Warns
    -----
    WidthWarning
        The message names the channels. See :attr:`ChannelGroup.is_counted`. Another one names
        the keys that fewer heads of queries share in the target.
    """
    target, source = correspondence.target, correspondence.source
    heads = correspondence.head_counts
    found: dict[tuple[int, int], list[str]] = {}
    fewer: dict[tuple[int, int], list[str]] = {}
    for one, other in zip(target.groups, correspondence.groups, strict=True):
        if other < 0:
            continue
        partner = source.groups[other]
        of_partner, of_one = heads.get(one.index, (1, 1))
        sizes = partner.size // of_partner, one.size // of_one
        if (one.is_counted or partner.is_counted) and sizes[0] != sizes[1]:
            found.setdefault(sizes, []).append(one.name)
        if lacks_heads(one, partner, (of_one, of_partner)):
            heads_of_queries = of_partner * partner.sharing, of_one * one.sharing
            fewer.setdefault(heads_of_queries, []).append(one.name)
    for (of_source, of_target), names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn(
            f"the channels of {names[0]!r}{more}, {of_source} in {name} and {of_target} in the "
            "result, are added up without weights (queries with keys, a softmax, a sum or an "
            "unbiased variance over channels, an embedding's weights used again for the outputs), "
            "so that each copy of them counts: what the network computes there is not kept",
            WidthWarning,
        )
    for (of_source, of_target), names in fewer.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn(
            f"{of_source} heads of queries share the keys and values of {names[0]!r}{more} in "
            f"{name}, and {of_target} in the result: each of these is a mean of several of {name}, "
            "and what the network computes there is not kept",
            WidthWarning,
        )
