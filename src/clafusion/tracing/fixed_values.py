"""What enters a network beside its input and its trained weights: constants, tables, masks.

None of it can be averaged or permuted. So two layers match only if all of it is the same in both:
a buffer and a tensor that the code makes by their values, what is computed from them and from the
input by its operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from clafusion.tracing.flow import Flow
from clafusion.tracing.labels.ids import collapse
from clafusion.tracing.operations import RESHAPES, op_name

__all__ = ["Constant", "FixedValues"]

_TOLERANCE = 1e-5  # what rounding in another type may leave in a table, relative to its largest
_VIEWS = RESHAPES | frozenset("slice select narrow lift_fresh lift_fresh_copy".split())


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that is no trained parameter.

    Two are equal where their values are, in as far as the example inputs reach them. Of one shape
    they must be equal as wholes. An axis along which nothing varies may have any size.

    Attributes
    ----------
    name
        Its name in the model's state, or of the tensor that the code makes.
    whole
        All of it.
    reached
        What the layer reads of it.
    """

    name: str
    whole: Tensor
    reached: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        if self.whole.shape == other.whole.shape and not _equal(self.whole, other.whole):
            return False
        return _equal(self.reached, other.reached)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"constant {self.name!r}"


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point() != other.is_floating_point():
        return False
    one, other = (
        collapse(torch.view_as_real(value) if value.is_complex() else value)[0]
        for value in (one.cpu(), other.cpu())
    )
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    one, other = one.double(), other.double()
    scale = one[one.isfinite()].abs().amax() if bool(one.isfinite().any()) else torch.tensor(0.0)
    bound = _TOLERANCE * float(scale)
    return torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True)


def _constant(name: str, value: Tensor) -> Constant:
    """Return a constant of its own: a trace outlives what its model's buffers hold now."""
    own = value.detach().clone()
    return Constant(name, own, own)


class FixedValues:
    """The values of a graph that neither channels nor trained parameters enter.

    Parameters
    ----------
    flow
        The flow of the graph.
    module
        The graph's module, which may hold constants of its own.
    constants
        Which state entries are no trained parameters, and no statistics of a norm.
    """

    def __init__(self, flow: Flow, module: fx.GraphModule, constants: frozenset[str]) -> None:
        self._flow = flow
        self._module = module
        self._constants = constants
        self._known: dict[fx.Node, Constant | None] = {}

    def constant(self, node: fx.Node) -> Constant | None:
        """Return the constant that a node holds or shows a part of; None where it is none."""
        if node not in self._known:
            self._known[node] = self._constant(node)
        return self._known[node]

    def _constant(self, node: fx.Node) -> Constant | None:
        if node in self._flow.sources:
            name = self._flow.sources[node]
            if name not in self._constants:
                return None
            return _constant(name, self._flow.state[name])
        if node.op == "get_attr":
            value = getattr(self._module, str(node.target))
            return _constant(str(node.target), value) if isinstance(value, Tensor) else None
        if op_name(node) not in _VIEWS or len(node.all_input_nodes) != 1:
            return None
        shown = self.constant(node.all_input_nodes[0])
        if shown is None:
            return None
        (operand,) = node.all_input_nodes
        arguments, keywords = fx.map_arg(
            (node.args, node.kwargs), lambda one: shown.reached if one is operand else one
        )
        return Constant(shown.name, shown.whole, node.target(*arguments, **keywords))

    def before(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Return the operations beside the flow whose results some nodes read, in graph order.

        Those that compute weights from parameters are among them.
        """
        own, found, waiting = set(nodes), set[fx.Node](), list(nodes)
        while waiting:
            for operand in waiting.pop().all_input_nodes:
                if operand in own or operand in found or not self._is_beside(operand):
                    continue
                found.add(operand)
                waiting.append(operand)
        return sorted(found, key=self._flow.order.__getitem__)

    def _is_beside(self, node: fx.Node) -> bool:
        """Return whether a node computes a tensor from inputs and constants, or a weight."""
        return (
            node.op == "call_function"
            and node not in self._flow
            and node.name in self._flow.channels.shapes
            and (
                node in self._flow.channels.labels.computing
                or all(name in self._constants for name in self._flow.parameters(node))
            )
            and self.constant(node) is None
        )
