"""Run a graph's convolutions with their channels innermost in memory, where they are fastest.

oneDNN's convolutions on CPUs read images whose channels lie innermost (``torch.channels_last``)
as they are. Others they copy into such an order and back again, which takes half as long as a
convolution of few channels itself. Elementwise operations, norms and pooling follow the order of
what they are given. Before all others, such as ``view``, which depend on it, values go back to the
order in which the model itself would have made them. So nothing but rounding changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

__all__ = ["ChannelsLast", "can_be_moved", "is_channels_last"]

_MAKERS = """adaptive_avg_pool2d add avg_pool2d batch_norm cat clamp clamp_min div elu gelu
    hardsigmoid hardswish hardtanh leaky_relu max_pool2d mish mul neg relu relu6 sigmoid silu
    softplus sub tanh""".split()
_WRITERS = """add_ clamp_ clamp_min_ div_ elu_ gelu_ hardsigmoid_ hardswish_ hardtanh_ leaky_relu_
    mish_ mul_ neg_ relu_ relu6_ sigmoid_ silu_ sub_ tanh_""".split()
_MAKE, _WRITE = (
    frozenset(getattr(torch.ops.aten, name) for name in names) for names in (_MAKERS, _WRITERS)
)
_FOLLOW = _MAKE | _WRITE | {torch.ops.aten.dropout}
"""Operations whose results lie as what they read does."""
_FRESH = _MAKE | _WRITE | {torch.ops.aten.conv2d, torch.ops.aten.linear}
"""Operations whose results lie in memory of their own, or in that of what they overwrite."""

_known: WeakKeyDictionary[fx.GraphModule, bool] = WeakKeyDictionary()


def can_be_moved(module: fx.GraphModule) -> bool:
    """Say whether a graph has convolutions of images, and values may be copied between operations.

    They may not where an operation writes to memory that others share: they would read the copy.
    """
    if module not in _known:
        nodes = list(module.graph.nodes)
        _known[module] = any(map(_is_convolution, nodes)) and all(map(_writes_its_own, nodes))
    return _known[module]


def is_channels_last(value: Tensor) -> bool:
    """Say whether a tensor lies in memory as images with their channels innermost do."""
    is_usual = value.dim() != 4 or value.is_contiguous()
    return not is_usual and value.is_contiguous(memory_format=torch.channels_last)


def _operation(node: fx.Node) -> Any:
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _is_convolution(node: fx.Node) -> bool:
    return _operation(node) is torch.ops.aten.conv2d


def _writes_its_own(node: fx.Node) -> bool:
    """Say whether what an operation writes to, if anything, is read by no other one."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return True
    if _operation(node) is torch.ops.aten.dropout_ and node.args[-1] is False:
        return True  # in evaluation it leaves everything as it is
    written = node.args[0]
    if _operation(node) not in _WRITE or not isinstance(written, fx.Node):
        return False
    return _operation(written) in _FRESH and len(written.users) == 1


class ChannelsLast:
    """Which values of a run lie with their channels innermost, though the model makes others.

    Parameters
    ----------
    values
        The run's values by node.
    """

    def __init__(self, values: Mapping[fx.Node, Any]) -> None:
        self._values = values
        self._moved: set[fx.Node] = set()

    def formats(self, node: fx.Node) -> dict[fx.Node, torch.memory_format]:
        """Return which operands a node is to be given in another order, and in which."""
        moved = [one for one in node.all_input_nodes if one in self._moved]
        gains = _is_convolution(node) and self._gains(node)
        if gains or (moved and _operation(node) in _FOLLOW):
            others = [self._values.get(one) for one in node.all_input_nodes if one not in moved]
            # Where an operand lies otherwise, the model's own result may, too.
            if all(one.is_contiguous() for one in others if isinstance(one, Tensor)):
                if not gains or moved == [node.args[0]]:
                    return {}
                if not moved:
                    return dict.fromkeys(node.all_input_nodes[:1], torch.channels_last)
        return dict.fromkeys(moved, torch.contiguous_format)

    def _gains(self, node: fx.Node) -> bool:
        """Say whether a convolution is known to be faster with channels innermost."""
        image = node.args[0]
        assert isinstance(image, fx.Node)
        value = self._values.get(image)
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return (
            isinstance(value, Tensor)
            and value.dim() == 4
            and value.dtype == torch.float32
            and value.device.type == "cpu"
            and groups in (1, value.size(1))
        )

    def made(
        self, node: fx.Node, value: Any, formats: Mapping[fx.Node, torch.memory_format]
    ) -> None:
        """Tell of a node's value, made of operands in these formats."""
        is_moved = torch.channels_last in formats.values() or (
            not formats and any(one in self._moved for one in node.all_input_nodes)
        )
        if is_moved and isinstance(value, Tensor) and not value.is_contiguous():
            self._moved.add(node)

    def supplied(self, node: fx.Node, like: fx.Node) -> None:
        """Tell of a node's value that comes from elsewhere, and lies as that of another node."""
        if like in self._moved:
            self._moved.add(node)
