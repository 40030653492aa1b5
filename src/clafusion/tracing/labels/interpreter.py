"""Run an exported graph on labels.

The package :mod:`clafusion.tracing.labels.rules` says what each operation does with labels.
"""

from __future__ import annotations

import operator
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from clafusion.errors import UnsupportedOpError
from clafusion.execution.call import State
from clafusion.execution.layouts import laid_out
from clafusion.execution.writes import written_inputs
from clafusion.tracing.functional import changes_what_others_read
from clafusion.tracing.labels.atoms import Atoms, atoms_in
from clafusion.tracing.labels.computed import (
    computed_label,
    weigh_computed,
    weight_computations,
)
from clafusion.tracing.labels.drafts import DraftPin, DraftUse
from clafusion.tracing.labels.ids import collapse, fixed_ids, salt, sequence_ids, value_ids
from clafusion.tracing.labels.rule import (
    POINTWISE,
    REARRANGING,
    RULES,
    Call,
    ComputedWeight,
    Label,
    NotFollowed,
    ParameterView,
    Rule,
)
from clafusion.tracing.normalised import NormalisedWeight
from clafusion.tracing.operations import module_path, op_name, works_in_place

__all__ = ["LabelPropagation"]


class LabelPropagation(Atoms):
    """The state of one run: the atoms and the parameter uses.

    Parameters
    ----------
    state, buffers
        As for :func:`clafusion.tracing.groups.find_channels`.
    parents
        As for :class:`clafusion.tracing.labels.atoms.Atoms`.

    Attributes
    ----------
    undecided
        Whether a parameter's element met several atoms. A second run may find them united.
    lost
        Which channels keep their places because a rule does not follow them, and why.
    uses
        Every view of every parameter, by name, size, stride and offset.
    labels
        The label of each node.
    crossed
        Nodes whose positions belong to other channels than their labels name.
    outer
        Labels of channels that met other channels in a product, whose label names those.
    moving_buffers
        Buffers, other than a norm's statistics, that move with a weight.
    experts
        Operations with a matrix for each of several experts: the matrices, and to which of them an
        example input comes.
    computing
        The nodes that compute weights from parameters, as
        :func:`clafusion.tracing.labels.computed.weight_computations` returns them.
    normalised
        Weights that are divided by a norm of their own, by the parameter's name.
    """

    def __init__(
        self,
        state: State,
        buffers: frozenset[str],
        parents: NDArray[np.int64] | None = None,
        layouts: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(parents)
        self.state = state
        self.buffers = buffers
        self.layouts = layouts or {}
        self.undecided = False
        self.lost: list[DraftPin] = []
        self.uses: dict[tuple[Any, ...], DraftUse] = {}
        self.elements: dict[str, Tensor] = {}
        self.reached: dict[str, Tensor] = {}
        self._rearranged: set[str] = set()
        self.labels: dict[fx.Node, Label] = {}
        self.crossed: set[fx.Node] = set()
        self.outer: list[Tensor] = []
        self.moving_buffers: set[str] = set()
        self.normalised: dict[str, NormalisedWeight] = {}
        self._node: fx.Node | None = None
        self.experts: list[
            tuple[fx.Node, Sequence[ParameterView | ComputedWeight], list[bool]]
        ] = []
        self.computing: dict[fx.Node, int] = {}

    def run(
        self,
        module: fx.GraphModule,
        placeholders: Sequence[str | None],
        inputs: Sequence[Tensor],
    ) -> dict[str, tuple[int, ...]]:
        """Give every node a label; return the shapes of the nodes' values.

        Parameters are those of :func:`clafusion.tracing.groups.find_channels`.

        Raises
        ------
        UnsupportedOpError
            The model computes a loss, or the graph holds more than operations on tensors.
        """
        values: dict[fx.Node, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        last_users = _last_users(module.graph)
        sources = iter(placeholders)
        feed = iter(inputs)
        written = written_inputs(module)
        self.computing = weight_computations(module, placeholders, self.buffers)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                name = next(sources)
                value = next(feed) if name is None else self._weight(name)
                values[node] = value.clone() if node.name in written else value
                self.labels[node] = self._placeholder(name, values[node])
            elif node.op == "get_attr":
                values[node] = getattr(module, str(node.target))
                self.labels[node] = None
            elif node.op == "output":
                for result in pytree.tree_leaves(node.args):
                    if isinstance(result, fx.Node):
                        self._node = result
                        self._reach(self.labels[result])
                        self.give_out(self.activation(self.labels[result], values[result]))
            else:
                self._visit(node, values)
            if isinstance(values.get(node), Tensor):
                shapes[node.name] = tuple(values[node].shape)
            for finished in last_users.get(node, ()):
                values.pop(finished, None)
        return shapes

    def _placeholder(self, name: str | None, value: Any) -> Label:
        if not isinstance(value, Tensor):
            return None
        if name is None:
            return fixed_ids("input", value.shape)
        # Places in a parameter are counted in the state's layout, which is the usual one.
        return ParameterView(name, self.state[name] if name in self.layouts else value)

    def _weight(self, name: str) -> Tensor:
        axes = self.layouts.get(name)
        return self.state[name] if axes is None else laid_out(self.state[name], axes)

    def _visit(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        arguments = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand])
        written = node.args[0] if works_in_place(node) else None
        before: dict[fx.Node, Any] = {}
        if isinstance(written, fx.Node) and self.labels[written] is None:
            # The label of a constant is made of its values, as they were before.
            before[written] = values[written].clone()
        values[node] = node.target(*arguments[0], **arguments[1])
        labels = [self.labels[operand] for operand in node.all_input_nodes]
        if node.target is operator.getitem:
            whole = self.labels[node.args[0]]
            self.labels[node] = whole[node.args[1]] if isinstance(whole, tuple) else None
            return
        has_tensor = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(values[node]))
        constant = all(self.is_constant(label) for label in labels)
        if not has_tensor or op_name(node) in _SHAPE_ONLY:
            self.labels[node] = None
            return
        keeps_buffers = op_name(node) in ("batch_norm", "instance_norm") or node in self.computing
        if constant and not keeps_buffers:
            self.labels[node] = None
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise _refusal(node)
        call = Call(node, self.labels, ChainMap(before, values))
        self._node = node
        try:
            self.labels[node] = self._label(call, labels)
        except NotFollowed as cause:
            self.labels[node] = self._all_kept(call, str(cause))
        self._mark(node)
        if isinstance(written, fx.Node):
            # The operation works in place: later nodes that read the operand see the result.
            self.labels[written] = self.labels[node]

    def _label(self, call: Call, labels: Sequence[Label]) -> Label:
        """Return the label that an operation's rule gives."""
        if call.node in self.computing:
            return computed_label(self, call, self.computing[call.node])
        if changes_what_others_read(call.node):
            raise NotFollowed("it writes to a part of a tensor that others read")
        function = _rule_of(call)
        if call.name not in REARRANGING:
            for label in labels:
                self._reach(label)
        return function(self, call)

    def _mark(self, node: fx.Node) -> None:
        """Give the atoms the node as a fingerprint: a node that some atoms skip sets them apart."""
        label = self.labels[node]
        mark = salt(node.name)
        for ids in label if isinstance(label, tuple) else (label,):
            if isinstance(ids, Tensor):
                (reduced,) = collapse(ids)
                atoms = np.unique(reduced[reduced >= 0].numpy())
                self._met.append((atoms, np.broadcast_to(mark, atoms.shape)))

    def _all_kept(self, call: Call, why: str) -> Label:
        """Pin all channels and parameters that an operation reads; return fixed labels.

        What it returns is then the same, whatever else moves.
        """
        for operand in call.node.all_input_nodes:
            label = self.labels[operand]
            for one in label if isinstance(label, tuple) else (label,):
                layers = one.layers if isinstance(one, ComputedWeight) else (one,)
                for layer in layers:
                    ids = self.element_ids(layer) if self.is_parameter(layer) else layer
                    if isinstance(ids, Tensor):
                        self.pin(ids)
                        self.lose(ids, why, with_elements=True)
        labels = tuple(
            fixed_ids(f"{call.node.name}{i}", one.shape) if isinstance(one, Tensor) else None
            for i, one in enumerate(pytree.tree_leaves(call.output))
        )
        return labels if isinstance(call.output, (tuple, list)) else labels[0]

    def is_parameter(self, label: Label) -> TypeGuard[ParameterView]:
        """Return whether a value is a trained parameter, or a view of one."""
        return isinstance(label, ParameterView) and label.name not in self.buffers

    def is_trained(self, label: Label) -> TypeGuard[ParameterView | ComputedWeight]:
        """Return whether a value is a trained parameter, or is computed from such alone."""
        return isinstance(label, ComputedWeight) or self.is_parameter(label)

    def is_constant(self, label: Label) -> bool:
        """Return whether a value depends neither on the input nor on a trained parameter."""
        return label is None or (isinstance(label, ParameterView) and label.name in self.buffers)

    def lose(
        self,
        ids: Tensor,
        why: str,
        *,
        as_wholes: bool = False,
        with_elements: bool = False,
        node: fx.Node | None = None,
    ) -> None:
        """Note that an operation pins channels which might change places; default that at hand.

        The other arguments are those of :class:`clafusion.tracing.labels.drafts.DraftPin`.
        """
        node = node or self._node
        assert node is not None
        self.lost.append(DraftPin(atoms_in(ids), node, why, as_wholes, with_elements))

    def activation(self, label: Label, value: Tensor) -> Tensor:
        """Return the label tensor of an operand that acts as an activation.

        A trained parameter gets an atom for each element, a constant the ids of its values.
        """
        if isinstance(label, Tensor):
            return label
        if self.is_parameter(label):
            return self.element_ids(label)
        if isinstance(label, ComputedWeight):
            if len(label.layers) > 1:
                raise NotFollowed("it reads a weight that is computed from others")
            layers = label.layers or (fixed_ids(label.name, value.shape),)
            return layers[0]
        return value_ids(value)

    def element_ids(self, view: ParameterView, *, are_reached: bool = True) -> Tensor:
        """Return the labels of a parameter that acts as an activation: an atom for each element.

        Without ``are_reached`` they are those of an operation that may leave some of them behind,
        as one that reads a table by index: those that another operation meets are reached.
        """
        base = self.state[view.name]
        if view.name not in self.elements:
            self.elements[view.name] = self.fresh(base.numel())
            use = DraftUse(view.name, "element", (base.numel(),), (1,), 0, node=self._node)
            use.axes[0], use.directions[0] = self.elements[view.name], "out"
            self.uses[view.name, "elements"] = use
            self.reached[view.name] = torch.zeros(base.numel(), dtype=torch.bool)
        offset = view.tensor.storage_offset() - base.storage_offset()
        place = view.tensor.shape, view.tensor.stride(), offset
        if are_reached:
            self.reached[view.name].as_strided(*place).fill_(True)
        else:
            self._rearranged.add(view.name)
        return self.elements[view.name].as_strided(*place)

    def _reach(self, label: Label) -> None:
        """Note that the elements in a label have met an operation that reads their values."""
        for ids in label if isinstance(label, tuple) else (label,):
            if not self._rearranged or not isinstance(ids, Tensor):
                continue
            atoms = collapse(ids)[0].reshape(-1)
            for name in self._rearranged & self.reached.keys():
                elements = self.elements[name]
                if len(elements) == 0:
                    continue
                own = atoms[(atoms >= elements[0]) & (atoms <= elements[-1])]
                self.reached[name][own - elements[0]] = True

    def forget_elements(self, name: str) -> None:
        """Forget the atoms of a parameter's elements, so that it can get others."""
        self.elements.pop(name, None)
        self.reached.pop(name, None)
        self.uses.pop((name, "elements"), None)

    def settle_unreached(self) -> dict[str, int]:
        """Let elements that no input reached move with those that some did; pin the rest.

        A table of positions may be longer than the examples. Where every row that is reached has
        the same channels in the same places, so have the others. Returns for each parameter how
        many elements were pinned.
        """
        pinned = {}
        for name, reached in self.reached.items():
            if bool(reached.all()):
                continue
            shape = self.state[name].shape
            elements, known = self.elements[name].view(shape), reached.view(shape).clone()
            for axis in range(elements.dim()):
                lines = known.any(axis) & ~known.all(axis)
                if not bool(lines.any()):
                    continue
                first = known.to(torch.uint8).argmax(axis, keepdim=True)
                of_line = self.roots(elements).gather(axis, first).expand(shape)
                certain = (self.roots(elements) == of_line) | ~known
                if bool(certain.all()):
                    follow = ~known & known.any(axis, keepdim=True)
                    self.unite(elements[follow], of_line[follow])
                    known |= follow
            if not bool(known.all()):
                self.pin(elements[~known])
                pinned[name] = int((~known).sum())
        return pinned

    def scale(self, view: ParameterView, ids: Tensor, shape: Sequence[int] | None = None) -> None:
        """Let a parameter act element by element on an activation with the labels ``ids``.

        An element that meets one atom moves with that atom. An element that several atoms share
        (a positional bias, a common slope) is pinned. ``shape`` broadcasts the parameter.
        """
        tensor = view.tensor if shape is None else view.tensor.reshape(tuple(shape))
        elements = self.element_ids(ParameterView(view.name, tensor))
        elements, ids = collapse(elements, ids)
        roots = self.roots(ids).reshape(-1).numpy()
        flat = elements.reshape(-1).numpy()
        moving = roots >= 0
        pairs = np.unique(np.stack([flat[moving], roots[moving]], 1), axis=0)
        met, counts = np.unique(pairs[:, 0], return_counts=True)
        alone = np.isin(flat, met[counts == 1])
        self.undecided |= bool((counts > 1).any())
        # The negative id -1 - flat fixes an element.
        fixed = torch.from_numpy(np.where(alone, flat, -1 - flat))
        self.pin(torch.from_numpy(flat[~alone]))
        self.unite(fixed.reshape(elements.shape), ids)

    def weigh(
        self,
        view: ParameterView | ComputedWeight,
        role: str,
        axes: Mapping[int, Tensor],
        inward: Sequence[int] = (),
    ) -> dict[int, Tensor]:
        """Record that axes of a parameter view carry ids; return the ids now on them.

        A second use of the same view unites its ids with those of the first.

        Parameters
        ----------
        view
            The parameter view, or a weight that is computed from such.
        role
            Which of the operation's operands it is.
        axes
            For each axis that carries channels, their ids.
        inward
            Those axes whose channels enter the parameter; the others leave it.
        """
        if isinstance(view, ComputedWeight):
            return weigh_computed(self, view, axes, inward)
        base = self.state[view.name]
        order = sorted(range(view.tensor.dim()), key=view.tensor.stride, reverse=True)
        size = tuple(view.tensor.size(axis) for axis in order)
        stride = tuple(view.tensor.stride(axis) for axis in order)
        offset = int(view.tensor.storage_offset() - base.storage_offset())
        key = (view.name, size, stride, offset)
        new = DraftUse(view.name, role, size, stride, offset, node=self._node)
        use = self.uses.setdefault(key, new)
        current = {}
        for axis, ids in axes.items():
            place = order.index(axis)
            if place in use.axes:
                self.unite(use.axes[place], ids)
                if (use.directions[place] == "in") != (axis in inward):
                    self.count(ids)  # one weight both writes and reads these channels
                use.axes[place] = torch.where(use.axes[place] >= 0, use.axes[place], ids)
            else:
                use.axes[place] = ids
                use.directions[place] = "in" if axis in inward else "out"
            current[axis] = use.axes[place]
        return current

    def common_row(self, rows: Tensor) -> Tensor:
        """Unite the rows of a label matrix ``(num_rows, num_channels)``; return the one row.

        A column without an atom gets the fixed id of its sequence.
        """
        first = rows[:1].expand(rows.shape)
        if rows.size(0) > 1:
            self.unite(first, rows)
        moving = rows >= 0
        any_moving = moving.any(0)
        chosen = rows.gather(0, moving.to(torch.uint8).argmax(0, keepdim=True)).squeeze(0)
        if bool(any_moving.all()):
            return chosen
        fixed = torch.where((rows == first).all(0), first[0], sequence_ids(rows.T))
        return torch.where(any_moving, chosen, fixed)


