"""Find the channel groups of a network that admit any orthogonal map, and prove it by rotating."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from clafusion.execution.call import State, flatten_tensors
from clafusion.execution.lazy import LazyState
from clafusion.execution.walk import WIDER, Walk
from clafusion.tracing.model import ChannelGroup, GroupAxis, TracedModel
from clafusion.tracing.operations import (
    RESHAPES,
    SAME_VALUES,
    affine_operands,
    bound_operands,
    is_affine_product,
    is_transposed,
    op_name,
)
from clafusion.tracing.rotatable import (
    NormReader,
    ReadNorm,
    RotatableGroup,
    ScaledWriter,
    folded_state,
    random_rotation,
    rotated_state,
)
from clafusion.tracing.trial_weights import BaseWeights

__all__ = ["Rotatable", "find_rotatable"]

_BOUND = 1e-9  # relative to the largest output, in float64: far above rounding, far below mistakes
_NORMS = frozenset("layer_norm native_layer_norm rms_norm _fused_rms_norm".split())
_MEAN_FREE = frozenset(("layer_norm", "native_layer_norm"))
_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
_PARTS = RESHAPES | frozenset("slice select index index_select narrow repeat type_as".split())
_ADDING = frozenset("add sub cat stack embedding where".split())


@dataclass(frozen=True)
class Rotatable:
    """Which channel groups admit any orthogonal map.

    Attributes
    ----------
    groups
        Those that do.
    refused
        Names of the groups that are read through a norm and do not; why.
    """

    groups: tuple[RotatableGroup, ...]
    refused: Mapping[str, str]


def find_rotatable(traced: TracedModel, *, seed: int = 0) -> Rotatable:
    """Return the channel groups that admit any orthogonal map.

    Such a group is read through RMSNorm or LayerNorm, and by nothing else that tells its channels
    apart. The graph shows the candidates; two trials in float64, with random weights and with the
    model's own, decide: folding the norms, and folding and rotating, must leave the outputs as they
    are, of each group together with those before it.

    Parameters
    ----------
    traced
        The model.
    seed
        Seed of the rotations and of the random weights.
    """
    groups: list[RotatableGroup] = []
    refused: dict[str, str] = {}
    for one in traced.groups:
        try:
            candidate = _Analysis(traced, one).candidate()
        except _RefusalError as refusal:
            refused[one.name] = str(refusal)
            continue
        if candidate is None:
            continue
        problem = _problem(traced, [*groups, candidate], seed)
        if problem is None:
            groups.append(candidate)
        else:
            refused[one.name] = problem
    return Rotatable(tuple(groups), refused)


class _RefusalError(Exception):
    """A group that does not admit rotations; the text says why."""


# --- candidates ---------------------------------------------------------------------------------


class _Analysis:
    """What reads and writes one channel group."""

    def __init__(self, traced: TracedModel, group: ChannelGroup) -> None:
        self.traced, self.group = traced, group
        self.state = traced.state()
        self.places: dict[tuple[str, int], None] = {}
        self.writers: dict[tuple[str, int], None] = {}
        self.norms: dict[str, ReadNorm] = {}
        self.scales: dict[ScaledWriter, None] = {}
        self.is_centred = False

    def candidate(self) -> RotatableGroup | None:
        """Return the group with all that a rotation touches; None where no norm reads it."""
        shown = [self._shows_a_norm(one) for one in self.group.axes]  # each may be centred
        if not any(shown):
            return None
        for group_axis in self.group.axes:
            self._take(group_axis)
        self._check_readers()
        return RotatableGroup(
            self.group.name,
            self.group.atoms,
            tuple(self.places),
            tuple(self.writers),
            tuple(self.norms.values()),
            tuple(self.scales),
            self.is_centred,
        )

    def _shows_a_norm(self, group_axis: GroupAxis) -> bool:
        """Say whether a parameter is a norm's, or a layer's that reads a norm without a gain."""
        found = False
        for node, operand in _users(self.traced, group_axis.use.parameter):
            name = op_name(node)
            if name in _NORMS or (name == "mul" and _is_of_norm(node, operand)):
                found = True
            elif group_axis.direction == "in" and (name == "linear" or is_affine_product(node)):
                norm = _norm_before(node)
                if norm is not None and bound_operands(norm).get("weight") is None:
                    self.is_centred |= op_name(norm) in _MEAN_FREE
                    found = True
        return found

    def _take(self, group_axis: GroupAxis) -> None:
        name = group_axis.use.parameter
        axis = self._axis_in(name, group_axis)
        nodes = list(_users(self.traced, name))
        ops = {op_name(node) for node, _ in nodes}
        if ops & _NORMS:
            for node, _ in nodes:
                self._take_norm(name, node)
        elif "mul" in ops:
            for node, operand in nodes:
                self._take_gain(name, node, operand)
        else:
            for node, _ in nodes:
                if not _is_linear(node):
                    raise _RefusalError(f"{op_name(node)} reads {name!r}")
            self.places[name, axis] = None
            if group_axis.direction == "out":
                self.writers[name, axis] = None

    def _axis_in(self, name: str, group_axis: GroupAxis) -> int:
        """Return the axis of a parameter that has the group's channels, in order and no others."""
        use, size = group_axis.use, self.group.size
        shape, positions = tuple(self.state[name].shape), group_axis.positions
        order = torch.arange(size)[:, None]
        if use.size == shape and use.offset == 0 and shape[group_axis.axis] == size:
            if torch.equal(positions, order):
                return group_axis.axis
        elif use.offset == 0 and positions.numel() == self.state[name].numel() == use.size[0]:
            stride = 1
            for axis in reversed(range(len(shape))):
                if shape[axis] == size and bool((positions // stride % size == order).all()):
                    return axis
                stride *= shape[axis]
        raise _RefusalError(f"other channels than these share an axis of {name!r}")

    def _take_norm(self, name: str, node: fx.Node) -> None:
        if op_name(node) not in _NORMS:
            raise _RefusalError(f"{op_name(node)} and a norm share {name!r}")
        bound = bound_operands(node)
        gain, bias = (self._entry(bound.get(role)) for role in ("weight", "bias"))
        if gain is None:
            raise _RefusalError(f"the norm that adds {name!r} has no gain")
        self.is_centred |= op_name(node) in _MEAN_FREE
        self._add_norm(ReadNorm(gain, 0.0, bias, tuple(self._readers(node, gain))))

    def _take_gain(self, name: str, node: fx.Node, operand: fx.Node) -> None:
        if op_name(node) != "mul":
            raise _RefusalError(f"{op_name(node)} and a product share {name!r}")
        offset = float(_offset(operand))
        try:
            self._add_norm(ReadNorm(name, offset, None, tuple(self._readers(node, name))))
        except _RefusalError:
            scale = None if offset else self._scaled_writer(name, node)
            if scale is None:
                raise
            self.scales[scale] = None

    def _add_norm(self, norm: ReadNorm) -> None:
        known = self.norms.get(norm.gain)
        if known is not None:
            if (known.offset, known.bias) != (norm.offset, norm.bias):
                raise _RefusalError(f"{norm.gain!r} is used in two ways")
            norm = replace(norm, readers=tuple(dict.fromkeys((*known.readers, *norm.readers))))
        self.norms[norm.gain] = norm

    def _readers(self, node: fx.Node, gain: str) -> Iterator[NormReader]:
        """Yield the linear layers that read a norm's outputs, whatever moves those before."""
        for user in node.users:
            reader = self._reader(user, node)
            if reader is not None:
                yield reader
            elif op_name(user) in _PARTS or op_name(user) == "mean" or _is_scaling(user):
                yield from self._readers(user, gain)
            elif not _is_check(user):
                what = "the output" if user.op == "output" else op_name(user)
                raise _RefusalError(f"{what} reads what {gain!r} scales")

    def _reader(self, user: fx.Node, node: fx.Node) -> NormReader | None:
        if not (op_name(user) == "linear" or is_affine_product(user)):
            return None
        operands = affine_operands(user)
        weight = self._entry(operands.get("weight"))
        if weight is None or operands.get("input") is not node:
            return None
        bias = self._entry(operands.get("bias")) or self._bias_behind(user)
        return NormReader(weight, 0 if is_transposed(user) else 1, bias)

    def _bias_behind(self, node: fx.Node) -> str | None:
        """Return the vector of parameters that is added to what a layer puts out."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or op_name(user) != "add":
            return None
        names = [self._entry(one) for one in user.all_input_nodes if one is not node]
        return next((one for one in names if one and self.state[one].dim() == 1), None)

    def _scaled_writer(self, name: str, node: fx.Node) -> ScaledWriter | None:
        """Return the linear layer whose outputs alone a parameter multiplies."""
        others = [one for one in node.all_input_nodes if one not in self.traced.nodes_of(name)]
        value = others[0] if len(others) == 1 else None
        while value is not None and len(value.users) == 1:
            if op_name(value) == "linear" or is_affine_product(value):
                operands = affine_operands(value)
                weight = self._entry(operands.get("weight"))
                bias = operands.get("bias")
                if weight is None or (bias is not None and self._entry(bias) is None):
                    return None
                axis = 1 if is_transposed(value) else 0
                return ScaledWriter(name, weight, axis, self._entry(bias))
            if op_name(value) not in SAME_VALUES:
                return None
            value = value.all_input_nodes[0]
        return None

    def _entry(self, node: object) -> str | None:
        return self.traced.entries.get(node) if isinstance(node, fx.Node) else None

    def _check_readers(self) -> None:
        """Refuse where a layer reads the stream both behind a norm and elsewhere."""
        seen: dict[str, str] = {}
        for norm in self.norms.values():
            for reader in norm.readers:
                if seen.setdefault(reader.weight, norm.gain) != norm.gain:
                    raise _RefusalError(f"several norms are read by {reader.weight!r}")
                if (reader.weight, reader.axis) not in self.places:
                    raise _RefusalError(f"other channels than these enter {reader.weight!r}")
                if (reader.weight, reader.axis) in self.writers:
                    raise _RefusalError(
                        f"{reader.weight!r} is tied: it writes the channels, too, so that "
                        f"{norm.gain!r} cannot be multiplied into it"
                    )
                if norm.bias is not None and reader.bias is None:
                    raise _RefusalError(
                        f"{reader.weight!r} has no bias that could take {norm.bias!r}"
                    )


def _users(traced: TracedModel, name: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the nodes that compute with a parameter or a part of it, and their operand."""
    waiting = traced.nodes_of(name)
    while waiting:
        operand = waiting.pop()
        for user in operand.users:
            if op_name(user) in _PARTS or _is_scalar_sum(user):
                waiting.append(user)
            elif not _is_check(user):
                yield user, operand


def _is_check(node: fx.Node) -> bool:
    """Say whether a node computes nothing, as those that check a value's type."""
    return op_name(node).startswith("_assert")


def _is_scalar_sum(node: fx.Node) -> bool:
    """Say whether a node adds a number to one value, as in norms that multiply by 1 + gain."""
    numbers = [one for one in node.args if isinstance(one, (int, float))]
    return op_name(node) == "add" and len(node.all_input_nodes) == 1 and len(numbers) == 1


def _is_scaling(node: fx.Node) -> bool:
    return op_name(node) in ("mul", "div") and len(node.all_input_nodes) == 1


def _offset(operand: fx.Node) -> float:
    """Return what is added to a gain on its way to an operand."""
    total = 0.0
    while operand.op != "placeholder":
        if _is_scalar_sum(operand):
            total += float(next(one for one in operand.args if not isinstance(one, fx.Node)))
        operand = operand.all_input_nodes[0]
    return total


def _is_of_norm(node: fx.Node, operand: fx.Node) -> bool:
    """Say whether a product is the gain of a norm that is written out: of a division's result."""
    for other in node.all_input_nodes:
        while other is not operand and op_name(other) in SAME_VALUES | {"to", "_to_copy"}:
            other = other.all_input_nodes[0]
        if other is operand:
            continue
        factors = {op_name(one) for one in other.all_input_nodes}
        if op_name(other) == "div" or (op_name(other) == "mul" and "rsqrt" in factors):
            return True
    return False


def _norm_before(node: fx.Node) -> fx.Node | None:
    """Return the norm that a linear layer reads, whatever moves its outputs between."""
    value = affine_operands(node).get("input")
    while isinstance(value, fx.Node) and value.op == "call_function":
        if op_name(value) in _NORMS:
            return value
        if op_name(value) not in _PARTS and op_name(value) != "mean":
            return None
        value = value.all_input_nodes[0]
    return None


def _is_linear(node: fx.Node) -> bool:
    """Say whether a node is linear in the channels of a parameter that it reads."""
    name = op_name(node)
    if name in _CONVOLUTIONS:
        return int(bound_operands(node).get("groups", 1)) == 1
    return name == "linear" or is_affine_product(node) or name in _ADDING


# --- the proof ----------------------------------------------------------------------------------


def _problem(traced: TracedModel, groups: Sequence[RotatableGroup], seed: int) -> str | None:
    """Return why the last group is refused; None where rotating all changes no output."""
    trained = frozenset(dict(traced.model.named_parameters()))
    generator = torch.Generator().manual_seed(seed)
    for names in (trained, frozenset[str]()):
        base = BaseWeights(traced.state(), names, seed)
        state = _widened(base)
        folded = folded_state(state, groups)
        rotations = [(one, random_rotation(one, generator)) for one in groups]
        rotated = rotated_state(folded, rotations)
        try:
            expected, of_folded, of_rotated = (
                _outputs(traced, one) for one in (state, folded, rotated)
            )
        except RuntimeError as error:  # the graph fixes a type somewhere
            return f"it cannot be tried in float64 ({str(error).splitlines()[0]})"
        for outputs, what in ((of_folded, "folding its norms"), (of_rotated, "rotating it")):
            gap = _gap(outputs, expected)
            if not gap <= _BOUND:
                return f"{what} changes the outputs (relative difference {gap:.1e})"
    return None


def _widened(base: BaseWeights) -> State:
    def make(name: str) -> Tensor:
        value = base.whole(name)
        return value.double() if value.is_floating_point() else value

    return LazyState(base.own, make)


def _outputs(traced: TracedModel, state: State) -> list[Tensor]:
    with torch.no_grad():
        found = Walk(traced, traced.example_inputs, state, set(), WIDER).finish()
    return list(flatten_tensors(list(found)))


def _gap(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest expected output; NaN counts."""
    worst = 0.0
    for one, other in zip(outputs, expected, strict=True):
        if other.numel():
            scale = float(other.double().abs().max())
            gap = float((one.double() - other.double()).abs().max()) / (scale or 1.0)
            worst = gap if not gap <= worst else worst
    return worst
