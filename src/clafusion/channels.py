"""Exported graph -> channel classes, by running the graph on labels.

Which channels of which tensors must move together is found by abstract interpretation. Every
tensor of the graph gets a *label tensor* of its own shape that holds, per element,

- an *atom* (a number >= 0): the channel that the element belongs to; atoms live in a union-find;
- a *fixed id* (a number < 0): the element moves with no channel. It comes from the model's input,
  from a constant or from a reduction over channels. Equal ids mean equal values.

Weighted operations create atoms, operations of two activations unite them, and structural
operations (view, permute, cat, slice...) simply run on the label tensor. Where an atom meets a
fixed element (a mask, a rotary angle, an attention score), it takes on the sequence of fixed ids
that it meets as a *fingerprint*. Atoms are exchangeable, and so form one class, exactly if they
occupy the same slots of the same parameters and carry the same fingerprints.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from clafusion.errors import UnsupportedOpError
from clafusion.graph import ChannelClass, ParameterUse, Slot, State

__all__ = "Channels NodeChannels find_channels module_path op_name".split()


@dataclass(frozen=True)
class NodeChannels:
    """Where the channels of a node's value lie.

    Attributes
    ----------
    axis
        The only axis along which the labels vary, or None where there is no such single axis.
    classes, members
        ``(num_channels,)``: the class of each channel (-1: fixed) and its position in it.
    moving
        Whether any element belongs to an atom.
    free
        Whether any element belongs to a channel class, so that it can be permuted.
    """

    axis: int | None
    classes: Tensor
    members: Tensor
    moving: bool
    free: bool


@dataclass(frozen=True)
class Channels:
    """What the analysis found: the classes, the parameter views, and the nodes' channels."""

    classes: tuple[ChannelClass, ...]
    uses: tuple[ParameterUse, ...]
    nodes: Mapping[str, NodeChannels]
    shapes: Mapping[str, tuple[int, ...]]


def find_channels(
    module: fx.GraphModule,
    placeholders: Sequence[str | None],
    state: State,
    buffers: frozenset[str],
    inputs: Sequence[Tensor],
) -> Channels:
    """Find the channel classes of an exported graph.

    Parameters
    ----------
    module
        The graph; its inputs are the state entries and the model's inputs.
    placeholders
        For each of its inputs the state entry's name, or None for a model input.
    state
        Contiguous parameters, buffers and constants.
    buffers
        Which entries of ``state`` are not trained: outside of norms they count as constants.
    inputs
        A small example; the label tensors are as large as its activations.

    Raises
    ------
    UnsupportedOpError
        An operation has no rule; the message names it, where it stands and what to do.
    """
    analysis = _Analysis(state, buffers)
    found = analysis.run(module, placeholders, inputs)
    if analysis.undecided:
        # A parameter met several atoms, which later operations may have united: look again,
        # knowing which.
        again = _Analysis(state, buffers, analysis.parents)
        found = again.run(module, placeholders, inputs)
    return found


def op_name(node: fx.Node) -> str:
    """Return the base name of a node's ATen operation: ``relu`` for ``aten.relu_.default``."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[1]
        inplace = name.endswith("_") and not name.endswith("__")
        return name[:-1] if inplace else name
    return getattr(node.target, "__name__", str(node.target))


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node came from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    paths = [str(entry[0]) for entry in stack if not str(entry[0]).startswith("_empty_nn_module")]
    return paths[-1] if paths else ""


# --- ids ---------------------------------------------------------------------------------------


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _salt(text: str) -> NDArray[np.uint64]:
    return _mix(np.array([zlib.crc32(text.encode())], dtype=np.uint64))


def _words(ids: Tensor) -> NDArray[np.uint64]:
    return ids.numpy().view(np.uint64) if ids.is_contiguous() else _words(ids.contiguous())


def _as_fixed(words: NDArray[np.uint64]) -> Tensor:
    """Turn words into fixed ids: negative, and exact when held in a float64."""
    return -1 - torch.from_numpy((words >> np.uint64(14)).view(np.int64))


def _fixed_ids(text: str, shape: Sequence[int]) -> Tensor:
    """Return a fixed id of its own for every element of ``shape``."""
    count = int(np.prod(shape, dtype=np.int64))
    words = _mix(np.arange(count, dtype=np.uint64) + _salt(text))
    return _as_fixed(words).reshape(tuple(shape))


def _value_ids(values: Tensor) -> Tensor:
    """Return fixed ids that are equal where the values are equal."""
    if values.is_complex():
        parts = torch.view_as_real(values)
        return _combine("complex", [_value_ids(parts[..., 0]), _value_ids(parts[..., 1])])
    words = values.detach().to("cpu", torch.float64).contiguous().numpy().view(np.uint64)
    return _as_fixed(_mix(np.array(words, ndmin=1))).reshape(values.shape)


def _combine(text: str, operands: Sequence[Tensor]) -> Tensor:
    """Return the fixed ids of an elementwise function of fixed elements."""
    broadcast = torch.broadcast_tensors(*operands)
    words = np.broadcast_to(_salt(text), (broadcast[0].numel(),))
    for ids in broadcast:
        words = _mix(words ^ _words(ids.reshape(-1)))
    return _as_fixed(words).reshape(broadcast[0].shape)


def _collapse(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Drop every axis along which none of the broadcast tensors varies."""
    reduced = torch.broadcast_tensors(*tensors)
    if reduced[0].numel() == 0:
        return tuple(reduced)
    for axis in reversed(range(reduced[0].dim())):
        firsts = [ids.narrow(axis, 0, 1) for ids in reduced]
        if all(
            ids.size(axis) == 1 or ids.stride(axis) == 0 or bool((ids == first).all())
            for ids, first in zip(reduced, firsts, strict=True)
        ):
            reduced = tuple(firsts)
    return tuple(reduced)


# --- labels of values --------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A parameter, or a view of one, that has not met an activation yet."""

    name: str
    tensor: Tensor


Label: TypeAlias = "Tensor | _View | tuple[Label, ...] | None"
"""Label tensor, parameter view, None for a constant; a tuple where a node has several values."""


@dataclass
class _Use:
    """A parameter view whose axes carry ids."""

    name: str
    role: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    axes: dict[int, Tensor] = field(default_factory=dict)
    directions: dict[int, Literal["out", "in"]] = field(default_factory=dict)