def _rule_of(call: Call) -> Rule:
    """Return the rule of an operation.

    Raises
    ------
    NotFollowed
        It has none.
    UnsupportedOpError
        It computes a loss.
    """
    function = RULES.get(call.name)
    if function is None and torch.Tag.pointwise in call.node.target.tags:
        function = RULES[POINTWISE]
    if function is None and (call.name in _LOSSES or call.name.endswith("_loss")):
        raise UnsupportedOpError(
            f"the model computes a loss ({call.name} in {module_path(call.node) or 'forward'}): "
            "give inputs without labels, and a model that returns its outputs"
        )
    if function is None:
        raise NotFollowed("the channel analysis has no rule for it")
    return function


def _refusal(node: fx.Node) -> UnsupportedOpError:
    """Return the error for a node that is no operation on tensors."""
    where = module_path(node) or "the top level"
    is_transform = "_functorch" in getattr(node.target, "__module__", "")
    why = "a transform of torch.func, such as torch.vmap" if is_transform else "no ATen operation"
    return UnsupportedOpError(
        f"operation {op_name(node)} in {where!r} (node {node.name!r}) is not supported: it is "
        f"{why}. Replace it by operations on tensors"
    )


def _last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return for each node the nodes whose values no later node needs."""
    seen: set[fx.Node] = set()
    finished: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for operand in (node, *node.all_input_nodes):
            if operand not in seen:
                seen.add(operand)
                finished.setdefault(node, []).append(operand)
    return finished


_LOSSES = frozenset(
    """cross_entropy_loss nll_loss nll_loss_nd nll_loss2d binary_cross_entropy kl_div
    binary_cross_entropy_with_logits ctc_loss""".split()
)

_SHAPE_ONLY = frozenset(
    """sym_size sym_stride sym_numel zeros_like ones_like full_like empty_like rand_like
    randn_like new_zeros new_ones new_full new_empty""".split()
)
