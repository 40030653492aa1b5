"""What a label rule gets and returns, and the register of all rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, fx

from clafusion.tracing.labels.drafts import DraftUse
from clafusion.tracing.operations import bound_operands, op_name

if TYPE_CHECKING:
    from clafusion.tracing.labels.interpreter import LabelPropagation

__all__ = [
    "POINTWISE",
    "REARRANGING",
    "RULES",
    "Call",
    "ComputedWeight",
    "Label",
    "NotFollowed",
    "ParameterView",
    "Rule",
    "rule",
]


class NotFollowed(Exception):  # noqa: N818  (no error: the channels are pinned)
    """Raised by a rule that does not follow an operation; the message says why.

    The channels and parameters that the operation reads keep their places then, and the user is
    told.
    """


@dataclass(frozen=True)
class ParameterView:
    """A parameter, or a view of a parameter, that has not met an activation yet."""

    name: str
    tensor: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> ParameterView:
        """Return the view that a function makes of this one."""
        return ParameterView(self.name, change(self.tensor))


@dataclass(frozen=True)
class ComputedWeight:
    """A weight that is computed from parameters alone, and has not met an activation yet.

    Attributes
    ----------
    name
        The name of the node that computes it.
    tensor
        Its value.
    layers
        Labels of its shape, one tensor for each axis of the parameters that carries channels.
    sources
        The uses of the parameters.
    """

    name: str
    tensor: Tensor
    layers: tuple[Tensor, ...]
    sources: tuple[DraftUse, ...]

    def changed(self, change: Callable[[Tensor], Tensor]) -> ComputedWeight:
        """Return the part that a function takes of this weight."""
        layers = tuple(change(one) for one in self.layers)
        return ComputedWeight(self.name, change(self.tensor), layers, self.sources)


Label: TypeAlias = "Tensor | ParameterView | ComputedWeight | tuple[Label, ...] | None"
"""Labels, parameter view, computed weight, None for a constant; a tuple for several values."""


class Call:
    """A node with its operands bound to the names of the operation's schema."""

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
        self.bound = bound_operands(node)

    @property
    def output(self) -> Any:
        """The concrete value that the operation returned."""
        return self._values[self.node]

    def value(self, name: str) -> Any:
        """Return the concrete value of an operand."""
        return self.concrete(self.bound[name])

    def concrete(self, argument: Any) -> Any:
        """Return an operand with its nodes replaced by their concrete values."""
        return fx.map_arg(argument, lambda node: self._values[node])

    def label(self, name: str) -> Label:
        """Return an operand's label; None where it is a constant or missing."""
        argument = self.bound.get(name)
        return self._labels[argument] if isinstance(argument, fx.Node) else None

    def tensors(self) -> list[tuple[str, fx.Node]]:
        """Return the operands that are tensors, with their names."""
        operands: list[tuple[str, fx.Node]] = []
        for name, argument in self.bound.items():
            nodes = argument if isinstance(argument, (list, tuple)) else [argument]
            operands += [
                (name, node)
                for node in nodes
                if isinstance(node, fx.Node) and isinstance(self._values[node], Tensor)
            ]
        return operands

    def label_of(self, node: fx.Node) -> Label:
        """Return a node's label."""
        return self._labels[node]

    def value_of(self, node: fx.Node) -> Any:
        """Return a node's concrete value."""
        return self._values[node]


Rule = Callable[["LabelPropagation", Call], Label]
RULES: dict[str, Rule] = {}
"""The rule of every operation, by the operation's base name (``relu`` for ``aten.relu_``)."""

REARRANGING: set[str] = set()
"""Operations that move, copy or leave out elements and read no value of them."""

POINTWISE = "pointwise"
"""The name of the rule for operations that PyTorch tags as pointwise and that have no other."""


def rule(*names: str, rearranges: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the rule for the named operations.

    Those that only rearrange elements become part of ``REARRANGING``.

    Raises
    ------
    ValueError
        An operation has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"operation {name!r} has two rules")
            RULES[name] = function
            if rearranges:
                REARRANGING.add(name)
        return function

    return register