class _Call:
    """One node with its operands bound to the names of the operation's schema."""

    def __init__(
        self,
        node: fx.Node,
        labels: Mapping[fx.Node, Label],
        values: Mapping[fx.Node, Any],
    ) -> None:
        self.node = node
        self.name = op_name(node)
        self._labels = labels
        self._values = values
        self.bound: dict[str, Any] = {}
        for i, argument in enumerate(node.target._schema.arguments):
            if i < len(node.args):
                self.bound[argument.name] = node.args[i]
            elif argument.name in node.kwargs:
                self.bound[argument.name] = node.kwargs[argument.name]
            elif argument.has_default_value():
                self.bound[argument.name] = argument.default_value

    @property
    def output(self) -> Any:
        return self._values[self.node]

    def value(self, name: str) -> Any:
        """Return the concrete value of an operand."""
        return self.concrete(self.bound[name])

    def concrete(self, argument: Any) -> Any:
        return fx.map_arg(argument, lambda node: self._values[node])

    def label(self, name: str) -> Label:
        argument = self.bound.get(name)
        return self._labels[argument] if isinstance(argument, fx.Node) else None

    def tensors(self) -> list[tuple[str, fx.Node]]:
        """Return the operands that are tensors, with their names."""
        found: list[tuple[str, fx.Node]] = []
        for name, argument in self.bound.items():
            nodes = argument if isinstance(argument, (list, tuple)) else [argument]
            found += [
                (name, node)
                for node in nodes
                if isinstance(node, fx.Node) and isinstance(self._values[node], Tensor)
            ]
        return found

    def label_of(self, node: fx.Node) -> Label:
        return self._labels[node]

    def value_of(self, node: fx.Node) -> Any:
        return self._values[node]


_Rule = Callable[["_Analysis", _Call], Label]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        for name in names:
            _RULES[name] = rule
        return rule

    return register


# --- the interpreter ---------------------------------------------------------------------------


