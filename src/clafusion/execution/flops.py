"""How many floating-point operations a run takes: those of matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["count_operations"]


def count_operations(run: Callable[[], Any]) -> int:
    """Run something without gradients; return the floating-point operations that it took.

    A product of matrices ``(m, k)`` and ``(k, n)`` takes ``2 m k n``: a multiplication and an
    addition are two. Products, convolutions, attention and recurrent layers count, by the formulas
    of ``torch.utils.flop_counter``; sums, activations and norms do not. Only what this thread
    runs counts.
    """
    counting = _Counting()
    with torch.no_grad(), counting:
        run()
    return counting.count


class _Counting(TorchDispatchMode):
    """Adds up the operations of all that PyTorch dispatches."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):  # it calls parts of the graph, as cond does
            args = [self._counted(one) if callable(one) else one for one in args]
        returned = func(*args, **named)
        packet = getattr(func, "_overloadpacket", func)
        formula = _ON_THE_CPU.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.count += int(formula(*args, **named, out_val=returned))
        return returned

    def _counted(self, part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            with self:
                return part(*given, **named)

        return run


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _recurrent(x: Tensor, into: Tensor, again: Tensor, *_: Any, **__: Any) -> int:
    """Count the two products of each step: weights ``(gates, inputs)`` and ``(gates, hidden)``."""
    steps = x.numel() // x.size(-1)
    return 2 * steps * (into.numel() + again.numel())


# What PyTorch has no formula for.
_ON_THE_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
}
