"""Two graphs + an alignment -> which parameters, channels and tensors correspond.

The shallow network is lifted to the deep one's structure: where a deep layer has no partner, a layer
is inserted that changes nothing. In a chain that is a layer with identity weights, exact because
its input has passed the same idempotent activation (ReLU) before. In a residual network it is a
block whose last write is zero.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clafusion.errors import StructureError, WidthWarning
from clafusion.execution.call import call_model, flatten_tensors
from clafusion.tracing.model import (
    CalibrationPoint,
    ChannelGroup,
    GroupAxis,
    HookPoint,
    Layer,
    TracedModel,
)
from clafusion.tracing.operations import bound_operands, op_name

__all__ = [
    "Correspondence",
    "HookPair",
    "Origin",
    "allowed_pairs",
    "check_lifted",
    "fill",
    "gap_costs",
    "lift",
    "lifting",
    "onto_itself",
    "point_pairs",
    "resized_shape",
    "skip_costs",
    "warn_of_counted_channels",
]

Origin = Literal["matched", "taken", "identity", "silent", "copied"]


@dataclass(frozen=True)
class HookPair:
    """Read points of both networks that show the same group at the same place.

    ``deep`` and ``shallow`` are keys ``(layer, index)`` of ``ModelProfile.rows``; the columns are
    those of the group's channels, in the order of its members.
    """

    deep: tuple[int, int]
    shallow: tuple[int, int]
    deep_columns: Tensor
    shallow_columns: Tensor


@dataclass(frozen=True)
class Correspondence:
    """How the shallow network looks in the deep one's structure.

    Attributes
    ----------
    deep, shallow
        The network that gives the structure and the one that is brought to it. (Where the deeper
        network's layers are merged, the first is the shallower one, and all its layers are matched.)
    partner
        For each layer of the deep network the shallow network's, -1 where it has none.
    origins
        For each parameter and buffer of the deep network where the lifted one's comes from:
        ``"matched"`` (the shallow network's parameter in ``names``), ``"taken"`` (the same, and
        the deep network has nothing of its own to be averaged with), ``"identity"`` (part of an
        inserted identity layer), ``"silent"`` (the last write of an inserted block: zero) or
        ``"copied"`` (inside an inserted block, where any value will do: the deep network's).
    names
        Deep parameter -> shallow parameter, where matched.
    groups
        For each channel group of the deep network the shallow network's, or -1 where it has none
        (inside an inserted block).
    points
        For each channel group of the deep network the hook points by which to match it.
    calibration_points
        Deep calibration point node -> shallow calibration point, where the layers are matched.
    streams
        Deep layer that has no partner -> the shallow network's value that flows past it.
    target_only_layers
        Layers of the deep network that hold nothing of its own, and have a partner.
    """

    deep: TracedModel
    shallow: TracedModel
    partner: tuple[int, ...]
    origins: Mapping[str, Origin]
    names: Mapping[str, str]
    groups: tuple[int, ...]
    points: tuple[tuple[HookPair, ...], ...]
    calibration_points: Mapping[str, CalibrationPoint]
    streams: Mapping[int, CalibrationPoint]
    target_only_layers: frozenset[int] = frozenset()


def allowed_pairs(deep: TracedModel, shallow: TracedModel) -> NDArray[np.bool_]:
    """Return ``(m, n)``: which layers have the same structure and stage, and so can match."""
    return np.array(
        [
            [
                one.structure == other.structure and one.output_shape == other.output_shape
                for other in shallow.layers
            ]
            for one in deep.layers
        ],
        dtype=bool,
    ).reshape(len(deep.layers), len(shallow.layers))


def skip_costs(deep: TracedModel) -> NDArray[np.float64]:
    """Return ``(m,)``: 0 where a layer that changes nothing can stand in, else ``inf``."""
    return np.array([0.0 if layer.insertable else np.inf for layer in deep.layers])


def gap_costs(
    deep: TracedModel, shallow: TracedModel, costs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return ``(n,)``: what leaving a shallow layer unmatched costs, where both networks have gaps.

    More than all pairs together, so that as few as possible are; ``inf`` where no layer that changes
    nothing can stand in for it, and where the deep network has none of its kind in any stage.
    """
    kinds = {layer.structure for layer in deep.layers}
    dear = 1.0 + 2.0 * float(np.abs(costs[np.isfinite(costs)]).sum())
    return np.array(
        [
            dear if layer.insertable and layer.structure in kinds else np.inf
            for layer in shallow.layers
        ]
    )


def lifting(
    deep: TracedModel,
    shallow: TracedModel,
    partner: tuple[int, ...],
    target_only_layers: frozenset[int] = frozenset(),
) -> Correspondence:
    """Find what corresponds under an alignment.

    ``partner`` is :attr:`LayerAlignment.deep_to_shallow`. ``target_only_layers`` are layers of the deep
    network that hold nothing of its own: of blocks that write zero the shallow network's is taken,
    identity layers are averaged as all others.

    Raises
    ------
    StructureError
        Matched layers differ in more than widths, or one deep channel group would correspond to
        two of the shallow network.
    """
    origins: dict[str, Origin] = {}
    names: dict[str, str] = {}
    calibration_points: dict[str, CalibrationPoint] = {}
    streams: dict[int, CalibrationPoint] = {}
    for layer, k in zip(deep.layers, partner, strict=True):
        if k >= 0:
            other = shallow.layers[k]
            _match_parameters(layer, other, names)
            for one, point in zip(layer.calibration_points, other.calibration_points, strict=True):
                calibration_points[one.node] = point
        else:
            inner: Origin = "identity" if layer.insertable == "identity" else "copied"
            for parameter in layer.parameters:
                origins.setdefault(parameter, inner)
            for parameter in layer.last_write:
                origins[parameter] = "silent"
            if layer.insertable == "zero":
                before = [shallow.layers[one] for one in partner[: layer.index] if one >= 0][-1:]
                for last in before:
                    if last.hook_points and last.hook_points[-1].post == last.output:
                        streams[layer.index] = _flow_site(last.hook_points[-1])
            if layer.insertable == "identity":
                # What leaves an identity is what flows past it in the shallow network.
                key = _shallow_point(shallow, partner, layer, len(layer.hook_points) - 1)
                if key is not None:
                    shown = shallow.layers[key[0]].hook_points[key[1]]
                    calibration_points.update(
                        {one.node: _flow_site(shown) for one in layer.calibration_points}
                    )
    for layer, k in zip(deep.layers, partner, strict=True):  # what a matched layer shares stays so
        if k >= 0:
            origins.update(dict.fromkeys(layer.parameters, "matched"))
    for index in (one for one in target_only_layers if deep.layers[one].insertable == "zero"):
        inside = set(deep.layers[index].parameters) - set(deep.layers[index].last_write)
        origins.update(dict.fromkeys(inside, "taken"))
    for name in deep.state():
        origins.setdefault(name, "copied")
    groups = _match_groups(deep, shallow, names, partner)
    points = tuple(
        tuple(point_pairs(deep, shallow, partner, one.index, groups[one.index]))
        for one in deep.groups
    )
    return Correspondence(
        deep,
        shallow,
        partner,
        origins,
        names,
        groups,
        points,
        calibration_points,
        streams,
        target_only_layers,
    )


def warn_of_counted_channels(plan: Correspondence) -> None:
    """Warn where the networks' numbers of channels differ, and copies of a channel add up.

    Warns
    -----
    WidthWarning
        The message names the channels. See :attr:`ChannelGroup.is_counted`.
    """
    heads = {
        index: (other.count, one.count)
        for one, other in zip(plan.deep.united_heads, plan.shallow.united_heads, strict=True)
        for index in one.groups
    }
    found: dict[tuple[int, int], list[str]] = {}
    for one, other in zip(plan.deep.groups, plan.groups, strict=True):
        if other < 0:
            continue
        partner = plan.shallow.groups[other]
        of_partner, of_one = heads.get(one.index, (1, 1))
        sizes = partner.size // of_partner, one.size // of_one
        if (one.is_counted or partner.is_counted) and sizes[0] != sizes[1]:
            found.setdefault(sizes, []).append(one.name)
    for (of_source, of_target), names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"the channels of {names[0]!r}{more}, {of_source} in one network and {of_target} in "
            "the other, are added up without weights (queries with keys, a softmax or sum over "
            "channels, an embedding's weights used again for the outputs), so that each copy of "
            "them counts: what the network of the other width computes there is not kept",
            WidthWarning,
            stacklevel=5,
        )


def onto_itself(graph: TracedModel) -> Correspondence:
    """Return what corresponds in a network and itself."""
    return lifting(graph, graph, tuple(range(len(graph.layers))))


def _flow_site(point: HookPoint) -> CalibrationPoint:
    """Return a calibration point that shows a value which no layer of its own makes."""
    return CalibrationPoint(
        point.post, None, None, None, point.axis, "", None, point.groups, point.members
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
                f"parameter {one!r} is shared by several layers and would correspond to both "
                f"{names[one]!r} and {two!r}"
            )


def _match_groups(
    deep: TracedModel, shallow: TracedModel, names: Mapping[str, str], partner: tuple[int, ...]
) -> tuple[int, ...]:
    found: dict[int, int] = {}

    def vote(one: int, other: int, where: str) -> None:
        if found.setdefault(one, other) != other:
            raise StructureError(
                f"the channels of {deep.groups[one].name!r} would have to match those of both "
                f"{shallow.groups[found[one]].name!r} and {shallow.groups[other].name!r} (at "
                f"{where!r}); the networks are wired differently"
            )

    # What a layer reads has no partner where other layers come before it in the other network.
    apart = {
        name
        for layer, before in zip(deep.layers[1:], partner, strict=False)
        if before >= 0 and partner[layer.index] > before + 1
        for name in layer.parameters
    }
    for name, other_name in names.items():
        other_axes = axes_of(shallow, other_name)
        for (use, axis), one in axes_of(deep, name).items():
            if name in apart and all(group_axis.direction == "in" for _, group_axis in one):
                continue
            other = other_axes.get((use, axis), [])
            if len(one) != len(other):
                raise StructureError(
                    f"axis {axis} of {name!r} carries {len(one)} channel group(es), that of "
                    f"{other_name!r} {len(other)}; the networks are wired differently, or have "
                    "different numbers of heads or groups that cannot change places (each has a "
                    "parameter or position of its own): only equal numbers of those can be fused"
                )
            for (target_group, group_axis), (source_group, other_slot) in zip(
                one, other, strict=True
            ):
                vote(target_group.index, source_group.index, name)
                repeats = group_axis.positions.size(1), other_slot.positions.size(1)
                if repeats[0] != repeats[1]:
                    raise StructureError(
                        f"in axis {axis} of {name!r} a channel stands for {repeats[0]} positions, "
                        f"in its partner for {repeats[1]}; the inputs, the strides, or how many "
                        "heads of queries share one of keys differ"
                    )
    state = deep.state()
    for layer, k in zip(deep.layers, partner, strict=True):
        if k < 0 and layer.insertable == "identity":
            weight = next(p for p in layer.parameters if state[p].dim() > 1)
            by_direction: dict[str, set[int]] = {"in": set(), "out": set()}
            for group, group_axis in deep.axes_by_parameter.get(weight, ()):
                by_direction[group_axis.direction].add(group.index)
            (incoming,), (outgoing,) = by_direction["in"], by_direction["out"]
            vote(outgoing, found[incoming], weight)
    return tuple(found.get(one.index, -1) for one in deep.groups)


def axes_of(
    graph: TracedModel, parameter: str
) -> Mapping[tuple[int, int], list[tuple[ChannelGroup, GroupAxis]]]:
    """Return a parameter's channel axes: ``(which use, axis)`` -> groups, by first position."""
    return graph.axes_by_use.get(parameter, {})


def point_pairs(
    deep: TracedModel,
    shallow: TracedModel,
    partner: tuple[int, ...],
    target_group: int,
    source_group: int,
) -> Iterable[HookPair]:
    """Yield the hook points that show a group of the deep network and one of the shallow one."""
    if source_group < 0:
        return
    seen: set[tuple[str, str]] = set()
    for layer in deep.layers:
        for i, point in enumerate(layer.hook_points):
            key = _shallow_point(shallow, partner, layer, i)
            if key is None or not bool((point.groups == target_group).any()):
                continue
            other = shallow.layers[key[0]].hook_points[key[1]]
            nodes = (point.post, other.post)
            # Where one shows queries and keys and the other keys alone, they show not the same.
            turns = [
                int((one.groups == index).sum()) / graph.groups[index].size
                for graph, one, index in (
                    (deep, point, target_group),
                    (shallow, other, source_group),
                )
            ]
            if turns[0] == turns[1] and nodes not in seen:
                seen.add(nodes)
                columns = _columns(point, target_group), _columns(other, source_group)
                yield HookPair((layer.index, i), key, *columns)


def _shallow_point(
    shallow: TracedModel, partner: tuple[int, ...], layer: Layer, index: int
) -> tuple[int, int] | None:
    """Return where the shallow network shows what a hook point of the deep one shows."""
    point = layer.hook_points[index]
    k = partner[layer.index]
    if k >= 0:
        others = shallow.layers[k].hook_points
        candidates = [(k, i) for i, one in enumerate(others) if one.readers & point.readers]
    elif layer.insertable == "identity":
        # An identity passes on what the layer before it puts out, which the layer after it reads;
        # a pooling between them decides which of the two has the right positions.
        before = [one for one in partner[: layer.index] if one >= 0]
        after = [one for one in partner[layer.index :] if one >= 0]
        candidates = [(one, len(shallow.layers[one].hook_points) - 1) for one in before[-1:]]
        candidates += [(one, 0) for one in after[:1]]
    else:
        candidates = []
    for one, place in candidates:
        points = shallow.layers[one].hook_points
        if 0 <= place < len(points) and _many(points[place]) == _many(point):
            return one, place
    return None


def _many(point: HookPoint) -> tuple[int, ...]:
    """Return the positions without axes of one, as that of the heads is where there is one head."""
    return tuple(size for size in point.positions if size != 1)


def _columns(point: HookPoint, group: int) -> Tensor:
    """Return where a group's channels lie in a hook point, by member (the first of repeats)."""
    places = torch.nonzero(point.groups == group).squeeze(1)
    members = point.members[places]
    order = torch.argsort(members, stable=True)
    members, places = members[order], places[order]
    first = torch.ones_like(members, dtype=torch.bool)
    first[1:] = members[1:] != members[:-1]
    return places[first]


# --- the lifted model ---------------------------------------------------------------------------


def lifted_state(plan: Correspondence) -> dict[str, Tensor]:
    """Return the state of the lifted shallow network: deep structure, shallow widths."""
    deep_state, shallow_state = plan.deep.state(), plan.shallow.state()
    sizes = {
        one.index: plan.shallow.groups[other].size
        for one, other in zip(plan.deep.groups, plan.groups, strict=True)
        if other >= 0
    }
    state: dict[str, Tensor] = {}
    for name, tensor in deep_state.items():
        origin = plan.origins[name]
        if name in plan.names:
            state[name] = shallow_state[plan.names[name]].clone()
            continue
        shape = resized_shape(plan.deep, name, tensor.shape, sizes)
        if origin == "silent" or shape != tuple(tensor.shape):
            # Any value will do inside a silent block; where the widths differ, zero is one.
            state[name] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        else:
            state[name] = tensor.clone()
        if origin == "identity":
            state[name] = _identity(plan, name, shape).to(tensor)
    return state


def resized_shape(
    graph: TracedModel, name: str, shape: Sequence[int], sizes: Mapping[int, int]
) -> tuple[int, ...]:
    """Return a parameter's shape where channel groups (by index) have other sizes."""
    resized = list(shape)
    for use in graph.uses_by_parameter.get(name, ()):
        if use.size != tuple(shape):
            continue  # flattened elements: no axis of their own
        for group, group_axis in graph.axes_by_parameter.get(name, ()):
            if group_axis.use == use and group.index in sizes:
                grown = sizes[group.index] - group.size
                resized[group_axis.axis] += grown * group_axis.positions.size(1)
    return tuple(resized)


def _identity(plan: Correspondence, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return what makes an inserted layer the identity."""
    layer = next(layer for layer in plan.deep.layers if name in layer.parameters)
    if len(shape) > 1:  # a linear layer, or a convolution that passes its centre on
        weight = torch.zeros(shape)
        centre = weight
        for size in reversed(shape[2:]):
            centre = centre.select(-1, size // 2)
        centre.fill_diagonal_(1.0)
        return weight
    if name.endswith("running_var"):
        # (x - 0) / sqrt(var + eps) = x
        return torch.ones(shape) - _epsilon(plan.deep, layer)
    norm = {p.rsplit(".", 1)[0] for p in layer.parameters if p.endswith("running_var")}
    is_scale = name.endswith("weight") and name.rsplit(".", 1)[0] in norm
    return torch.ones(shape) if is_scale else torch.zeros(shape)


def _epsilon(graph: TracedModel, layer: Layer) -> float:
    for node in graph.module.graph.nodes:
        if node.name in layer.nodes and op_name(node) == "batch_norm":
            return float(bound_operands(node)["eps"])
    return 0.0


def lift(deep: nn.Module, plan: Correspondence) -> nn.Module:
    """Build the lifted shallow network: it computes the same, with the deep network's structure.

    Its widths are the shallow network's; ``in_channels`` and the like are set accordingly.

    Raises
    ------
    StructureError
        A width is fixed in the deep module's code, so that the lifted module does not run or
        computes something else.
    """
    lifted = with_state(deep, lifted_state(plan), plan.deep)
    try:
        found = _outputs_of(lifted, plan)
    except RuntimeError as error:
        raise StructureError(
            f"the lifted model does not run: a width is fixed in the deep module's code ({error})"
        ) from error
    _compare(found, plan)
    return lifted


def check_lifted(plan: Correspondence) -> None:
    """Raise StructureError where the lifted network does not compute what the shallow one does.

    What does not run, since a width is fixed in the deep module's code, is not refused: the result
    has the deep network's widths.
    """
    state = lifted_state(plan)
    if all(state[name].shape == one.shape for name, one in plan.deep.state().items()):
        with torch.no_grad():
            outputs = plan.deep.run(plan.deep.example_inputs, state=state)
        found = list(flatten_tensors(list(outputs)))
    else:
        lifted = with_state(plan.deep.model, state, plan.deep)
        try:
            found = _outputs_of(lifted, plan)
        except RuntimeError:
            return
    _compare(found, plan)


def _outputs_of(lifted: nn.Module, plan: Correspondence) -> list[Tensor]:
    mode = lifted.training
    try:
        with torch.no_grad():
            return call_model(lifted.eval(), plan.deep.example_inputs, plan.deep.keywords)
    finally:
        lifted.train(mode)


def _compare(found: Sequence[Tensor], plan: Correspondence) -> None:
    with torch.no_grad():
        wanted = list(flatten_tensors(list(plan.shallow.run(plan.deep.example_inputs))))
    for one, other in zip(found, wanted, strict=True):
        gap = float((one.double() - other.double()).abs().max())
        if not gap <= 1e-3 * max(float(other.abs().max()), 1e-30):
            raise StructureError(
                f"brought to the other's depth, a network's outputs change by {gap:.1e}: the "
                "inserted layers change them. The two networks differ in what lies between layers "
                "(poolings, activations) or in a norm's eps, or share parameters among layers"
            )


def with_state(module: nn.Module, state: Mapping[str, Tensor], graph: TracedModel) -> nn.Module:
    """Return a copy of a module that holds ``state``, whatever the widths in it are."""
    with torch.inference_mode(False):  # in which nothing is made that can be trained
        built = copy.deepcopy(module)
        fill(built, {**state, **{alias: state[name] for alias, name in graph.aliases.items()}})
    return built


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put ``state`` into a module in place, whatever the widths in it are."""
    with torch.no_grad():
        for kind in (module.named_parameters(), module.named_buffers()):
            for name, tensor in list(kind):
                if name in state:
                    tensor.data = state[name].detach().to(tensor).clone()
    for submodule in module.modules():
        _set_widths(submodule)


def _set_widths(module: nn.Module) -> None:
    """Make a layer's attributes tell its parameters' shapes."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        into, out = weight.size(1), weight.size(0)
        if module.transposed:
            into, out = out, into
            module.in_channels, module.out_channels = into, out * module.groups
        else:
            if module.groups == module.in_channels > 1 and into == 1:
                module.groups = out * module.in_channels // module.out_channels
            module.in_channels, module.out_channels = into * module.groups, out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = weight if weight is not None else module.running_mean
        if known is not None:
            module.num_features = known.size(0)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = weight.size(0)
    elif isinstance(module, nn.LayerNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