class _Analysis:
    """The state of one run: the union-find, the fingerprints and the parameter uses."""

    def __init__(
        self, state: State, buffers: frozenset[str], united: NDArray[np.int64] | None = None
    ) -> None:
        self.state = state
        self.buffers = buffers
        # Atoms are numbered in the order of their creation, the same in every run.
        self.parents = np.empty(0, dtype=np.int64) if united is None else united.copy()
        self.created = 0
        self.undecided = False
        self.pinned: set[int] = set()
        self.fingerprints: dict[int, set[int]] = {}
        self.uses: dict[tuple[Any, ...], _Use] = {}
        self.elements: dict[str, Tensor] = {}
        self.labels: dict[fx.Node, Label] = {}

    def run(
        self,
        module: fx.GraphModule,
        placeholders: Sequence[str | None],
        inputs: Sequence[Tensor],
    ) -> Channels:
        values: dict[fx.Node, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        last_users = _last_users(module.graph)
        sources = iter(placeholders)
        feed = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                name = next(sources)
                values[node] = next(feed) if name is None else self.state[name]
                self.labels[node] = self._placeholder(name, values[node])
            elif node.op == "get_attr":
                values[node] = getattr(module, str(node.target))
                self.labels[node] = None
            elif node.op == "output":
                for result in pytree.tree_leaves(node.args):
                    if isinstance(result, fx.Node):
                        self.pin(self.activation(self.labels[result], values[result]))
            else:
                self._visit(node, values)
            if isinstance(values.get(node), Tensor):
                shapes[node.name] = tuple(values[node].shape)
            for finished in last_users.get(node, ()):
                values.pop(finished, None)
        return self._compile(shapes)

    def _placeholder(self, name: str | None, value: Any) -> Label:
        if not isinstance(value, Tensor):
            return None
        if name is None:
            return _fixed_ids("input", value.shape)
        return _View(name, value)

    def _visit(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        arguments = fx.map_arg((node.args, node.kwargs), lambda one: values[one])
        values[node] = node.target(*arguments[0], **arguments[1])
        labels = [self.labels[one] for one in node.all_input_nodes]
        if node.target is operator.getitem:
            whole = self.labels[node.args[0]]
            self.labels[node] = whole[node.args[1]] if isinstance(whole, tuple) else None
            return
        has_tensor = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(values[node]))
        constant = all(self.is_constant(label) for label in labels)
        if not has_tensor or op_name(node) in _SHAPE_ONLY:
            self.labels[node] = None
            return
        if constant and op_name(node) not in ("batch_norm", "instance_norm"):
            self.labels[node] = None
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self.unsupported(node)
        call = _Call(node, self.labels, values)
        rule = _RULES.get(call.name)
        if rule is None and torch.Tag.pointwise in node.target.tags:
            rule = _elementwise
        if rule is None:
            raise self.unsupported(node)
        self.labels[node] = rule(self, call)
        self._mark(node)
        if node.target._schema.name.endswith("_") and isinstance(node.args[0], fx.Node):
            # In place: whoever reads the operand later sees the result.
            self.labels[node.args[0]] = self.labels[node]

    def _mark(self, node: fx.Node) -> None:
        """Let the atoms remember the operation: one that treats only some of them splits them."""
        label = self.labels[node]
        mark = int(_salt(node.name)[0])
        for ids in label if isinstance(label, tuple) else (label,):
            if isinstance(ids, Tensor):
                (reduced,) = _collapse(ids)
                for atom in self.roots(reduced[reduced >= 0].unique()).tolist():
                    self.fingerprints.setdefault(atom, set()).add(mark)

    @staticmethod
    def unsupported(
        node: fx.Node, why: str = "the channel analysis has no rule for it"
    ) -> Exception:
        where = module_path(node) or "the top level"
        return UnsupportedOpError(
            f"operation {node.target} in {where!r} (node {node.name!r}) is not supported: {why}. "
            "Replace it by supported operations, or open an issue with the module's code"
        )

    def is_constant(self, label: Label) -> bool:
        return label is None or (isinstance(label, _View) and label.name in self.buffers)

    # --- atoms ---------------------------------------------------------------------------------

    def fresh(self, count: int) -> Tensor:
        """Return ``count`` new atoms."""
        start, self.created = self.created, self.created + count
        missing = np.arange(len(self.parents), self.created)
        self.parents = np.append(self.parents, missing)
        return torch.arange(start, self.created)

    def roots(self, ids: Tensor) -> Tensor:
        """Return ids with every atom replaced by its representative."""
        array = ids.numpy()
        moving = array >= 0
        if not moving.any():
            return ids
        found = np.where(moving, array, 0)
        while True:
            parent = self.parents[found]
            if np.array_equal(parent, found):
                break
            found = parent
        return torch.from_numpy(np.where(moving, found, array))

    def _find(self, atom: int) -> int:
        root = atom
        while self.parents[root] != root:
            root = int(self.parents[root])
        while self.parents[atom] != root:
            self.parents[atom], atom = root, int(self.parents[atom])
        return root

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite atoms element by element; where one is fixed, the other takes its fingerprint."""
        first, second = _collapse(first, second)
        first, second = (self.roots(ids).reshape(-1) for ids in (first, second))
        both = (first >= 0) & (second >= 0) & (first != second)
        for a, b in np.unique(torch.stack([first[both], second[both]], 1).numpy(), axis=0):
            root_a, root_b = self._find(int(a)), self._find(int(b))
            self.parents[max(root_a, root_b)] = min(root_a, root_b)
        self.meet(first, second)
        self.meet(second, first)

    def pin(self, ids: Tensor) -> None:
        """Fix every atom in ``ids`` to its place."""
        (ids,) = _collapse(ids)
        self.pinned.update(int(atom) for atom in ids[ids >= 0].unique())

    def meet(self, ids: Tensor, partners: Tensor) -> None:
        """Give every atom in ``ids`` the sequence of fixed ids among its partners."""
        ids, partners = _collapse(ids, partners)
        ids, partners = self.roots(ids).reshape(-1), partners.reshape(-1)
        chosen = (ids >= 0) & (partners < 0)
        atoms, fixed = ids[chosen].numpy(), partners[chosen].numpy()
        if len(atoms) == 0 or (fixed == fixed[0]).all():
            return
        order = np.argsort(atoms, kind="stable")
        atoms, fixed = atoms[order], fixed[order]
        starts = np.flatnonzero(np.r_[True, atoms[1:] != atoms[:-1]])
        rank = np.arange(len(atoms)) - np.repeat(starts, np.diff(np.r_[starts, len(atoms)]))
        words = _mix(fixed.view(np.uint64) ^ _mix(rank.astype(np.uint64)))
        for atom, word in zip(atoms[starts], np.add.reduceat(words, starts), strict=True):
            self.fingerprints.setdefault(int(atom), set()).add(int(word))

    # --- labels --------------------------------------------------------------------------------

    def activation(self, label: Label, value: Tensor) -> Tensor:
        """Return a label tensor, whatever the value is."""
        if isinstance(label, Tensor):
            return label
        if isinstance(label, _View) and label.name not in self.buffers:
            return self.element_ids(label)
        return _value_ids(value)

    def element_ids(self, view: _View) -> Tensor:
        """Return the labels of a parameter that is used as a value: an atom for each element."""
        base = self.state[view.name]
        if view.name not in self.elements:
            self.elements[view.name] = self.fresh(base.numel())
            use = _Use(view.name, "element", (base.numel(),), (1,), 0)
            use.axes[0], use.directions[0] = self.elements[view.name], "out"
            self.uses[view.name, "elements"] = use
        offset = view.tensor.storage_offset() - base.storage_offset()
        return self.elements[view.name].as_strided(view.tensor.shape, view.tensor.stride(), offset)

    def scale(self, view: _View, ids: Tensor, shape: Sequence[int] | None = None) -> None:
        """Let a parameter act element by element on an activation.

        An element that meets one atom moves with it. An element that several atoms share (a
        positional bias, a common slope) stays where it is.
        """
        tensor = view.tensor if shape is None else view.tensor.reshape(tuple(shape))
        elements = self.element_ids(_View(view.name, tensor))
        elements, ids = _collapse(elements, ids)
        roots = self.roots(ids).reshape(-1).numpy()
        flat = elements.reshape(-1).numpy()
        moving = roots >= 0
        pairs = np.unique(np.stack([flat[moving], roots[moving]], 1), axis=0)
        partners, counts = np.unique(pairs[:, 0], return_counts=True)
        alone = np.isin(flat, partners[counts == 1])
        self.undecided |= bool((counts > 1).any())
        # Elements that meet a single atom move with it; the others are fixed.
        fixed = torch.from_numpy(np.where(alone, flat, -1 - flat))
        self.pin(torch.from_numpy(flat[~alone]))
        self.unite(fixed.reshape(elements.shape), ids)

    def weigh(
        self, view: _View, role: str, axes: Mapping[int, Tensor], inward: Iterable[int] = ()
    ) -> dict[int, Tensor]:
        """Record that axes of a parameter view carry ids; return the ids now on them.

        A second use of the same view unites its ids with those of the first.
        """
        base = self.state[view.name]
        order = sorted(range(view.tensor.dim()), key=view.tensor.stride, reverse=True)
        size = tuple(view.tensor.size(axis) for axis in order)
        stride = tuple(view.tensor.stride(axis) for axis in order)
        offset = int(view.tensor.storage_offset() - base.storage_offset())
        key = (view.name, size, stride, offset)
        use = self.uses.setdefault(key, _Use(view.name, role, size, stride, offset))
        found = {}
        for axis, ids in axes.items():
            place = order.index(axis)
            if place in use.axes:
                self.unite(use.axes[place], ids)
                use.axes[place] = torch.where(use.axes[place] >= 0, use.axes[place], ids)
            else:
                use.axes[place] = ids
                use.directions[place] = "in" if axis in inward else "out"
            found[axis] = use.axes[place]
        return found

    def common_row(self, rows: Tensor) -> Tensor:
        """Unite the rows of a label matrix ``(num_rows, num_channels)`` into one row."""
        first = rows[:1].expand(rows.shape)
        if rows.size(0) > 1:
            self.unite(first, rows)
        moving = rows >= 0
        any_moving = moving.any(0)
        chosen = rows.gather(0, moving.to(torch.uint8).argmax(0, keepdim=True)).squeeze(0)
        if bool(any_moving.all()):
            return chosen
        ranks = _mix(np.arange(rows.size(0), dtype=np.uint64))[:, None]
        sequences = _as_fixed(_mix(_words(rows) ^ ranks).sum(0, dtype=np.uint64))
        return torch.where(
            any_moving, chosen, torch.where((rows == first).all(0), first[0], sequences)
        )

    # --- the result ----------------------------------------------------------------------------

    def _compile(self, shapes: Mapping[str, tuple[int, ...]]) -> Channels:
        roots = self.roots(torch.arange(len(self.parents))).numpy()
        fingerprints: dict[int, set[int]] = {}
        for atom, words in self.fingerprints.items():
            fingerprints.setdefault(int(roots[atom]), set()).update(words)
        pinned = {int(roots[atom]) for atom in self.pinned}
        uses = tuple(
            ParameterUse(use.name, use.role, use.size, use.stride, use.offset, i)
            for i, use in enumerate(self.uses.values())
        )
        self._check_overlaps(uses)

        # Where each atom occurs: root -> slot -> positions, in ascending order; and in which order
        # the labels that were united to it lie there, for repeats must correspond one by one.
        occurrences: dict[int, dict[tuple[int, int], list[int]]] = {}
        orders: dict[int, dict[tuple[int, int], list[int]]] = {}
        for i, use in enumerate(self.uses.values()):
            for axis, ids in sorted(use.axes.items()):
                for position, atom in enumerate(ids.tolist()):
                    if atom >= 0:
                        root = int(roots[atom])
                        occurrences.setdefault(root, {}).setdefault((i, axis), []).append(position)
                        orders.setdefault(root, {}).setdefault((i, axis), []).append(atom)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for root, slots in occurrences.items():
            if root not in pinned:
                signature = tuple(
                    (slot, tuple(np.argsort(orders[root][slot], kind="stable").tolist()))
                    for slot in sorted(slots)
                )
                mark = tuple(sorted(fingerprints.get(root, ())))
                groups.setdefault((signature, mark), []).append(root)

        raw = list(self.uses.values())
        classes: list[ChannelClass] = []
        for (signature, _), members in sorted(
            groups.items(), key=lambda item: (item[0][0], min(item[1]))
        ):
            if len(members) < 2:
                continue
            first = signature[0][0]
            members.sort(key=lambda root: occurrences[root][first][0])
            slots_of_class = tuple(
                Slot(
                    uses[i],
                    axis,
                    raw[i].directions[axis],
                    torch.tensor([occurrences[root][i, axis] for root in members]),
                )
                for (i, axis), _ in signature
            )
            classes.append(
                ChannelClass(len(classes), len(members), torch.tensor(members), slots_of_class)
            )

        class_of = np.full(len(roots) + 1, -1, dtype=np.int64)
        member_of = np.full(len(roots) + 1, -1, dtype=np.int64)
        for one in classes:
            class_of[one.atoms.numpy()] = one.index
            member_of[one.atoms.numpy()] = np.arange(one.size)
        nodes = {
            node.name: self._node_channels(label, class_of, member_of)
            for node, label in self.labels.items()
            if isinstance(label, (Tensor, tuple))
        }
        return Channels(tuple(classes), uses, nodes, shapes)

    def _node_channels(
        self,
        label: Tensor | tuple[Label, ...],
        class_of: NDArray[np.int64],
        member_of: NDArray[np.int64],
    ) -> NodeChannels:
        if isinstance(label, tuple):
            parts = [
                self._node_channels(one, class_of, member_of)
                for one in label
                if isinstance(one, Tensor)
            ]
            nothing = torch.empty(0, dtype=torch.int64)
            moving = any(part.moving for part in parts)
            return NodeChannels(None, nothing, nothing, moving, any(part.free for part in parts))
        (reduced,) = _collapse(self.roots(_collapse(label)[0]))
        axis = None
        varying = [one for one in range(reduced.dim()) if reduced.size(one) > 1]
        if len(varying) == 1:
            axis = varying[0]
        atoms = reduced.reshape(-1).clamp(min=-1).numpy()
        classes = torch.from_numpy(class_of[atoms])
        members = torch.from_numpy(member_of[atoms])
        moving, free = bool((reduced >= 0).any()), bool((classes >= 0).any())
        if axis is None:
            classes = members = torch.empty(0, dtype=torch.int64)
        return NodeChannels(axis, classes, members, moving, free)

    def _check_overlaps(self, uses: Sequence[ParameterUse]) -> None:
        by_name: dict[str, list[ParameterUse]] = {}
        for use in uses:
            by_name.setdefault(use.parameter, []).append(use)
        for name, several in by_name.items():
            if len(several) > 1:
                count = torch.zeros(self.state[name].shape, dtype=torch.int32)
                for use in several:
                    use.view(count).add_(1)
                if int(count.max()) > 1:
                    raise UnsupportedOpError(
                        f"parameter {name!r} is used through overlapping views "
                        f"({', '.join(sorted({use.role for use in several}))}), so that one "
                        "element would have to move in two ways. Use separate parameters, or "
                        "always the same view"
                    )


def _last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose value nobody needs after it."""
    seen: set[fx.Node] = set()
    finished: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for operand in (node, *node.all_input_nodes):
            if operand not in seen:
                seen.add(operand)
                finished.setdefault(node, []).append(operand)
    return finished


_SHAPE_ONLY = frozenset(
    """sym_size sym_stride sym_numel zeros_like ones_like full_like empty_like rand_like
    randn_like new_zeros new_ones new_full new_empty""".split()
)


# --- rules: operations that move or copy elements ----------------------------------------------


@_rule(
    *"""_reshape_alias _unsafe_view broadcast_to cat chunk concat concatenate
    constant_pad_nd diagonal expand expand_as flatten flip gather hstack im2col index
    index_select movedim narrow numpy_T pad permute pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d repeat repeat_interleave reshape roll rot90
    select slice split split_with_sizes squeeze stack swapaxes swapdims t tile transpose
    tril triu unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze vstack view
    view_as mT adjoint ravel tensor_split atleast_1d atleast_2d atleast_3d""".split()
)
def _structural(analysis: _Analysis, call: _Call) -> Label:
    """Run the operation itself, on the labels."""
    tensors = call.tensors()
    sources = [node for _, node in tensors if not analysis.is_constant(call.label_of(node))]
    target: Any = call.node.target
    indices = {node for name, node in tensors if name in ("indices", "index", "repeats")}
    if any(node in indices for node in sources):
        raise analysis.unsupported(call.node, "it indexes by values that depend on the input")
    if len(sources) == 1 and isinstance(call.label_of(sources[0]), _View):
        view = call.label_of(sources[0])
        assert isinstance(view, _View)
        moved = target(
            *_with(call, {sources[0]: view.tensor}, call.node.args),
            **_with(call, {sources[0]: view.tensor}, call.node.kwargs),
        )
        if isinstance(moved, Tensor) and _same_memory(moved, view.tensor):
            return _View(view.name, moved)
        if isinstance(moved, (list, tuple)) and all(_same_memory(m, view.tensor) for m in moved):
            return tuple(_View(view.name, one) for one in moved)
    shape_only = {"expand_as": 1, "view_as": 1}.get(call.name)
    substitutes: dict[fx.Node, Tensor] = {}
    for i, (_, node) in enumerate(tensors):
        if node not in indices and i != shape_only:
            substitutes[node] = analysis.activation(call.label_of(node), call.value_of(node))
    # Labels may be laid out otherwise than the values, and some operations have no integer kernel;
    # ids are exact in float64.
    for change in (_as_is, Tensor.contiguous, Tensor.double):
        try:
            return _moved(call, {node: change(ids) for node, ids in substitutes.items()})
        except (RuntimeError, NotImplementedError):
            continue
    raise analysis.unsupported(call.node, "it cannot run on label tensors")


def _as_is(ids: Tensor) -> Tensor:
    return ids


_FILLING = frozenset("constant_pad_nd pad tril triu".split())


def _moved(call: _Call, substitutes: Mapping[fx.Node, Tensor]) -> Label:
    shift = 0
    arguments, keywords = list(call.node.args), dict(call.node.kwargs)
    if call.name in _FILLING and call.bound.get("mode", "constant") == "constant":
        # The zeros that are filled in must become the id of the fill value, not atom 0: let the
        # ids run shifted by it.
        shift = int(_value_ids(torch.tensor(float(call.bound.get("value") or 0.0))))
        substitutes = {node: ids - shift for node, ids in substitutes.items()}
        if "value" in call.bound:
            position = 2 if call.name == "constant_pad_nd" else 3
            arguments[position:] = []
            keywords.pop("value", None)
    target: Any = call.node.target
    result = target(*_with(call, substitutes, arguments), **_with(call, substitutes, keywords))
    if isinstance(result, (list, tuple)):
        return tuple(one.long() for one in result)
    moved: Tensor = result.long() + shift if shift else result.long()
    return moved


def _with(call: _Call, substitutes: Mapping[fx.Node, Any], arguments: Any) -> Any:
    def substitute(node: fx.Node) -> Any:
        value = substitutes[node] if node in substitutes else call.value_of(node)
        return value.cpu() if isinstance(value, Tensor) else value

    return fx.map_arg(arguments, substitute)


def _same_memory(one: Any, other: Tensor) -> bool:
    return (
        isinstance(one, Tensor)
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


@_rule(
    *"""_to_copy to type_as clone contiguous detach alias alias_copy dropout native_dropout
    feature_dropout alpha_dropout lift_fresh lift_fresh_copy float double half bfloat16
    _conj resolve_conj resolve_neg identity""".split()
)
def _unchanged(_analysis: _Analysis, call: _Call) -> Label:
    """Keep the labels: another dtype, layout or copy, or a dropout that does nothing here."""
    first = call.tensors()[0][1]
    label = call.label_of(first)
    if isinstance(label, _View) and not _same_memory(call.output, label.tensor):
        return _View(label.name, label.tensor)
    return (label, None) if isinstance(call.output, tuple) else label


# --- rules: elementwise ------------------------------------------------------------------------


@_rule(
    *"""where masked_fill clamp clamp_min clamp_max hardtanh relu6 rrelu softplus hardswish
    hardsigmoid hardshrink softshrink threshold celu selu elu gelu silu mish log_sigmoid
    leaky_relu softsign __and__ __or__ __xor__""".split()
)
def _elementwise(analysis: _Analysis, call: _Call) -> Label:
    """Unite the labels of the operands element by element."""
    operands = [node for _, node in call.tensors()]
    return _combined(
        analysis,
        call.node.name,
        [(call.label_of(node), call.value_of(node)) for node in operands],
    )


def _combined(analysis: _Analysis, text: str, operands: Sequence[tuple[Label, Tensor]]) -> Label:
    views = [
        label
        for label, _ in operands
        if isinstance(label, _View) and label.name not in analysis.buffers
    ]
    if len(operands) == 1 and views:
        return views[0]  # a function of a parameter, element by element, moves as it does
    activations = [
        analysis.activation(label, value)
        for label, value in operands
        if not (isinstance(label, _View) and label.name not in analysis.buffers)
    ]
    shape = torch.broadcast_shapes(*(value.shape for _, value in operands))
    if not activations:
        activations = [analysis.element_ids(views[0])]
        for view in views[1:]:
            analysis.unite(activations[0], analysis.element_ids(view))
        return activations[0].expand(shape)
    for view in views:
        # The labels of all activations matter: a parameter may meet one only through another.
        for ids in activations:
            if bool((_collapse(ids)[0] >= 0).any()):
                analysis.scale(view, ids.expand(shape))
                break
    elements = [analysis.element_ids(view) for view in views]
    if elements and not any(bool((_collapse(ids)[0] >= 0).any()) for ids in activations):
        for ids in elements:  # a parameter that meets the model's input stays in its place
            analysis.pin(ids)
        elements = [-1 - ids for ids in elements]
    first = activations[0].expand(shape)
    for ids in activations[1:]:
        analysis.unite(first, ids)
    return _joined(text, [*activations, *elements], shape)


def _joined(text: str, operands: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the labels of an elementwise result: the atom where there is one, else a new id."""
    for ids in operands:
        if bool((_collapse(ids)[0] >= 0).all()) and ids.expand(shape).shape == torch.Size(shape):
            return ids.expand(shape)
    reduced = _collapse(*operands)
    result = _combine(text, [ids.clamp(max=-1) for ids in reduced])
    for ids in reduced:
        result = torch.where(ids >= 0, ids, result)
    return result.expand(shape)


@_rule("prelu")
def _prelu(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("self"), call.value("self"))
    _scale_channels(analysis, call, "weight", ids)
    return ids


@_rule("glu")
def _glu(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("self"), call.value("self"))
    first, second = ids.chunk(2, dim=call.value("dim"))
    analysis.unite(first, second)
    return _joined(call.node.name, [first, second], first.shape)


def _scale_channels(
    analysis: _Analysis, call: _Call, name: str, ids: Tensor, axis: int = 1
) -> None:
    """Let a parameter (num_channels,) act along an axis of an activation."""
    label = call.label(name)
    value = call.value(name)
    if not isinstance(value, Tensor):
        return
    if axis < 0:
        axis += ids.dim()
    shape = [-1 if i == axis and value.numel() > 1 else 1 for i in range(ids.dim())]
    if isinstance(label, _View):
        analysis.scale(label, ids, shape)
    elif label is None:
        analysis.meet(ids, _value_ids(value).reshape(shape))
    else:
        raise analysis.unsupported(call.node, f"its {name} is computed from other values")


# --- rules: norms and reductions ---------------------------------------------------------------


def _reduced(analysis: _Analysis, text: str, ids: Tensor, axes: Sequence[int]) -> Tensor:
    """Return the labels of a reduction that ignores the order along ``axes`` (kept, size 1).

    Along positions the label stays. Over different channels the result is fixed, and the
    channels are marked by the results that they take part in: they may only change places
    within those.
    """
    axes = [axis % max(ids.dim(), 1) for axis in axes]
    kept = [axis for axis in range(ids.dim()) if axis not in axes]
    roots = analysis.roots(_collapse_within(ids, axes)) if ids.dim() else ids
    rows = roots.permute(*kept, *axes).flatten(len(kept)) if ids.dim() else ids.reshape(1)
    low, high = rows.amin(-1), rows.amax(-1)
    alike = low == high
    shape = [1 if axis in axes else ids.size(axis) for axis in range(ids.dim())]
    results = torch.where(alike, low, _fixed_ids(text, low.shape))
    results = torch.where(alike & (low < 0), _combine(text, [low.clamp(max=-1)]), results)
    results = results.reshape(shape)
    if not bool(alike.all()):
        mask = alike.reshape(shape).expand(ids.shape)
        analysis.meet(torch.where(mask, -1, ids), results.clamp(max=-1).expand(ids.shape))
    return results


def _collapse_within(ids: Tensor, axes: Sequence[int]) -> Tensor:
    """Drop those of ``axes`` along which the labels do not vary."""
    for axis in axes:
        first = ids.narrow(axis, 0, 1)
        if ids.size(axis) > 1 and (ids.stride(axis) == 0 or bool((ids == first).all())):
            ids = first
    return ids


@_rule(
    *"""sum mean amax amin var std norm logsumexp prod any all nansum var_mean std_mean
    linalg_vector_norm max min median max_pool_all count_nonzero aminmax""".split()
)
def _reduction(analysis: _Analysis, call: _Call) -> Label:
    operands = call.tensors()
    if len(operands) == 2:  # max(a, b) and min(a, b) are elementwise
        return _elementwise(analysis, call)
    ids = analysis.activation(call.label_of(operands[0][1]), call.value_of(operands[0][1]))
    axes = call.concrete(call.bound.get("dim"))
    axes = [axes] if isinstance(axes, int) else list(axes or range(ids.dim()))
    axes = [axis % max(ids.dim(), 1) for axis in axes]
    results = _reduced(analysis, call.node.name, ids, axes)
    if call.name in ("max", "min", "median") and isinstance(call.output, tuple):
        wanted = {user.args[1] for user in call.node.users if user.users}
        if wanted - {0}:
            analysis.pin(torch.where(results < 0, ids, -1))  # the winner's place is a result, too
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    if outputs[0].dim() < ids.dim():
        results = results.flatten() if outputs[0].dim() == 0 else results.squeeze(tuple(axes))
        results = results.reshape(outputs[0].shape)
    return (results,) * len(outputs) if isinstance(call.output, tuple) else results


@_rule(*"softmax _softmax log_softmax _log_softmax _safe_softmax softmin".split())
def _softmax(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("self"), call.value("self"))
    sums = _reduced(analysis, call.node.name, ids, [call.value("dim")])
    return _joined(call.node.name, [ids, sums.clamp(max=-1)], ids.shape)


@_rule(
    *"cumsum cumprod logcumsumexp cummax cummin sort argsort topk argmax argmin kthvalue".split()
)
def _ordered(analysis: _Analysis, call: _Call) -> Label:
    """Depend on the order along an axis: channels there keep their places."""
    ids = analysis.activation(call.label("self"), call.value("self"))
    axis = call.concrete(call.bound.get("dim"))
    axes = list(range(ids.dim())) if axis is None else [axis % max(ids.dim(), 1)]
    if _collapse_within(ids, axes).numel() != ids.numel() and call.name.startswith("cum"):
        return ids
    analysis.pin(ids)
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    labels = tuple(_fixed_ids(f"{call.node.name}{i}", one.shape) for i, one in enumerate(outputs))
    return labels if isinstance(call.output, tuple) else labels[0]


@_rule(*["batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"])
def _batch_norm(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    for name in ("weight", "bias", "running_mean", "running_var"):
        _scale_channels(analysis, call, name, ids)
    return (ids, None, None) if isinstance(call.output, tuple) else ids


@_rule("instance_norm")
def _instance_norm(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    _reduced(analysis, call.node.name, ids, range(2, ids.dim()))
    for name in ("weight", "bias", "running_mean", "running_var"):
        _scale_channels(analysis, call, name, ids)
    return ids


@_rule(*"layer_norm native_layer_norm rms_norm _fused_rms_norm".split())
def _layer_norm(analysis: _Analysis, call: _Call) -> Label:
    name = "input" if "input" in call.bound else "self"
    ids = analysis.activation(call.label(name), call.value(name))
    count = len(call.value("normalized_shape"))
    _reduced(analysis, call.node.name, ids, range(ids.dim() - count, ids.dim()))
    for parameter in ("weight", "bias"):
        label = call.label(parameter)
        if isinstance(label, _View):
            analysis.scale(label, ids)
        elif isinstance(label, Tensor):
            raise analysis.unsupported(call.node, f"its {parameter} is computed from other values")
    return (ids, None, None) if isinstance(call.output, tuple) else ids


@_rule(*["group_norm", "native_group_norm"])
def _group_norm(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    groups = call.value("num_groups" if "num_groups" in call.bound else "group")
    _reduced(
        analysis,
        call.node.name,
        ids.unflatten(1, (groups, ids.size(1) // groups)),
        range(2, ids.dim() + 1),
    )
    for name in ("weight", "bias"):
        _scale_channels(analysis, call, name, ids)
    return (ids, None, None) if isinstance(call.output, tuple) else ids


# --- rules: pooling ----------------------------------------------------------------------------


@_rule(
    *"""max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa lp_pool2d _upsample_nearest_exact1d _upsample_nearest_exact2d""".split()
)
def _pooling(analysis: _Analysis, call: _Call) -> Label:
    """Mix positions: the label stays where all positions have the same one."""
    node = call.tensors()[0][1]
    ids = analysis.activation(call.label_of(node), call.value_of(node))
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    spatial = _spatial_axes(call.name, ids.dim())
    (first,) = (_collapse_within(ids, spatial),)
    if all(first.size(axis) == 1 for axis in spatial):
        label = first
        if bool((label < 0).any()):
            label = torch.where(label >= 0, label, _combine(call.node.name, [label.clamp(max=-1)]))
        label = label.expand(outputs[0].shape)
    else:
        analysis.pin(ids)  # channels along a pooled axis keep their places
        label = _fixed_ids(call.node.name, outputs[0].shape)
    return (label,) * len(outputs) if isinstance(call.output, tuple) else label


def _spatial_axes(name: str, dims: int) -> list[int]:
    count = next(int(digit) for digit in name if digit.isdigit())
    return list(range(dims - count, dims))


# --- rules: weighted operations ----------------------------------------------------------------


def _weight(analysis: _Analysis, call: _Call, name: str) -> _View:
    label = call.label(name)
    if not isinstance(label, _View) or label.name in analysis.buffers:
        raise analysis.unsupported(
            call.node,
            f"its {name} is {'a constant' if label is None else 'computed from other values'}, "
            "not a parameter (remove parametrizations such as weight_norm first)",
        )
    return label


def _rows(ids: Tensor, axis: int) -> Tensor:
    """Return the different rows ``(num_rows, num_channels)`` of labels along ``axis``."""
    moved = ids.movedim(axis, -1)
    (reduced,) = _collapse(moved)
    return reduced.expand(*reduced.shape[:-1], moved.size(-1)).reshape(-1, moved.size(-1))


def _mixes_positions(analysis: _Analysis, rows: Tensor) -> bool:
    """Tell whether an axis holds positions: each row is one channel, and the rows differ."""
    rows = analysis.roots(rows)
    return rows.size(0) > 1 and bool((rows == rows[:, :1]).all()) and bool((rows >= 0).all())


def _outgoing(analysis: _Analysis, view: _View, role: str, axis: int) -> Tensor:
    """Return the labels of a weight's outgoing channels: new atoms, or those of its first use."""
    count = view.tensor.size(axis)
    if count == 1:
        return _fixed_ids(f"{view.name}{role}single", (1,))
    return analysis.weigh(view, role, {axis: analysis.fresh(count)})[axis]


def _linear_labels(
    analysis: _Analysis, call: _Call, ids: Tensor, view: _View, axes: tuple[int, int]
) -> Tensor:
    """Return the labels of ``ids @ weight`` over the last axis; ``axes`` = (out, in)."""
    rows = _rows(ids, -1)
    count = view.tensor.size(axes[0])
    if _mixes_positions(analysis, rows):
        return ids[..., :1].expand(*ids.shape[:-1], count)
    analysis.weigh(view, "weight", {axes[1]: analysis.common_row(rows)}, inward=[axes[1]])
    if count == 1:
        return _fixed_ids(call.node.name, (*ids.shape[:-1], 1))
    return _outgoing(analysis, view, "weight", axes[0]).expand(*ids.shape[:-1], count)


@_rule("linear")
def _linear(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    result = _linear_labels(analysis, call, ids, _weight(analysis, call, "weight"), (0, 1))
    _scale_channels(analysis, call, "bias", result, axis=-1)
    return result


@_rule(*"conv1d conv2d conv3d convolution _convolution".split())
def _conv(analysis: _Analysis, call: _Call) -> Label:
    if call.bound.get("transposed"):
        return _transposed_conv(analysis, call)
    ids = analysis.activation(call.label("input"), call.value("input"))
    view = _weight(analysis, call, "weight")
    weight = view.tensor
    groups = call.value("groups")
    rows = _rows(ids, 1)
    outputs, per_group = weight.size(0), weight.size(1)
    shape = call.output.shape
    if groups == 1 and weight[0, 0].numel() == 1 and _mixes_positions(analysis, rows):
        result = ids[:, :1].expand(shape)
    else:
        row = analysis.common_row(rows)
        if per_group == 1 and groups > 1:  # depthwise: every output belongs to its input
            out = row.repeat_interleave(outputs // groups)
            out = analysis.weigh(view, "weight", {0: out})[0]
        else:
            parts = []
            for group in range(groups):
                part = _View(view.name, weight.chunk(groups, 0)[group])
                incoming = row.chunk(groups)[group]
                analysis.weigh(part, "weight", {1: incoming}, inward=[1])
                parts.append(_outgoing(analysis, part, "weight", 0))
            out = torch.cat(parts)
        result = _channels_labels(call, out, shape)
    _scale_channels(analysis, call, "bias", result)
    return result


def _channels_labels(call: _Call, out: Tensor, shape: Sequence[int]) -> Tensor:
    """Spread channel labels over an output; fixed channels get an id for each element."""
    labels = out.reshape(1, -1, *[1] * (len(shape) - 2)).expand(tuple(shape))
    if bool((out < 0).any()):
        labels = torch.where(labels >= 0, labels, _fixed_ids(call.node.name, shape))
    return labels


@_rule(*["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
def _transposed_conv(analysis: _Analysis, call: _Call) -> Label:
    ids = analysis.activation(call.label("input"), call.value("input"))
    view = _weight(analysis, call, "weight")
    groups = call.value("groups")
    row = analysis.common_row(_rows(ids, 1))
    weight = view.tensor
    if weight.size(1) == 1 and weight.size(0) == groups and groups > 1:
        out = analysis.weigh(view, "weight", {0: row})[0]
    else:
        parts = []
        for group in range(groups):
            part = _View(view.name, weight.chunk(groups, 0)[group])
            analysis.weigh(part, "weight", {0: row.chunk(groups)[group]}, inward=[0])
            parts.append(_outgoing(analysis, part, "weight", 1))
        out = torch.cat(parts)
    result = _channels_labels(call, out, call.output.shape)
    _scale_channels(analysis, call, "bias", result)
    return result


@_rule("embedding")
def _embedding(analysis: _Analysis, call: _Call) -> Label:
    view = _weight(analysis, call, "weight")
    return _outgoing(analysis, view, "weight", 1).expand(call.output.shape)


@_rule("embedding_bag", "_embedding_bag")
def _embedding_bag(analysis: _Analysis, call: _Call) -> Label:
    out = _outgoing(analysis, _weight(analysis, call, "weight"), "weight", 1)
    return (out.expand(call.output[0].shape), None, None, None)


@_rule(*"matmul mm bmm addmm baddbmm".split())
def _matmul(analysis: _Analysis, call: _Call) -> Label:
    names = {
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "bmm": ("self", "mat2"),
        "mm": ("self", "mat2"),
    }.get(call.name, ("self", "other"))
    first, second = (call.label(name) for name in names)
    result: Tensor
    if (
        isinstance(second, _View)
        and second.name not in analysis.buffers
        and second.tensor.dim() == 2
    ):
        ids = analysis.activation(first, call.value(names[0]))
        result = _linear_labels(analysis, call, ids, second, (1, 0))
    elif (
        isinstance(first, _View) and first.name not in analysis.buffers and first.tensor.dim() == 2
    ):
        ids = analysis.activation(second, call.value(names[1]))
        if ids.dim() < 2:
            raise analysis.unsupported(call.node, "a matrix parameter times a vector")
        result = _linear_labels(analysis, call, ids.mT, first, (0, 1)).mT
    else:
        left, right = (
            analysis.activation(label, call.value(name))
            for label, name in zip((first, second), names, strict=True)
        )
        left = left.unsqueeze(0) if left.dim() == 1 else left
        right = right.unsqueeze(1) if right.dim() == 1 else right
        result = _contracted(analysis, call.node.name, left, right).reshape(call.output.shape)
    if call.name in ("addmm", "baddbmm"):
        return _combined(
            analysis,
            call.node.name + "_sum",
            [(call.label("self"), call.value("self")), (result, call.output)],
        )
    return result


def _contracted(analysis: _Analysis, text: str, left: Tensor, right: Tensor) -> Tensor:
    """Return the labels of a product of two activations ``(..., m, k) @ (..., k, n)``."""
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    m, k, n = left.size(-2), left.size(-1), right.size(-1)
    left, right = left.expand(*batch, m, k), right.expand(*batch, k, n)
    moving = [bool((_collapse(ids)[0] >= 0).any()) for ids in (left, right)]
    places = _fixed_ids(text, (*batch, 1))  # one id for each product in the batch
    if not any(moving):
        return _fixed_ids(text, (*batch, m, n))
    if not moving[1]:
        return _contracted(analysis, text, right.mT, left.mT).mT
    if not moving[0]:
        if _constant_along(right, -2):
            # A fixed mixture of positions (attention): the channels of the right side stay.
            weights = _sequence_ids(left)
            analysis.meet(right[..., 0, :], weights.unsqueeze(-1).expand(*batch, n))
            return right[..., :1, :].expand(*batch, m, n)
        if _constant_along(right, -1):
            analysis.meet(right[..., 0], _sequence_ids(left.mT.unsqueeze(-1)))
            return _fixed_ids(text, (*batch, m, n))
        analysis.pin(right)
        return _fixed_ids(text, (*batch, m, n))
    if _constant_along(left, -2) and _constant_along(right, -1):
        # Contracted channels (query with key): they move together, the result with none.
        analysis.unite(left[..., 0, :], right[..., :, 0])
        analysis.meet(left[..., 0, :], places.expand(*batch, k))
        return _fixed_ids(text, (*batch, m, n))
    analysis.pin(left)
    if _constant_along(left, -1) and _constant_along(right, -2):
        # Contracted positions (key with value in linear attention): two channels remain, of which
        # a label tensor holds one, so the left side's keep their places.
        analysis.meet(right[..., 0, :], places.expand(*batch, n))
        return right[..., :1, :].expand(*batch, m, n)
    analysis.pin(right)
    return _fixed_ids(text, (*batch, m, n))


def _constant_along(ids: Tensor, axis: int) -> bool:
    return _collapse_within(ids, [axis % ids.dim()]).size(axis) == 1


def _sequence_ids(ids: Tensor) -> Tensor:
    """Return one id for each matrix in ``(..., m, k)``, equal where the matrices are equal."""
    rows = ids.reshape(*ids.shape[:-2], -1)
    ranks = _mix(np.arange(rows.size(-1), dtype=np.uint64))
    return _as_fixed(_mix(_words(rows.contiguous()) ^ ranks).sum(-1, dtype=np.uint64))


@_rule("scaled_dot_product_attention")
def _attention(analysis: _Analysis, call: _Call) -> Label:
    query, key, value = (
        analysis.activation(call.label(name), call.value(name))
        for name in ("query", "key", "value")
    )
    if call.value("enable_gqa"):
        key, value = (
            ids.repeat_interleave(query.size(-3) // ids.size(-3), -3) for ids in (key, value)
        )
    scores = _contracted(analysis, call.node.name + "_scores", query, key.mT)
    mask = call.bound.get("attn_mask")
    if isinstance(mask, fx.Node):
        ids = analysis.activation(call.label("attn_mask"), call.value("attn_mask"))
        analysis.unite(scores, ids.expand(scores.shape))
        scores = _joined(call.node.name + "_mask", [scores, ids], scores.shape)
    _reduced(analysis, call.node.name + "_softmax", scores, [-1])
    return _contracted(analysis, call.node.name, scores, value)


@_rule(*"lstm gru rnn_tanh rnn_relu".split())
def _recurrent(analysis: _Analysis, call: _Call) -> Label:
    """Tie a layer's hidden channels: the rows of all gates and the columns of the recurrence."""
    if "input" not in call.bound or "hx" not in call.bound or "data" in call.bound:
        raise analysis.unsupported(call.node, "packed sequences")
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    ids = analysis.activation(call.label("input"), call.value("input"))
    weights = list(call.bound["params"])
    directions = 2 if call.value("bidirectional") else 1
    layers = call.value("num_layers")
    each = 4 if call.value("has_biases") else 2
    if len(weights) != each * directions * layers:
        raise analysis.unsupported(call.node, "projected hidden states (proj_size)")
    hidden: list[Tensor] = []
    for layer in range(layers):
        row = analysis.common_row(_rows(ids, -1))
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            atoms = _recurrence(analysis, call, row, weights[start : start + each], gates)
            outputs.append(atoms)
            hidden.append(atoms)
        channels = torch.cat(outputs)
        ids = channels.expand(*ids.shape[:-1], len(channels))
    _tie_initial_states(analysis, call, hidden)
    states = torch.stack([atoms.expand(call.output[1].size(1), -1) for atoms in hidden])
    return (ids, *[states] * (len(call.output) - 1))


def _recurrence(
    analysis: _Analysis, call: _Call, row: Tensor, weights: Sequence[fx.Node], gates: int
) -> Tensor:
    """Tie one recurrent layer's hidden channels; return their atoms."""
    views = [label for label in map(call.label_of, weights) if isinstance(label, _View)]
    if len(views) != len(weights):
        raise analysis.unsupported(call.node, "its weights are computed from other values")
    atoms = analysis.fresh(views[1].tensor.size(1))
    analysis.weigh(views[0], "weight", {0: atoms.repeat(gates), 1: row}, inward=[1])
    analysis.weigh(views[1], "weight", {0: atoms.repeat(gates), 1: atoms}, inward=[1])
    for bias in views[2:]:
        analysis.scale(bias, atoms.repeat(gates))
    return atoms


@_rule(*"lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
def _recurrent_cell(analysis: _Analysis, call: _Call) -> Label:
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(call.name, 1)
    ids = analysis.activation(call.label("input"), call.value("input"))
    weights = [call.bound[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    present = [node for node in weights if isinstance(node, fx.Node)]
    atoms = _recurrence(analysis, call, analysis.common_row(_rows(ids, -1)), present, gates)
    states = call.bound["hx"]
    for node in states if isinstance(states, (list, tuple)) else [states]:
        state = analysis.activation(call.label_of(node), call.value_of(node))
        analysis.unite(state, atoms.expand(state.shape))
    result = atoms.expand(*ids.shape[:-1], len(atoms))
    return (result, result) if isinstance(call.output, tuple) else result


def _tie_initial_states(analysis: _Analysis, call: _Call, hidden: Sequence[Tensor]) -> None:
    initial = call.bound["hx"]
    for node in initial if isinstance(initial, (list, tuple)) else [initial]:
        ids = analysis.activation(call.label_of(node), call.value_of(node))
        for atoms, layer in zip(hidden, ids, strict=True):
            analysis.unite(layer, atoms.expand(layer.shape))
