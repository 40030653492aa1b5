"""The last layer of a language model: linear, with many outputs at many positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from clafusion.tracing.operations import affine_operands, batch_axis, op_name

__all__ = ["Readout", "find_readout"]

_BY_ELEMENT = ("add", "sub", "mul", "div", "tanh", "neg", "to", "_to_copy", "clone", "contiguous")


@dataclass(frozen=True)
class Readout:
    """A linear layer of values ``(inputs, positions, channels)``, and what comes of it.

    Its outputs, perhaps changed element by element, are outputs of the network and nothing else.

    Attributes
    ----------
    node
        The layer's node.
    positions, channels
        How many positions an input has, and how many outputs each position.
    width
        How many channels the layer reads at each position.
    following
        The nodes that come of it, in order.
    is_alike
        Whether these do the same to every output: they read nothing else but numbers.
    """

    node: str
    positions: int
    channels: int
    width: int
    following: tuple[str, ...]
    is_alike: bool

    @property
    def nodes(self) -> frozenset[str]:
        """The names of the layer's node and of those that follow."""
        return frozenset((self.node, *self.following))


def find_readout(module: fx.GraphModule) -> Readout | None:
    """Return the last layer of a network, where it has positions; None for another network."""
    nodes = list(module.graph.nodes)
    node = next((one for one in reversed(nodes) if op_name(one) == "linear"), None)
    if node is None or batch_axis(node) != 0:
        return None
    value, operand = node.meta.get("val"), affine_operands(node)["input"].meta.get("val")
    if not (_has_positions(value) and _has_positions(operand)):
        return None
    found = _following(node)
    if found is None:
        return None
    beside = list(_beside(node, found))
    if not all(_is_same_everywhere(one) for one in beside):
        return None
    names = tuple(one.name for one in nodes if one in found)
    positions, channels = (int(size) for size in value.shape[1:])
    width = int(operand.shape[2])
    return Readout(node.name, positions, channels, width, names, is_alike=not beside)


def _has_positions(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and isinstance(value.shape[1], int)
        and isinstance(value.shape[2], int)
    )


def _following(node: fx.Node) -> dict[fx.Node, None] | None:
    """Return all nodes that come of a node; None where one is no operation by element."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output" or user in found:
                continue
            if op_name(user) not in _BY_ELEMENT:
                return None
            found[user] = None
            waiting.append(user)
    return found


def _beside(node: fx.Node, found: dict[fx.Node, None]) -> Iterator[fx.Node]:
    for user in found:
        for one in tree_leaves((user.args, user.kwargs)):
            if isinstance(one, fx.Node) and one is not node and one not in found:
                yield one


def _is_same_everywhere(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and all(size == 1 for size in value.shape[:-1])
